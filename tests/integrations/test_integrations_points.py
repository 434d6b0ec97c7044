"""TRL's KTO trainer beside ours on the same rows, and DRO's scores, groups and prompts in it."""

from __future__ import annotations

import gc
import os
import random
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from data_tokenizer import tiny_tokenizer
from tiny_models import eager_sums, tiny_llama

pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402
from test_integrations_trl import TIMES, WORDS, history, options  # noqa: E402
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, TrlParser  # noqa: E402

import fused_prefopt as fp  # noqa: E402
from fused_prefopt.integrations.trl import (  # noqa: E402
    FusedDPOConfig,
    FusedDPOTrainer,
    FusedKTOConfig,
    FusedKTOTrainer,
)

# The first batch of four has no desirable completion, the second no other.
LABELS = [False] * 4 + [True] * 4 + [True, False, False, True] * 2


def rows(count=16, **columns):
    """Rows of text: prompt, completion, label."""
    draw = random.Random(1)

    def words(low, high):
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(low, high)))

    texts = [{"prompt": words(2, 5), "completion": " " + words(1, 6)} for _ in range(count)]
    if not columns:
        columns = {"label": LABELS}
    return Dataset.from_list(
        [{**row, **{name: columns[name][i] for name in columns}} for i, row in enumerate(texts)]
    )


def trainer(kind, config, data=None, model=None, **more):
    return kind(
        model or tiny_llama(),
        args=config,
        train_dataset=data or rows(),
        processing_class=tiny_tokenizer(),
        **more,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss_type", "loss", "changes"),
    [
        ("kto", "kto", {}),
        ("kto", "kto", {"precompute_ref_log_probs": True, "beta": 0.3}),
        ("kto", "kto", {"gradient_accumulation_steps": 2, "desirable_weight": 1.4}),
        ("apo_zero_unpaired", "apo-zero-unpaired", {"undesirable_weight": 0.7}),
    ],
    ids=str,
)
def test_the_curves_of_trls_own_kto(tmp_path, loss_type, loss, changes):
    given = options(tmp_path, **changes)
    # With `precompute` there is no second model: the untrained policy is its own reference.
    precompute = "precompute_ref_log_probs" in changes
    references = [None if precompute else tiny_llama(5) for _ in range(2)]
    more = {"eval_dataset": rows(10, label=LABELS)}
    theirs = trainer(
        KTOTrainer, KTOConfig(**given, loss_type=loss_type), ref_model=references[0], **more
    )
    config = FusedKTOConfig(**given, loss=loss, log_tokens=True)
    ours = trainer(FusedKTOTrainer, config, ref_model=references[1], **more)
    assert config.loss_type == "kto"
    for run in (theirs, ours):
        run.train()
        run.evaluate()
    names = {name for row in theirs.state.log_history for name in row} - TIMES
    assert {"kl", "logits/chosen", "entropy", "num_tokens", "rewards/margins"} < names
    assert {"eval_loss", "eval_logps/rejected", "eval_kl"} < names
    for name in names:
        one, other = history(theirs, name), history(ours, name)
        assert len(other) == len(one), name
        assert other == pytest.approx(one, rel=1e-4, abs=1e-4), name
    # Batches of one kind alone have no margin, in TRL and here.
    assert len(history(ours, "rewards/margins")) == 10
    # On the batch of the first step, epochs later.
    assert history(ours, "loss")[16] < history(ours, "loss")[0]


@pytest.mark.slow
def test_a_peft_model_is_its_own_reference(tmp_path):
    peft = pytest.importorskip("peft")
    runs = []
    for kind, config in ((KTOTrainer, KTOConfig), (FusedKTOTrainer, FusedKTOConfig)):
        torch.manual_seed(0)
        given = options(tmp_path, max_steps=6, learning_rate=1e-2)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        runs.append(trainer(kind, config(**given), peft_config=lora))
        runs[-1].train()
    for name in ("loss", "kl", "logps/rejected"):
        one, other = (history(run, name) for run in runs)
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5), name


def dro_run(folder, data=None, **changes):
    given = options(folder, max_steps=1, **changes)
    kwargs = {"beta": 0.5, "log_z0": 1.0}
    config = FusedKTOConfig(**given, loss="dro", loss_kwargs=kwargs)
    return trainer(FusedKTOTrainer, config, data, ref_model=tiny_llama(5))


def truth_of(run, rewards, groups=None):
    """DRO's loss of the first four rows, from the models' own logits."""
    features = [run.train_dataset[i] for i in range(4)]
    part = {
        name: eager_sums(model.double(), features, "completion_ids", side)
        for name, model, side in (
            ("policy", tiny_llama(), "completion"),
            ("reference", tiny_llama(5), "completion"),
            ("prompt", tiny_llama(), "prompt"),
            ("prompt_reference", tiny_llama(5), "prompt"),
        )
    }
    lengths = torch.tensor([len(feature["completion_ids"]) for feature in features])
    batch = fp.LogpBatch(
        **{name: sums.detach() for name, sums in part.items()},
        lengths=lengths,
        rewards=torch.tensor(rewards),
        groups=None if groups is None else torch.tensor(groups),
    )
    return fp.PreferenceLoss("dro", beta=0.5, log_z0=1.0).from_logps(batch).loss.item()


@pytest.mark.slow
@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("column", ["reward", "score"])
def test_scores_and_groups_reach_dro(tmp_path, precompute, column):
    scores, groups = [0.25 * i for i in range(16)], [0, 0, 0] + [1] * 13
    data = rows(**{column: scores, "group": groups})
    run = dro_run(tmp_path, data, precompute_ref_log_probs=precompute)
    assert not run.calculate_KL
    assert ("ref_prompt_logps" in run.train_dataset.column_names) == precompute
    run.train()
    grouped = truth_of(run, scores[:4], groups[:4])
    assert grouped != pytest.approx(truth_of(run, scores[:4]), rel=1e-3)
    assert history(run, "loss") == pytest.approx([grouped], rel=1e-5)
    assert history(run, "reward_model/mean") == pytest.approx([sum(scores[:4]) / 4])


