"""Runs that end anywhere and resume from their last checkpoint, bit-equal to those that do not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import pair_features, tiny_llama
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import fused_prefopt as fp
from fused_prefopt.data import PairCollator
from fused_prefopt.integrations.transformers import PreferenceTrainer
from fused_prefopt.reference import add_reference_logps

HERE = Path(__file__).resolve().parent
STEPS, SAVE_EVERY, ACCUMULATION = 10, 3, 2
PAIRS = 13  # seven forward passes and four steps an epoch
# Times, a mean over the steps of this process, and TRL's count of tokens, which starts again at 0.
NOT_RESUMED = {
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "train_loss",
    "num_tokens",
}
LOSSES = {
    "gamma-simpo": {"queue_size": 24, "sample_size": 12},
    "alpha-dpo": {"alpha": 0.3, "beta": 2.0, "gamma": 0.5},
    "beta-dpo": {},
}


class Killed(Exception):
    """Stands for whatever ends a run."""


def settings(folder: Path, **options):
    """What both kinds of trainer are given: three and a bit epochs, dropout, an optimizer."""
    given = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVE_EVERY,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return given | options


def policy():
    return tiny_llama(attention_dropout=0.3)


def transformers_run(folder: Path, name: str, on_nonfinite: str = "stop", **options):
    loss_fn = fp.PreferenceLoss(name, **LOSSES[name])
    features = pair_features(PAIRS)
    if "reference" in loss_fn.loss.needs:
        features = add_reference_logps(tiny_llama(7), features, PairCollator(0), progress=False)
    given = settings(folder, remove_unused_columns=False, label_names=["completion_mask"])
    return PreferenceTrainer(
        policy(),
        TrainingArguments(**given | options),
        train_dataset=features,
        data_collator=PairCollator(0),
        loss_fn=loss_fn,
        on_nonfinite=on_nonfinite,
    )


def trl_run(folder: Path, name: str, on_nonfinite: str = "stop"):
    pytest.importorskip("trl")
    from data_tokenizer import tiny_tokenizer
    from test_integrations_trl import dataset

    from fused_prefopt.integrations.trl import FusedDPOConfig, FusedDPOTrainer

    given = settings(folder, bf16=False, gradient_checkpointing=False)
    return FusedDPOTrainer(
        policy(),
        ref_model=tiny_llama(7),
        args=FusedDPOConfig(
            **given, loss=name, loss_kwargs=LOSSES[name], on_nonfinite=on_nonfinite
        ),
        train_dataset=dataset(PAIRS),
        processing_class=tiny_tokenizer(),
    )


RUNS = {"transformers": transformers_run, "trl": trl_run}


def end(trainer, seed: str, how) -> None:
    """Call `how` in some forward pass after the first checkpoint, maybe amid an accumulation."""
    passes, last = [], random.Random(seed).randint(2 * SAVE_EVERY + 1, 2 * STEPS - 2)

    def count(*_):
        passes.append(1)
        if len(passes) == last:
            how()

    trainer.model.model.register_forward_hook(count)


def raise_killed() -> None:
    raise Killed


def outcome(trainer) -> dict:
    """Everything a run leaves: its log, parameters, optimizer and the loss's statistics."""
    log = [
        {name: value for name, value in row.items() if name not in NOT_RESUMED}
        for row in trainer.state.log_history
    ]
    return {
        "log": log,
        "parameters": dict(trainer.model.named_parameters()),
        "optimizer": trainer.optimizer.state_dict()["state"],
        "statistics": trainer.attachment.loss_fn.state_dict(),
    }


