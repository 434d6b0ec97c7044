"""Trainings in the folders that they write: read for a report, or found to go on from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_prefopt.cli.config import Config
from fused_prefopt.cli.console import UserError, blaming

STATE = "trainer_state.json"
EVALUATION = "evaluation.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Of an epoch: it is a quotient of batches.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: what tells it from the others, the end of its path.
        folder: it was read from.
        history: what the trainer logged, `log_history` of transformers and TRL alike.
        held_out: numbers on held-out pairs, where the run was judged on some.
    """

    name: str
    folder: Path
    history: list[dict[str, float]]
    held_out: dict[str, float]

    def last(self, metric: str) -> float | None:
        """The last logged value of a metric, or None where it never was."""
        found = (row[metric] for row in reversed(self.history) if metric in row)
        return next(found, None)


@dataclass(frozen=True)
class Beginning:
    """What an output folder holds of an earlier run.

    Attributes:
        checkpoint: to go on from; None is the start.
        is_trained: no step is left after it.
        finished: the step at which a run ended that wrote everything, or None.
    """

    checkpoint: Path | None = None
    is_trained: bool = False
    finished: int | None = None


def read_runs(paths: Sequence[str]) -> list[Run]:
    """The runs of some folders, in their order.

    Args:
        paths: folders with a `trainer_state.json`, or with checkpoints that have one (the newest
            counts), or such files themselves; of `fused-prefopt train`, of transformers' trainer
            or of TRL's.

    Raises:
        UserError: a path is named twice, or there is no such file, or it holds no log.
    """
    folders = [Path(path).resolve() for path in paths]
    for path, folder in zip(paths, folders, strict=True):
        if folders.count(folder) > 1:
            raise UserError(f"{path}: got the same run twice, needs different ones")
    names = _names([folder.parent if folder.is_file() else folder for folder in folders])
    return [_read(Path(path), name) for path, name in zip(paths, names, strict=True)]


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of a trainer's output folder with the most steps, if there is any.

    The trainer writes its state last: a folder without it is what a killed run left half-written.
    """
    found = [
        each
        for each in folder.glob("checkpoint-*")
        if _CHECKPOINT.fullmatch(each.name) and (each / STATE).is_file()
    ]
    return max(found, key=lambda each: int(each.name.partition("-")[2]), default=None)


def find_beginning(config: Config, resume: bool) -> Beginning:
    """Where to begin a training.

    Args:
        config: names the folder and how far to train.
        resume: an earlier run is to be continued.

    Raises:
        UserError: there is an earlier run and it is not to be continued, or one that ended before
            what is asked for now and left no checkpoint to go on from.
    """
    folder, ended = config.folder, _written(config.folder)
    checkpoint = newest_checkpoint(folder)
    if not resume:
        if checkpoint is not None or ended is not None:
            left = "checkpoints of an earlier run" if checkpoint else "an earlier run that ended"
            raise UserError(f"output_dir: {folder} has {left}, needs --resume or another folder")
        return Beginning()
    if ended is not None and _is_trained(ended, config.training):
        return Beginning(finished=int(ended["global_step"]))
    if checkpoint is None:
        if ended is not None:
            raise UserError(
                f"output_dir: {folder} has a run that ended at step {ended.get('global_step')} and"
                " left no checkpoint to go on from, needs another folder"
            )
        return Beginning()
    kept = _written(checkpoint)
    return Beginning(checkpoint, kept is not None and _is_trained(kept, config.training))


def load_trained(trainer: Any, checkpoint: Path) -> None:
    """Put the trainer where it was when it wrote the last checkpoint of its training.

    Args:
        trainer: `transformers.Trainer`; its arguments are as before afterwards.
        checkpoint: after which no step is left.
    """
    from transformers import PrinterCallback, ProgressCallback

    training = trainer.args
    asked = {name: getattr(training, name) for name in ("max_steps", "num_train_epochs")}
    planned = _written(checkpoint) or {}
    # With no epoch to train the trainer loads everything, in whatever way it is sharded; it would
    # otherwise train at least one step.
    training.max_steps, training.num_train_epochs = -1, 0
    # At its end it logs a mean loss, which of no steps is 0.
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    finally:
        for name, value in asked.items():
            setattr(training, name, value)
    for name in (*asked, "log_history"):
        setattr(trainer.state, name, planned[name])


def how_to_continue(config: Config) -> str:
    """What to say to whoever finds a training ended early."""
    checkpoint = newest_checkpoint(config.folder)
    if checkpoint is None:
        return "no checkpoint was saved yet"
    return f"continue with --resume, from {checkpoint}"


def _read(path: Path, name: str) -> Run:
    state = _state_file(path)
    with blaming(str(state)):
        history = json.loads(state.read_text(encoding="utf-8")).get("log_history")
    if not isinstance(history, list) or not any("loss" in row for row in history):
        raise UserError(f"{state}: got no logged steps, needs a `log_history` with losses")
    folder = path.parent if path.is_file() else path
    judged = folder / EVALUATION
    held_out: dict[str, Any] = {}
    if judged.is_file():
        with blaming(str(judged)):
            held_out = json.loads(judged.read_text(encoding="utf-8"))["trained"]
    return Run(name, folder, history, held_out)


def _state_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder")
    if (path / STATE).is_file():
        return path / STATE
    checkpoint = newest_checkpoint(path)
    if checkpoint is None:
        raise UserError(f"{path}: got no {STATE}, needs the output folder of a training")
    return checkpoint / STATE


def _names(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that differ from one another."""
    most = max(len(folder.parts) for folder in folders)
    for size in range(1, most + 1):
        names = [os.path.join(*folder.parts[-size:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _written(folder: Path) -> dict[str, Any] | None:
    """The trainer's state in a folder; None where there is none, or half of one."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise UserError(f"output_dir: {error}") from error
    return state if isinstance(state, dict) and "global_step" in state else None


def _is_trained(state: dict[str, Any], training: Any) -> bool:
    """Whether a run has come as far as the arguments ask for."""
    if training.max_steps > 0:
        return bool(state["global_step"] >= training.max_steps)
    return bool((state.get("epoch") or 0) >= training.num_train_epochs - _ROUNDING)