@pytest.mark.slow
def test_without_scores_dro_takes_the_labels(tmp_path):
    run = dro_run(tmp_path, rows(label=[True, False, False, True] * 4))
    run.train()
    truth = truth_of(run, [1.0, -1.0, -1.0, 1.0])
    assert history(run, "loss") == pytest.approx([truth], rel=1e-5)


@pytest.mark.slow
def test_pairs_with_scores_become_scored_completions_of_one_group(tmp_path):
    pairs = Dataset.from_list(
        [
            {
                "prompt": "the cat",
                "chosen": f" sat {word}",
                "rejected": f" on {word}",
                "score_chosen": 0.5 + i,
                "score_rejected": float(-i),
            }
            for i, word in enumerate(WORDS[:4])
        ]
    )
    run = dro_run(tmp_path, pairs)
    batch = next(iter(run.get_train_dataloader()))
    assert batch["rewards"].tolist() == [0.5, 0.0, 1.5, -1.0]
    assert batch["groups"].tolist() == [0, 0, 1, 1]
    assert batch["label"].tolist() == [True, False] * 2
    run.train()
    truth = truth_of(run, batch["rewards"].tolist(), [0, 0, 1, 1])
    assert history(run, "loss") == pytest.approx([truth], rel=1e-5)


@pytest.mark.slow
def test_resuming_continues_with_the_statistics(tmp_path):
    def run(folder, **changes):
        config = FusedKTOConfig(**options(folder, max_steps=6, optim="adamw_torch", **changes))
        return trainer(FusedKTOTrainer, config, ref_model=tiny_llama(5))

    whole = run(tmp_path / "whole", save_strategy="steps", save_steps=3)
    counter = whole.attachment.loss_fn.statistics.nonfinite
    counter.fill_(7)
    whole.train()
    resumed = run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert history(whole, "loss")[3:] == history(resumed, "loss")[3:]
    assert int(resumed.attachment.loss_fn.statistics.nonfinite) == 7


def test_configurations_that_name_no_loss_on_points(tmp_path):
    given = options(tmp_path)
    with pytest.raises(ValueError, match="'dpo' is pairwise, wanted one on points"):
        FusedKTOConfig(**given, loss="dpo").build_loss()
    with pytest.raises(ValueError, match="loss_type: got 'apo_zero_unpaired'"):
        FusedKTOConfig(**given, loss_type="apo_zero_unpaired").build_loss()
    with pytest.raises(TypeError, match="dro has no hyperparameter 'desirable_weight'"):
        FusedKTOConfig(**given, loss="dro", desirable_weight=2.0).build_loss()
    with pytest.raises(ValueError, match="wanted a FusedKTOConfig"):
        trainer(FusedKTOTrainer, KTOConfig(**given))
    with pytest.raises(ValueError, match="needs a column 'label'"):
        trainer(FusedKTOTrainer, FusedKTOConfig(**given), rows(reward=[1.0] * 16))


def test_the_configuration_is_read_from_yaml_and_the_command_line(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"output_dir: {tmp_path}\nloss: dro\nloss_kwargs:\n  log_z0: 3.0\nbeta: 0.7\n"
        "use_cpu: true\nbf16: false\nreport_to: none\n"
    )
    (config,) = TrlParser(FusedKTOConfig).parse_args_and_config(["--config", str(path)])
    loss_fn = config.build_loss()
    assert loss_fn.name == "dro" and loss_fn.hyperparameters == {"beta": 0.7, "log_z0": 3.0}
    (config,) = TrlParser(FusedKTOConfig).parse_args_and_config(
        ["--config", str(path), "--loss_kwargs", '{"log_z0": 5.0}', "--beta", "0.2"]
    )
    assert config.build_loss().hyperparameters == {"beta": 0.2, "log_z0": 5.0}


def _work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= where | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    pairs = Dataset.from_list(
        [
            {"prompt": WORDS[i % 5], "chosen": " " + WORDS[(i * 3) % 7], "rejected": " sat on" * i}
            for i in range(1, 17)
        ]
    )
    given = options(folder, max_steps=2, ddp_backend="gloo", per_device_train_batch_size=2)
    histories = [
        _logged(kind, config, data)
        for kind, config, data in (
            (DPOTrainer, DPOConfig(**given), pairs),
            (FusedDPOTrainer, FusedDPOConfig(**given, log_tokens=True), pairs),
            (KTOTrainer, KTOConfig(**given), rows()),
            (FusedKTOTrainer, FusedKTOConfig(**given, log_tokens=True), rows()),
        )
    ]
    if rank == 0:
        torch.save(histories, f"{folder}/histories.pt")
    # A DDP model that outlives its process group may wait for the other rank for ever.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def _logged(kind, config, data) -> list[dict]:
    run = trainer(kind, config, data, ref_model=tiny_llama(5))
    run.train()
    return run.state.log_history


@pytest.mark.slow
def test_two_processes_log_what_trl_logs(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    mp.spawn(_work, args=(port, str(tmp_path)), nprocs=2)
    histories = torch.load(tmp_path / "histories.pt")
    for theirs, ours in (histories[:2], histories[2:]):
        assert len(theirs) == len(ours) == 3
        for one, other in zip(theirs, ours, strict=True):
            assert one.keys() <= other.keys()
            for name in one.keys() - TIMES:
                assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
