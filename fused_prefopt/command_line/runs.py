"""Finished or running trainings, read from the folders they write."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_prefopt.command_line.errors import UserError, blaming

STATE = "trainer_state.json"
EVALUATION = "evaluation.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


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


def _read(path: Path, name: str) -> Run:
    state = _state(path)
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


def _state(path: Path) -> Path:
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
