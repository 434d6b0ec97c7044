"""Runs that end anywhere and resume from their last checkpoint, bit-equal to those that do not."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import pair_features, tiny_llama
from trainers import (
    OF_TRL,
    ROOT,
    Killed,
    assert_bit_equal,
    build,
    child_environment,
    pairs,
    points,
)
from transformers.trainer_utils import get_last_checkpoint

import fused_prefopt as fp
from fused_prefopt.data import PairCollator
from fused_prefopt.reference import add_reference_logps

pytestmark = pytest.mark.slow
STEPS, SAVE_EVERY = 10, 3
PAIRS = 13  # seven forward passes and four steps an epoch: three and a bit epochs
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
    "gamma-simpo + 0.5 alpha-dpo + sft": {"queue_size": 24, "sample_size": 12, "alpha": 0.3},
    "length-dpo + sft": {"margin": {"name": "dynamic", "gamma": 0.5, "queue_size": 24}},
    "kto": {},
}
RUNS = [(kind, name) for kind in ("transformers", "dpo") for name in LOSSES if name != "kto"]
SETTINGS = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": SAVE_EVERY,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
}


def run_of(kind: str, folder: Path, name: str, on_nonfinite: str = "stop", **options):
    """A run with dropout."""
    if kind in OF_TRL:
        data = pairs(PAIRS) if kind == "dpo" else points(PAIRS, label=[True, False] * 7)
    else:
        data = pair_features(PAIRS)
        if "reference" in fp.PreferenceLoss(name, **LOSSES[name]).loss.needs:
            data = add_reference_logps(tiny_llama(7), data, PairCollator(0), progress=False)
    given = {"loss": name, "loss_kwargs": LOSSES[name], "on_nonfinite": on_nonfinite}
    model = tiny_llama(attention_dropout=0.3)
    return build(kind, folder, data, model=model, **given, **SETTINGS | options)


def end(trainer, seed: str, how) -> None:
    """Call `how` in some forward pass after the first checkpoint, maybe amid an accumulation."""
    passes, last = [], random.Random(seed).randint(2 * SAVE_EVERY + 1, 2 * STEPS - 2)

    def count(module, *_):
        if torch.is_grad_enabled():
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run without an end in between leaves, and its folder; made once."""
    runs = {}

    def run(kind, name):
        if (kind, name) not in runs:
            folder = tmp_path_factory.mktemp("whole")
            trainer = run_of(kind, folder, name)
            trainer.train()
            runs[kind, name] = outcome(trainer), folder
            assert len(runs[kind, name][0]["log"]) == STEPS + 1
        return runs[kind, name]

    return run


def resumed(kind: str, folder: Path, name: str) -> dict:
    trainer = run_of(kind, folder, name)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    return outcome(trainer)


@pytest.mark.parametrize(("kind", "name"), [*RUNS, ("kto", "kto")])
def test_a_run_that_failed_resumes_bit_equal(tmp_path, whole, kind, name):
    failing = run_of(kind, tmp_path, name)
    end(failing, f"{kind} {name}", raise_killed)
    with pytest.raises(Killed):
        failing.train()
    assert SAVE_EVERY <= failing.state.global_step < STEPS
    assert_bit_equal(whole(kind, name)[0], resumed(kind, tmp_path, name))


def test_a_killed_process_resumes_bit_equal(tmp_path, whole):
    code = f"""
import os, signal, sys
from pathlib import Path
sys.path[:0] = {[str(ROOT / "tests" / folder) for folder in ("integrations", "support")]!r}
from test_resume import end, run_of
trainer = run_of("transformers", Path({str(tmp_path)!r}), "gamma-simpo")
end(trainer, "killed", lambda: os.kill(os.getpid(), signal.SIGKILL))
trainer.train()
"""
    command, env = [sys.executable, "-c", code], child_environment()
    child = subprocess.run(command, env=env, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    found = resumed("transformers", tmp_path, "gamma-simpo")
    assert_bit_equal(whole("transformers", "gamma-simpo")[0], found)


@pytest.mark.parametrize(("kind", "name"), [run for run in RUNS if run[1] != "beta-dpo"])
def test_nan_from_the_backbone_leaves_the_statistics_and_earlier_checkpoints(
    tmp_path, whole, kind, name
):
    """Ignored, NaN is in the log and the weights are lost."""
    passes, failing = [], run_of(kind, tmp_path, name, on_nonfinite="ignore")

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
        torch.load(tmp_path / f"checkpoint-{step}" / "preference_loss.pt")
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
    again = run_of(kind, tmp_path, name)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVE_EVERY}"))
    assert_bit_equal(whole(kind, name)[0], outcome(again))


def test_a_loss_attached_to_a_plain_trainer_is_resumed_with_its_statistics(tmp_path):
    options = {"log_tokens": True, "max_steps": 4, "save_steps": 2}
    first = run_of("attached", tmp_path, "gamma-simpo", **options)
    first.train()
    again = run_of("attached", tmp_path, "gamma-simpo", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_bit_equal(outcome(first), outcome(again))


def test_a_loss_of_points_keeps_its_count_of_what_was_not_finite(tmp_path):
    first = run_of("kto", tmp_path, "kto", max_steps=SAVE_EVERY)
    first.attachment.loss_fn.statistics.nonfinite.fill_(7)
    first.train()
    again = run_of("kto", tmp_path, "kto", max_steps=SAVE_EVERY + 1)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVE_EVERY}"))
    assert int(again.attachment.loss_fn.statistics.nonfinite) == 7


def test_the_statistics_matter_to_what_is_compared(tmp_path, whole):
    """Without them the resumed run differs: the tests above cannot pass by chance."""
    wanted, folder = whole("transformers", "gamma-simpo")
    checkpoint = folder / "checkpoint-6"
    (checkpoint / "preference_loss.pt").rename(checkpoint / "away.pt")
    again = run_of("transformers", tmp_path / "again", "gamma-simpo")
    with pytest.warns(UserWarning, match="preference_loss.pt: not found, the statistics start"):
        again.train(resume_from_checkpoint=str(checkpoint))
    log = outcome(again)["log"]
    assert wanted["log"][:6] == log[:6] and wanted["log"][6] != log[6]
    other = run_of("transformers", tmp_path / "alpha", "alpha-dpo")
    with pytest.raises(
        ValueError, match=r"got the statistics of another loss, needs those of alpha-dpo, beta="
    ):
        other.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
