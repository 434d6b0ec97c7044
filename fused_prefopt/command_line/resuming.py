"""Where a training begins: at the start, from a checkpoint, or nowhere, as it has ended already."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_prefopt.command_line.config_file import Config
from fused_prefopt.command_line.errors import UserError
from fused_prefopt.command_line.runs import STATE, newest_checkpoint

# Of an epoch: it is a quotient of batches.
_ROUNDING = 1e-9


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


def find_beginning(config: Config, resume: bool) -> Beginning:
    """Where to begin a training.

    Args:
        config: names the folder and how far to train.
        resume: an earlier run is to be continued.

    Raises:
        UserError: there is an earlier run and it is not to be continued, or one that ended before
            what is asked for now and left no checkpoint to go on from.
    """
    folder, ended = config.folder, _state(config.folder)
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
    kept = _state(checkpoint)
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
    planned = _state(checkpoint) or {}
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


def _state(folder: Path) -> dict[str, Any] | None:
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
