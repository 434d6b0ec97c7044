"""TRL's own trainer beside ours on the same data: losses, metrics, references, scores, resume."""

from __future__ import annotations

import random

import pytest
import torch
from data_tokenizer import tiny_tokenizer
from tiny_models import tiny_llama

pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

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
        "beta": 0.1,
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


def history(run, name):
    return [row[name] for row in run.state.log_history if name in row]


@pytest.mark.slow
@pytest.mark.parametrize("precompute", [False, True])
def test_the_curves_of_trls_own_dpo(tmp_path, precompute):
    given = options(tmp_path, precompute_ref_log_probs=precompute)
    # With `precompute` there is no second model: the untrained policy is its own reference.
    references = [None if precompute else tiny_llama(5) for _ in range(2)]
    theirs = trainer(DPOTrainer, DPOConfig(**given), dataset(), ref_model=references[0])
    config = FusedDPOConfig(**given, loss="dpo")
    ours = trainer(FusedDPOTrainer, config, dataset(), ref_model=references[1])
    for run in (theirs, ours):
        run.train()
    for name in (
        "loss",
        "grad_norm",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    ):
        one, other = history(theirs, name), history(ours, name)
        assert len(other) == 20, name
        assert other == pytest.approx(one, rel=1e-4, abs=1e-4), name
    assert history(ours, "loss")[-1] < history(ours, "loss")[0]


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
def test_scores_reach_the_loss(tmp_path):
    scores = {"score_chosen": [float(i) for i in range(16)], "score_rejected": [0.5] * 16}
    config = FusedDPOConfig(**options(tmp_path, max_steps=1))
    run = trainer(FusedDPOTrainer, config, dataset(**scores), ref_model=tiny_llama())
    batch = next(iter(run.get_train_dataloader()))
    assert batch["rewards"].shape == (8,)
    assert batch["rewards"][4:].tolist() == [0.5] * 4
    assert set(batch["rewards"][:4].tolist()) <= set(scores["score_chosen"])
    run.train()


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