def assert_bit_equal(one, other, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_bit_equal(one[name], other[name], f"{where}/{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_bit_equal(*pair, f"{where}/{index}")
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=where)
    else:
        assert one == other, where


def resumed(kind: str, folder: Path, name: str) -> dict:
    trainer = RUNS[kind](folder, name)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    return outcome(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("name", ["gamma-simpo", "alpha-dpo", "beta-dpo"])
def test_a_run_that_failed_resumes_bit_equal(tmp_path, kind, name):
    whole = RUNS[kind](tmp_path / "whole", name)
    whole.train()
    failing = RUNS[kind](tmp_path / "failed", name)
    end(failing, f"{kind} {name}", raise_killed)
    with pytest.raises(Killed):
        failing.train()
    assert SAVE_EVERY <= failing.state.global_step < STEPS
    wanted = outcome(whole)
    assert len(wanted["log"]) == STEPS + 1
    assert_bit_equal(wanted, resumed(kind, tmp_path / "failed", name))


@pytest.mark.slow
def test_a_killed_process_resumes_bit_equal(tmp_path):
    code = f"""
import os, signal, sys
from pathlib import Path
sys.path[:0] = {[str(HERE), str(HERE.parent / "support")]!r}
from test_resume import end, transformers_run
trainer = transformers_run(Path({str(tmp_path / "killed")!r}), "gamma-simpo")
end(trainer, "killed", lambda: os.kill(os.getpid(), signal.SIGKILL))
trainer.train()
"""
    env = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    child = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    whole = transformers_run(tmp_path / "whole", "gamma-simpo")
    whole.train()
    assert_bit_equal(outcome(whole), resumed("transformers", tmp_path / "killed", "gamma-simpo"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("name", ["gamma-simpo", "alpha-dpo"])
def test_nan_from_the_backbone_leaves_the_statistics_and_earlier_checkpoints(tmp_path, kind, name):
    """Ignored, NaN is in the log and the weights are lost."""
    passes, failing = [], RUNS[kind](tmp_path / "failed", name, on_nonfinite="ignore")

    def hook(_, __, output):
        passes.append(1)
        if len(passes) == 7:  # the only one of the fourth step
            output.last_hidden_state = output.last_hidden_state * torch.nan
        return output

    failing.model.model.register_forward_hook(hook)
    failing.train()
    rows = [row for row in failing.state.log_history if "nonfinite" in row]
    finite = torch.tensor([row["loss"] for row in rows]).isfinite()
    assert finite.tolist() == [True] * 3 + [False] * (STEPS - 3)
    assert [row["nonfinite"] > 0 for row in rows] == [False] * 3 + [True] * (STEPS - 3)
    before, after = (
        torch.load(tmp_path / "failed" / f"checkpoint-{step}" / "preference_loss.pt")
        for step in (SAVE_EVERY, STEPS)
    )
    # One pair is left of the first epoch, and four passes are done of the third.
    counts = [each["statistics.nonfinite"].item() for each in (before, after)]
    assert counts == [0, 1 + PAIRS + 8]
    # The generator's state is what every batch moves, for the next to draw anew.
    moving = ("nonfinite", "_extra_state")
    kept = [
        {key: value for key, value in each.items() if not key.endswith(moving)}
        for each in (before, after)
    ]
    assert any(value.nan_to_num().any() for value in kept[0].values())
    assert_bit_equal(*kept)
    whole = RUNS[kind](tmp_path / "whole", name)
    whole.train()
    again = RUNS[kind](tmp_path / "again", name)
    again.train(resume_from_checkpoint=str(tmp_path / "failed" / f"checkpoint-{SAVE_EVERY}"))
    assert_bit_equal(outcome(whole), outcome(again))


def test_the_statistics_matter_to_what_is_compared(tmp_path):
    """Without them the resumed run differs: the tests above cannot pass by chance."""
    whole = transformers_run(tmp_path, "gamma-simpo")
    whole.train()
    checkpoint = tmp_path / "checkpoint-6"
    (checkpoint / "preference_loss.pt").unlink()
    again = transformers_run(tmp_path / "again", "gamma-simpo")
    with pytest.warns(UserWarning, match="preference_loss.pt: not found, the statistics start"):
        again.train(resume_from_checkpoint=str(checkpoint))
    one, other = outcome(whole), outcome(again)
    assert one["log"][:6] == other["log"][:6] and one["log"][6] != other["log"][6]


def test_statistics_of_another_loss_are_refused(tmp_path):
    transformers_run(tmp_path / "gamma", "gamma-simpo", max_steps=3).train()
    other = transformers_run(tmp_path / "alpha", "alpha-dpo")
    with pytest.raises(ValueError, match=r"got the statistics of another loss.*\n?.*alpha-dpo"):
        other.train(resume_from_checkpoint=str(tmp_path / "gamma" / "checkpoint-3"))
