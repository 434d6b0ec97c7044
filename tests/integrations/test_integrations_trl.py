"""TRL's own trainer beside ours on the same data: losses, metrics, references, scores, resume."""

from __future__ import annotations

import random

import pytest
import torch
from data_tokenizer import tiny_tokenizer
from tiny_models import VOCAB, tiny_llama
from torch.utils.data import SequentialSampler
from transformers import MixtralConfig, MixtralForCausalLM

pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

from fused_prefopt import LogpBatch, PreferenceLoss  # noqa: E402
from fused_prefopt.integrations.trl import FusedDPOConfig, FusedDPOTrainer  # noqa: E402

WORDS = "the cat sat on mat 1 2".split()


def dataset(count=16, **columns):
    """Rows of text: prompt, chosen, rejected."""
    draw = random.Random(0)

    def words(low, high):
        return " " + " ".join(draw.choice(WORDS) for _ in range(draw.randint(low, high)))

    rows = [
        {"prompt": words(2, 5).strip(), "chosen": words(1, 6), "rejected": words(1, 6)}
        for _ in range(count)
    ]
    return Dataset.from_list(
        [
            {**row, **{name: values[i] for name, values in columns.items()}}
            for i, row in enumerate(rows)
        ]
    )


def options(folder, **changes):
    given = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 20,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return given | changes


def trainer(kind, config, data, model=None, **more):
    return kind(
        model or tiny_llama(),
        args=config,
        train_dataset=data,
        processing_class=tiny_tokenizer(),
        **more,
    )


TIMES = {"epoch", "step", "total_flos", "train_runtime", "train_loss", "learning_rate"} | {
    f"{mode}_{name}"
    for mode in ("train", "eval")
    for name in ("runtime", "samples_per_second", "steps_per_second")
}


def in_order(run):
    """The trainer, whose batches are now the data set's rows in order."""
    run._get_train_sampler = lambda *_: SequentialSampler(run.train_dataset)
    return run


def history(run, name):
    return [row[name] for row in run.state.log_history if name in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precompute", "loss", "changes"),
    [
        (False, "dpo", {}),
        (True, "dpo", {}),
        (False, "dpo", {"ld_alpha": 0.3}),
        (True, "dpo", {"ld_alpha": 0.3}),
        (False, "wpo", {"use_weighting": True}),
    ],
    ids=str,
)
def test_the_curves_of_trls_own_dpo(tmp_path, precompute, loss, changes):
    given = options(tmp_path, precompute_ref_log_probs=precompute, **changes)
    # With `precompute` there is no second model: the untrained policy is its own reference.
    references = [None if precompute else tiny_llama(5) for _ in range(2)]
    # Evaluation's batches are of 4, 4 and 2 pairs.
    held_out = dataset(10)
    theirs = trainer(
        DPOTrainer, DPOConfig(**given), dataset(), ref_model=references[0], eval_dataset=held_out
    )
    config = FusedDPOConfig(**given, loss=loss, log_tokens=True)
    ours = trainer(
        FusedDPOTrainer, config, dataset(), ref_model=references[1], eval_dataset=held_out
    )
    for run in (theirs, ours):
        run.train()
        run.evaluate()
    names = {name for row in theirs.state.log_history for name in row} - TIMES
    assert {"logits/chosen", "entropy", "mean_token_accuracy", "num_tokens"} < names
    assert {"eval_loss", "eval_rewards/accuracies", "eval_logps/rejected"} < names
    for name in names:
        one, other = history(theirs, name), history(ours, name)
        assert len(other) == len(one) == (1 if name.startswith("eval_") else 20), name
        assert other == pytest.approx(one, rel=1e-4, abs=1e-4), name
    assert history(ours, "loss")[-1] < history(ours, "loss")[0]


@pytest.mark.slow
def test_the_router_loss_of_a_mixture_of_experts(tmp_path):
    def experts(seed):
        torch.manual_seed(seed)
        config = MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
        )
        return MixtralForCausalLM(config)

    given = options(tmp_path, max_steps=4, router_aux_loss_coef=0.5)
    runs = [
        trainer(kind, config(**given), dataset(), model=experts(0), ref_model=experts(5))
        for kind, config in ((DPOTrainer, DPOConfig), (FusedDPOTrainer, FusedDPOConfig))
    ]
    for run in runs:
        run.train()
    for name in ("loss", "aux_loss", "grad_norm", "rewards/margins"):
        one, other = (history(run, name) for run in runs)
        assert len(one) == 4, name
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5), name


