"""`train` on folders that have a run: finished, interrupted, stopped, killed before its end."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line_jobs import log_of, pairs, write_job, write_lines
from transformers import LlamaModel

from fused_prefopt.cli import train
from fused_prefopt.cli.main import main
from fused_prefopt.cli.runs import newest_checkpoint, read_runs
from fused_prefopt.integrations import transformers as integration

pytest.importorskip("datasets")
# 16 pairs by 4 are four steps an epoch: two of them end within the first.
KEYS = {"loss": "gamma-simpo", "loss_kwargs": {"gamma": 0.5}, "save_strategy": "steps"}
KEYS |= {"save_steps": 1}
WEIGHTS, STATE, LOSS = "model.safetensors", "trainer_state.json", "preference_loss.pt"


class Killed(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture(scope="module")
def trained(material, tmp_path_factory):
    """Trains with `KEYS` and more in a folder of its own; returns the output folder."""

    def run(**keys) -> Path:
        folder = tmp_path_factory.mktemp("trained")
        assert main(["train", write_job(material, folder, **KEYS | keys), "--resume"]) == 0
        return folder / "run"

    return run


@pytest.fixture(scope="module")
def two_steps(trained) -> Path:
    """A run that has ended after two steps."""
    return trained()


@pytest.fixture(scope="module")
def six_steps(trained) -> Path:
    """A run that has ended in the middle of its second epoch."""
    return trained(max_steps=6, save_steps=2)


@pytest.fixture
def finished(two_steps, tmp_path) -> Path:
    """A copy of the two steps, where jobs write."""
    return shutil.copytree(two_steps, tmp_path / "run")


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder: when it was written and what is in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def without_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def assert_same_run(one: Path, other: Path) -> None:
    """Bit-equal weights, statistics and logs."""
    assert (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
    states = [torch.load(each / LOSS, weights_only=True) for each in (one, other)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0, equal_nan=True)
    assert states[0]["statistics.margins"].isfinite().any()
    assert [row["loss"] for row in log_of(one)] == [row["loss"] for row in log_of(other)]


def assert_unfinished(folder: Path) -> None:
    for name in (WEIGHTS, "evaluation.json", STATE, LOSS):
        assert not (folder / name).exists(), name


@pytest.mark.parametrize("saving", ["steps", "no"])
def test_a_finished_run_is_left_as_it_is(job, finished, capsys, saving):
    if saving == "no":
        without_checkpoints(finished)
    before = contents(finished)
    for far in ({}, {"max_steps": 1}, {"max_steps": -1, "num_train_epochs": 0.5}):
        capsys.readouterr()
        assert job("train", "--resume", **KEYS | far | {"save_strategy": saving}) == 0
        assert capsys.readouterr().out == "already finished at step 2\n"
    left = "checkpoints of an earlier run" if saving == "steps" else "an earlier run that ended"
    assert job("train", **KEYS) == 2
    said = f"output_dir: {finished} has {left}, needs --resume or another folder"
    assert capsys.readouterr().err.splitlines()[-1] == f"fused-prefopt: {said}"
    if saving == "no":
        assert job("train", "--resume", **KEYS | {"max_steps": 3}) == 2
        said = "has a run that ended at step 2 and left no checkpoint to go on from, needs another"
        assert said in capsys.readouterr().err
    assert contents(finished) == before


@pytest.mark.parametrize("then", [{"max_steps": 6}, {"max_steps": -1, "num_train_epochs": 1.5}])
def test_a_finished_run_goes_on_where_more_is_asked_for(job, finished, six_steps, capsys, then):
    # What a run leaves that is killed while it writes a checkpoint.
    (finished / "checkpoint-3").mkdir()
    (finished / "checkpoint-3" / WEIGHTS).write_bytes(b"half")
    assert job("train", "--resume", **KEYS | then) == 0
    assert f"resuming from {finished / 'checkpoint-2'}" in capsys.readouterr().out
    assert_same_run(finished, six_steps)


def test_an_epoch_goes_on_in_the_next(job, trained, six_steps, tmp_path, capsys):
    first = trained(max_steps=-1, num_train_epochs=1)
    assert "resuming no checkpoint, from the start" in capsys.readouterr().out
    shutil.copytree(first, tmp_path / "run")
    then = {"max_steps": -1, "num_train_epochs": 1.5}
    assert job("train", "--resume", **KEYS | then) == 0
    assert_same_run(tmp_path / "run", six_steps)


@pytest.mark.parametrize(
    ("far", "more"),
    [
        ({"max_steps": 2}, {"peft": {"r": 2, "target_modules": ["q_proj"]}}),
        ({"max_steps": -1, "num_train_epochs": 1}, {"pictures": True}),
    ],
)
def test_a_run_killed_before_its_end_is_ended_without_a_step(
    job, material, tmp_path, monkeypatch, far, more
):
    pytest.importorskip("matplotlib")
    pytest.importorskip("peft")
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    keys = KEYS | far | more | {"lr_scheduler_type": "cosine"}
    keys |= {"held_out": str(material / "held_out.jsonl")}
    assert job("train", f"output_dir={whole}", **keys) == 0

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        ended = train._train
        patch.setattr(train, "_train", lambda *given: ended(*given) or kill())
        with pytest.raises(Killed):
            job("train", f"output_dir={killed}", **keys)
    assert not (killed / STATE).exists()
    with monkeypatch.context() as patch:
        patch.setattr(integration.PreferenceTrainer, "training_step", kill)
        assert job("train", f"output_dir={killed}", "--resume", **keys) == 0
    files = ["adapter_model.safetensors" if "peft" in keys else WEIGHTS, "evaluation.json"]
    if "pictures" in more:
        files += ["report/table.json", "report/rewards.png"]
    for file in files:
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
    states = [torch.load(each / LOSS, weights_only=True) for each in (whole, killed)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0, equal_nan=True)
    assert states[0]["statistics.margins"].isfinite().any()
    read = [json.loads((each / STATE).read_text()) for each in (whole, killed)]
    for key in ("global_step", "max_steps", "num_train_epochs", "epoch"):
        assert read[0][key] == read[1][key], key
    assert log_of(whole) == log_of(killed)
    arguments = [
        torch.load(each / "training_args.bin", weights_only=False) for each in (whole, killed)
    ]
    for key in ("max_steps", "num_train_epochs"):
        assert getattr(arguments[0], key) == getattr(arguments[1], key)


def test_half_a_state_is_no_finished_run(job, finished, two_steps):
    state = finished / STATE
    state.write_text(state.read_text()[:-20])
    assert job("train", "--resume", **KEYS) == 0
    assert json.loads(state.read_text())["global_step"] == 2
    assert (finished / WEIGHTS).read_bytes() == (two_steps / WEIGHTS).read_bytes()


@pytest.fixture
def trainer_of(monkeypatch):
    """Makes training end with an error after some steps; returns what `on_nonfinite` was given."""

    def make(error: BaseException, after: int) -> list[str]:
        given: list[str] = []

        class Ending(integration.PreferenceTrainer):
            def __init__(self, *args, on_nonfinite, **kwargs):
                given.append(on_nonfinite)
                super().__init__(*args, **kwargs)

            def training_step(self, *args, **kwargs):
                if self.state.global_step == after:
                    raise error
                return super().training_step(*args, **kwargs)

        monkeypatch.setattr(integration, "PreferenceTrainer", Ending)
        return given

    return make


@pytest.mark.parametrize("choice", [None, "stop", "skip", "ignore"])
def test_a_loss_that_is_not_finite_stops_with_status_1(job, tmp_path, capsys, trainer_of, choice):
    given = trainer_of(FloatingPointError("step 2: the loss is nan"), after=1)
    assert job("train", **KEYS | ({} if choice is None else {"on_nonfinite": choice})) == 1
    assert given == [choice or "stop"]
    kept = tmp_path / "run" / "checkpoint-1"
    said = capsys.readouterr().err
    assert "Traceback" not in said
    wanted = f"step 2: the loss is nan; continue with --resume, from {kept}"
    assert said.splitlines()[-1] == f"fused-prefopt: {wanted}"
    assert (kept / STATE).is_file() and not (tmp_path / "run" / "checkpoint-2").exists()
    assert_unfinished(tmp_path / "run")


@pytest.mark.parametrize(("after", "saving"), [(1, "steps"), (0, "steps"), (1, "no")])
def test_an_interrupt_says_where_to_go_on(job, tmp_path, capsys, trainer_of, after, saving):
    trainer_of(KeyboardInterrupt(), after=after)
    assert job("train", **KEYS | {"save_strategy": saving}) == 130
    saved = after and saving == "steps"
    where = f"continue with --resume, from {tmp_path / 'run' / 'checkpoint-1'}"
    wanted = where if saved else "no checkpoint was saved yet"
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"fused-prefopt: interrupted at step {after}; {wanted}"
    assert_unfinished(tmp_path / "run")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """The handler of SIGINT that a program starts with; a test runner may have put its own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_in_training_ends_it_and_the_run_goes_on_bit_equal(
    job, six_steps, tmp_path, monkeypatch, capsys, interruptible
):
    step = integration.PreferenceTrainer.training_step

    def signalled(self, *args, **kwargs):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    keys = KEYS | {"max_steps": 6, "save_steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr(integration.PreferenceTrainer, "training_step", signalled)
        assert job("train", **keys) == 130
    said = capsys.readouterr().err
    wanted = f"interrupted at step 2; continue with --resume, from {tmp_path}/run/checkpoint-2"
    assert said.splitlines()[-1] == f"fused-prefopt: {wanted}" and "Traceback" not in said
    assert job("train", "--resume", **keys) == 0
    assert_same_run(tmp_path / "run", six_steps)


def test_a_signal_in_the_reference_pass_keeps_what_is_computed(
    job, tmp_path, monkeypatch, capsys, interruptible
):
    # One forward pass a pair; every 16 of them are written to the cache.
    keys = {"dataset": write_lines(tmp_path / "pairs.jsonl", pairs(20)), "reference_batch_size": 1}
    calls, forward = [], LlamaModel.forward

    def counted(*given, **more):
        if not torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == 18:
                os.kill(os.getpid(), signal.SIGINT)
        return forward(*given, **more)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    assert job("train", **keys) == 130
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == "fused-prefopt: interrupted" and "Traceback" not in said
    assert_unfinished(tmp_path / "run")
    calls[:] = [0] * 20
    assert job("train", **keys) == 0 and len(calls) == 24
    assert job("train", f"output_dir={tmp_path / 'whole'}", **keys) == 0 and len(calls) == 44
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")


def test_the_newest_checkpoint_has_the_most_steps(six_steps, tmp_path):
    newest = newest_checkpoint(six_steps)
    assert newest is not None and newest.name == "checkpoint-6"
    assert newest_checkpoint(tmp_path) is None


def test_names_are_the_shortest_ends_that_differ(tmp_path):
    for name in ("a/seed-0", "b/seed-0"):
        (tmp_path / name).mkdir(parents=True)
        text = json.dumps({"log_history": [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]})
        (tmp_path / name / STATE).write_text(text)
    found = read_runs([str(tmp_path / "a/seed-0"), str(tmp_path / "b/seed-0" / STATE)])
    assert [run.name for run in found] == ["a/seed-0", "b/seed-0"]
    assert [run.last("loss") for run in found] == [0.25, 0.25] and found[0].last("no") is None
