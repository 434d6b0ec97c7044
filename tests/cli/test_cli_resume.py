"""`train` on folders that have a run: finished, interrupted, stopped, killed before its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bare_cli import ROOT
from command_line_jobs import log_of, pairs, write_lines

from fused_prefopt import reference
from fused_prefopt.command_line import train
from fused_prefopt.integrations import transformers as integration

pytest.importorskip("datasets")
pytest_plugins = ["command_line_fixtures"]
# 16 pairs by 4 are four steps an epoch: two of them end within the first.
KEYS = {"loss": "gamma-simpo", "loss_kwargs": {"gamma": 0.5}, "save_strategy": "steps"}
KEYS |= {"save_steps": 1}


class Killed(Exception):
    """Stands for whatever ends a run."""


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder: when it was written and what is in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.parametrize("far", [{}, {"max_steps": -1, "num_train_epochs": 1}])
@pytest.mark.parametrize("saving", ["steps", "no"])
def test_a_finished_run_is_left_as_it_is(job, tmp_path, capsys, far, saving):
    keys = KEYS | far | {"save_strategy": saving}
    assert job("train", **keys) == 0
    before = contents(tmp_path / "run")
    capsys.readouterr()
    assert job("train", "--resume", **keys) == 0
    assert capsys.readouterr().out == f"already finished at step {4 if far else 2}\n"
    assert contents(tmp_path / "run") == before
    assert job("train", "--resume", **keys | {"max_steps": 1}) == 0
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("saving", ["steps", "no"])
def test_a_finished_run_is_not_overwritten_unasked(job, tmp_path, capsys, saving):
    keys = KEYS | {"save_strategy": saving}
    assert job("train", **keys) == 0
    before = contents(tmp_path / "run")
    assert job("train", **keys) == 2
    left = "checkpoints of an earlier run" if saving == "steps" else "an earlier run that ended"
    said = f"output_dir: {tmp_path / 'run'} has {left}, needs --resume or another folder"
    assert capsys.readouterr().err.splitlines()[-1] == f"fused-prefopt: {said}"
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"max_steps": 2}, {"max_steps": 4}),
        ({"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 2}),
        ({"max_steps": -1, "num_train_epochs": 1}, {"max_steps": -1, "num_train_epochs": 1.5}),
    ],
)
def test_a_finished_run_goes_on_where_more_is_asked_for(job, tmp_path, first, then):
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    assert job("train", f"output_dir={whole}", **KEYS | then) == 0
    assert job("train", f"output_dir={longer}", **KEYS | first) == 0
    assert job("train", f"output_dir={longer}", "--resume", **KEYS | then) == 0
    name = "model.safetensors"
    assert (longer / name).read_bytes() == (whole / name).read_bytes()
    assert [row["loss"] for row in log_of(longer)] == [row["loss"] for row in log_of(whole)]


def test_more_of_a_run_without_checkpoints_is_refused(job, tmp_path, capsys):
    keys = KEYS | {"save_strategy": "no"}
    assert job("train", **keys) == 0
    before = contents(tmp_path / "run")
    assert job("train", "--resume", **keys | {"max_steps": 3}) == 2
    said = "has a run that ended at step 2 and left no checkpoint to go on from, needs another fol"
    assert said in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("far", [{"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 1}])
@pytest.mark.parametrize("peft", [None, {"r": 2, "target_modules": ["q_proj"]}])
def test_a_run_killed_before_its_end_is_ended_without_a_step(
    job, material, tmp_path, monkeypatch, far, peft
):
    pytest.importorskip("matplotlib")
    pytest.importorskip("peft")
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    keys = KEYS | far | {"peft": peft, "pictures": True, "lr_scheduler_type": "cosine"}
    keys |= {"held_out": str(material / "held_out.jsonl")}
    assert job("train", f"output_dir={whole}", **keys) == 0

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        ended = train._train
        patch.setattr(train, "_train", lambda *given: ended(*given) or kill())
        with pytest.raises(Killed):
            job("train", f"output_dir={killed}", **keys)
    assert not (killed / "trainer_state.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(integration.PreferenceTrainer, "training_step", kill)
        assert job("train", f"output_dir={killed}", "--resume", **keys) == 0
    name = "model.safetensors" if peft is None else "adapter_model.safetensors"
    for file in (name, "evaluation.json", "report/table.json", "report/rewards.png"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
    states = [
        torch.load(each / "preference_loss.pt", weights_only=True) for each in (whole, killed)
    ]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0, equal_nan=True)
    assert states[0]["statistics.margins"].isfinite().any()
    read = [json.loads((each / "trainer_state.json").read_text()) for each in (whole, killed)]
    for key in ("global_step", "max_steps", "num_train_epochs", "epoch"):
        assert read[0][key] == read[1][key], key
    assert log_of(whole) == log_of(killed)
    arguments = [
        torch.load(each / "training_args.bin", weights_only=False) for each in (whole, killed)
    ]
    assert arguments[0].max_steps == arguments[1].max_steps
    assert arguments[0].num_train_epochs == arguments[1].num_train_epochs


def test_half_a_state_is_no_finished_run(job, tmp_path):
    assert job("train", **KEYS) == 0
    state = tmp_path / "run" / "trainer_state.json"
    whole = (tmp_path / "run" / "model.safetensors").read_bytes()
    state.write_text(state.read_text()[:-20])
    assert job("train", "--resume", **KEYS) == 0
    assert json.loads(state.read_text())["global_step"] == 2
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == whole


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


def assert_unfinished(folder: Path) -> None:
    for name in (
        "model.safetensors",
        "evaluation.json",
        "trainer_state.json",
        "preference_loss.pt",
    ):
        assert not (folder / name).exists(), name


@pytest.mark.parametrize("choice", [None, "stop", "skip", "ignore"])
def test_a_loss_that_is_not_finite_stops_with_status_1(
    job, material, tmp_path, capsys, trainer_of, choice
):
    given = trainer_of(FloatingPointError("step 2: the loss is nan"), after=1)
    keys = KEYS | {"held_out": str(material / "held_out.jsonl")}
    assert job("train", **keys | ({} if choice is None else {"on_nonfinite": choice})) == 1
    assert given == [choice or "stop"]
    kept = tmp_path / "run" / "checkpoint-1"
    said = capsys.readouterr().err
    assert "Traceback" not in said
    wanted = f"step 2: the loss is nan; continue with --resume, from {kept}"
    assert said.splitlines()[-1] == f"fused-prefopt: {wanted}"
    assert (kept / "trainer_state.json").is_file()
    assert not (tmp_path / "run" / "checkpoint-2").exists()
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


def signalled(job, tmp_path, monkeypatch, place: str, **keys) -> subprocess.CompletedProcess[str]:
    """A training in a process of its own that gets a real SIGINT in `place`."""
    with monkeypatch.context() as patch:
        patch.setattr("command_line_fixtures.main", lambda _: 0)
        job("train", **keys)  # writes the file
    code = f"""
