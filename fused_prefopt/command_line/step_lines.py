"""A training on a terminal: one short line a step, while the whole log goes to the files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Name in the line → what the trainer logged, and its format.
_COLUMNS = {
    "loss": ("loss", "7.4f"),
    "accuracy": ("rewards/accuracies", "5.3f"),
    "margin": ("rewards/margins", "8.4f"),
}
_LEARNING_RATE, _BAD = "learning_rate", "nonfinite"
_EVALUATED = "eval_"


def step_line(logs: Mapping[str, Any], step: int) -> str:
    """A trainer's log as a line: of a training step, an evaluation or the end.

    Args:
        logs: what the trainer logs; anything else than those three is returned as it is.
        step: the optimizer's.
    """
    if "train_runtime" in logs:
        return f"trained to step {step} in {logs['train_runtime']:.1f} s"
    of_evaluation = f"{_EVALUATED}loss" in logs
    if not of_evaluation and "loss" not in logs:
        return str(dict(logs))
    prefix = _EVALUATED if of_evaluation else ""
    words = ["held out " if of_evaluation else f"step {step:4d}"]
    for name, (metric, layout) in _COLUMNS.items():
        if prefix + metric in logs:
            words.append(f"{name} {float(logs[prefix + metric]):{layout}}")
    if _LEARNING_RATE in logs:
        words.append(f"lr {float(logs[_LEARNING_RATE]):.2e}")
    if logs.get(_BAD):
        words.append(f"{_BAD} {logs[_BAD]:g}")
    return "  ".join(words)


def shorten_step_lines(trainer: Any) -> None:
    """Let a trainer print `step_line` instead of all that it logs.

    Args:
        trainer: `transformers.Trainer`; it keeps its progress bar.
    """
    from tqdm.auto import tqdm
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    class StepLines(TrainerCallback):
        """Prints each log as a line, above the bar."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if state.is_world_process_zero and logs:
                tqdm.write(step_line(logs, state.global_step))

    class Bar(ProgressCallback):
        """The progress bar without the log."""

        def on_log(self, *_: Any, **__: Any) -> None:
            pass

    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Bar)
    trainer.add_callback(StepLines)