@pytest.mark.slow
def test_a_peft_model_is_its_own_reference(tmp_path):
    peft = pytest.importorskip("peft")
    runs = []
    for kind, config in ((DPOTrainer, DPOConfig), (FusedDPOTrainer, FusedDPOConfig)):
        torch.manual_seed(0)
        given = options(tmp_path, max_steps=6, learning_rate=1e-2)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        runs.append(trainer(kind, config(**given), dataset(), peft_config=lora))
        runs[-1].train()
    for name in ("loss", "rewards/margins", "logps/rejected"):
        one, other = (history(run, name) for run in runs)
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5), name


@pytest.mark.slow
def test_a_loss_without_a_reference_keeps_no_reference_model_and_evaluates(tmp_path):
    config = FusedDPOConfig(
        **options(tmp_path, max_steps=3),
        loss="gamma-simpo",
        loss_kwargs={"beta": 2.0, "gamma": 1.0, "queue_size": 8},
    )
    run = trainer(FusedDPOTrainer, config, dataset(), eval_dataset=dataset(8))
    assert run.ref_model is None
    run.train()
    assert len(history(run, "margin/mean")) == 3
    assert run.attachment.loss_fn.statistics.margins.isfinite().all()
    queue = run.attachment.loss_fn.statistics.margins.clone()
    found = run.evaluate()
    assert found["eval_loss"] > 0
    assert "eval_rewards/margins" in run.state.log_history[-1]
    assert torch.equal(run.attachment.loss_fn.statistics.margins, queue)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("odpo", lambda m, s: -torch.nn.functional.logsigmoid(m - s.clamp(min=1e-6).log())),
        ("reward-distillation", lambda m, s: (s - m).square()),
    ],
)
def test_scores_reach_the_loss(tmp_path, loss, expected):
    scores = {"score_chosen": [float(i) for i in range(16)], "score_rejected": [0.5] * 16}
    given = options(tmp_path, max_steps=1)
    config = FusedDPOConfig(**given, loss=loss)
    run = in_order(trainer(FusedDPOTrainer, config, dataset(**scores), ref_model=tiny_llama(5)))
    batch = next(iter(run.get_train_dataloader()))
    assert batch["rewards"].shape == (8,)
    assert batch["rewards"][4:].tolist() == [0.5] * 4
    assert set(batch["rewards"][:4].tolist()) <= set(scores["score_chosen"])
    loss = run.train().training_loss
    reference = torch.cat(run.compute_ref_log_probs(run.ref_model, batch))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    model = tiny_llama().double()
    logps = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    labels = labels[:, 1:]
    sums = logps.gather(2, labels.clamp(min=0)[..., None])[..., 0].where(labels >= 0, 0.0).sum(1)
    margins = 0.1 * (sums - reference).view(2, 4).diff(dim=0).neg()[0]
    score = batch["rewards"].view(2, 4).diff(dim=0).neg()[0]
    truth = expected(margins, score.double()).mean().item()
    assert loss == pytest.approx(truth, rel=1e-5)


@pytest.mark.slow
def test_the_divergence_of_the_tokens_reaches_tdpo(tmp_path):
    given = options(tmp_path, max_steps=1)
    config = FusedDPOConfig(**given, loss="tdpo1")
    run = in_order(trainer(FusedDPOTrainer, config, dataset(), ref_model=tiny_llama(5)))
    batch = next(iter(run.get_train_dataloader()))
    rows = [
        each(batch["input_ids"], batch["attention_mask"]).logits[:, :-1].double().log_softmax(-1)
        for each in (tiny_llama(), tiny_llama(5))
    ]
    counted = batch["completion_mask"][:, 1:] > 0
    labels = batch["input_ids"][:, 1:, None]
    policy, reference = (
        each.gather(2, labels)[..., 0].where(counted, 0.0).sum(1).detach() for each in rows
    )
    kl = (rows[1].exp() * (rows[1] - rows[0])).sum(2).where(counted, 0.0).sum(1).detach()
    truth = PreferenceLoss("tdpo1").from_logps(
        LogpBatch(policy, counted.sum(1), reference=reference, sequence_kl=kl)
    )
    loss = run.train().training_loss
    assert loss == pytest.approx(truth.loss.item(), rel=1e-5)
    with pytest.raises(ValueError, match="needs reference, sequence_kl, which neither precomp"):
        given = options(tmp_path, precompute_ref_log_probs=True)
        trainer(FusedDPOTrainer, FusedDPOConfig(**given, loss="tdpo1"), dataset(4))