import os, signal, sys
from fused_prefopt.cli import main
{place}
sys.exit(main(["train", {str(tmp_path / "job.yaml")!r}]))
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env |= {"HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300
    )


_IN_TRAINING = """
from transformers import Trainer
step = Trainer.training_step
def signalled(self, *args, **kwargs):
    if self.state.global_step == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return step(self, *args, **kwargs)
Trainer.training_step = signalled
"""
_IN_REFERENCE_PASS = """
from fused_prefopt import reference
logps, calls = reference._logps, []
def signalled(*args):
    calls.append(1)
    if len(calls) == 18:
        os.kill(os.getpid(), signal.SIGINT)
    return logps(*args)
reference._logps = signalled
"""


@pytest.mark.slow
def test_a_signal_in_training_ends_it_and_the_run_goes_on_bit_equal(job, tmp_path, monkeypatch):
    keys = KEYS | {"max_steps": 4, "save_steps": 2}
    assert job("train", f"output_dir={tmp_path / 'whole'}", **keys) == 0
    done = signalled(job, tmp_path, monkeypatch, _IN_TRAINING, **keys)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    kept = tmp_path / "run" / "checkpoint-2"
    wanted = f"interrupted at step 2; continue with --resume, from {kept}"
    assert done.stderr.splitlines()[-1] == f"fused-prefopt: {wanted}"
    assert job("train", "--resume", **keys) == 0
    name = "model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_a_signal_in_the_reference_pass_keeps_what_is_computed(job, tmp_path, monkeypatch, capsys):
    # One forward pass a pair; every 16 of them are written to the cache.
    keys = {"dataset": write_lines(tmp_path / "pairs.jsonl", pairs(20)), "reference_batch_size": 1}
    done = signalled(job, tmp_path, monkeypatch, _IN_REFERENCE_PASS, **keys)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "fused-prefopt: interrupted"
    assert_unfinished(tmp_path / "run")
    calls, logps = [], reference._logps
    monkeypatch.setattr(reference, "_logps", lambda *given: calls.append(1) or logps(*given))
    assert job("train", **keys) == 0 and len(calls) == 4
    assert job("train", f"output_dir={tmp_path / 'whole'}", **keys) == 0 and len(calls) == 24
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")