@pytest.mark.slow
def test_resuming_continues_with_the_statistics(tmp_path):
    def run(folder, **changes):
        given = options(folder, max_steps=6, optim="adamw_torch", **changes)
        kwargs = {"queue_size": 12, "sample_size": 8}
        config = FusedDPOConfig(**given, loss="gamma-dpo", loss_kwargs=kwargs)
        return trainer(FusedDPOTrainer, config, dataset(), ref_model=tiny_llama(5))

    whole = run(tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    resumed = run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert history(whole, "loss")[3:] == history(resumed, "loss")[3:]
    queues = [each.attachment.loss_fn.statistics.margins for each in (whole, resumed)]
    assert torch.equal(*(queue.nan_to_num(7.0) for queue in queues))


def test_configurations_that_name_no_pairwise_loss(tmp_path):
    given = options(tmp_path)
    with pytest.raises(ValueError, match="'dro' is point-wise"):
        FusedDPOConfig(**given, loss="dro").build_loss()
    with pytest.raises(ValueError, match="did you mean 'simpo'"):
        FusedDPOConfig(**given, loss="simpoo").build_loss()
    with pytest.raises(TypeError, match="no hyperparameter 'betta'"):
        FusedDPOConfig(**given, loss="simpo", loss_kwargs={"betta": 1}).build_loss()
    with pytest.raises(ValueError, match="wanted a FusedDPOConfig"):
        trainer(FusedDPOTrainer, DPOConfig(**given), dataset(4))
    with pytest.raises(ValueError, match="odpo needs `rewards`"):
        config = FusedDPOConfig(**given, loss="odpo")
        trainer(FusedDPOTrainer, config, dataset(4), ref_model=tiny_llama(5))


def test_hyperparameters_are_given_once_and_trls_own_are_refused(tmp_path):
    given = options(tmp_path)
    config = FusedDPOConfig(**given, beta=0.3)
    assert config.build_loss().hyperparameters["beta"] == 0.3
    config = FusedDPOConfig(**given, loss="simpo")
    assert config.build_loss().hyperparameters["beta"] == 2.5
    with pytest.raises(ValueError, match=r"beta: got 0.3 and 2.0 in loss_kwargs"):
        FusedDPOConfig(**given, beta=0.3, loss_kwargs={"beta": 2.0}).build_loss()
    with pytest.raises(ValueError, match="label_smoothing: got 0.1, an option of TRL's own"):
        FusedDPOConfig(**given, label_smoothing=0.1).build_loss()
    with pytest.raises(ValueError, match=r"loss_type: got \['ipo'\]"):
        FusedDPOConfig(**given, loss_type="ipo").build_loss()
    with pytest.raises(ValueError, match="use_weighting: got True with dpo"):
        FusedDPOConfig(**given, use_weighting=True).build_loss()


def test_the_configuration_is_read_from_yaml_and_the_command_line(tmp_path):
    from trl import TrlParser

    path = tmp_path / "config.yaml"
    path.write_text(
        f"output_dir: {tmp_path}\nloss: gamma-simpo\nloss_kwargs:\n  beta: 10.0\n  gamma: 4.0\n"
        "use_cpu: true\nbf16: false\nreport_to: none\n"
    )
    (config,) = TrlParser(FusedDPOConfig).parse_args_and_config(["--config", str(path)])
    loss_fn = config.build_loss()
    assert loss_fn.name == "gamma-simpo" and loss_fn.hyperparameters["beta"] == 10.0
    (config,) = TrlParser(FusedDPOConfig).parse_args_and_config(
        ["--config", str(path), "--loss", "simpo", "--loss_kwargs", '{"beta": 3.0}']
    )
    assert config.build_loss().hyperparameters["beta"] == 3.0
