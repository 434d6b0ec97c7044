"""`report`: pictures and a table of one training, or of several beside each other."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from fused_prefopt.cli.console import require_packages, text_table
from fused_prefopt.cli.runs import Run, read_runs
from fused_prefopt.losses.metrics import (
    KL_CHOSEN,
    KL_REJECTED,
    LOGPS_CHOSEN,
    LOGPS_REJECTED,
    MARGIN_MEAN,
    REWARDS_ACCURACIES,
    REWARDS_MARGINS,
)

HELP = "pictures and a table of one or more trainings, of this package or of TRL"
_WRITTEN = """\
Written are table.json and a picture each of losses, accuracies, rewards, margins with
gamma-PO's target margins, KL to the reference, and log-probs, over the optimizer's steps;
dashed lines are the trainer's own evaluations. A picture nothing was logged for is left out."""
# Column → what the trainer logged, or what a run's held-out pairs gave.
_LOGGED = {
    "loss": "loss",
    "reward acc.": REWARDS_ACCURACIES,
    "reward margin": REWARDS_MARGINS,
    "target margin": MARGIN_MEAN,
    "chosen KL": KL_CHOSEN,
    "rejected KL": KL_REJECTED,
    "chosen logp": LOGPS_CHOSEN,
    "rejected logp": LOGPS_REJECTED,
}
_HELD_OUT = {"held-out acc.": "accuracy", "held-out margin": "margin", "held-out KL": "kl"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.epilog = _WRITTEN
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="output folder of a training, a checkpoint, or a trainer_state.json",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder to write to; RUN/report for one run, `comparison` beside the first of several",
    )


def run(options: argparse.Namespace) -> int:
    """Print the table and draw the pictures.

    Raises:
        UserError: a run cannot be read, or matplotlib is missing.
    """
    runs = read_runs(options.runs)
    print(runs_table(runs), flush=True)
    written = write_report(runs, options.output or _folder(runs))
    print(f"\n{', '.join(path.name for path in written)} are in {written[0].parent}")
    return 0


def runs_table(runs: list[Run]) -> str:
    """A row for each run: steps, last logged values, and what held-out pairs gave."""
    table = _numbers(runs)
    names = ("steps", *_LOGGED, *_HELD_OUT)
    columns = [name for name in names if any(name in row for row in table.values())]
    rows = [
        (name, *(f"{row[column]:.5g}" if column in row else "-" for column in columns))
        for name, row in table.items()
    ]
    return text_table(("run", *columns), rows, numbers=True)


def comparison_table(summaries: Mapping[str, Mapping[str, float]]) -> str:
    """A text table, one row per model: accuracy, margin, reward accuracy and KL.

    Args:
        summaries: model name → `PairScores.summary()`.
    """
    header = f"{'model':14}{'accuracy':>16}{'margin':>10}{'reward acc.':>13}{'KL/token':>10}"
    rows = []
    for name, row in summaries.items():
        rewarded = f"{row['reward_accuracy']:.3f}" if "reward_accuracy" in row else "-"
        accuracy = f"{row['accuracy']:.3f} ± {row['accuracy_stderr']:.3f}"
        rows.append(
            f"{name:14}{accuracy:>16}{row['margin']:>10.3f}{rewarded:>13}{row['kl']:>10.4f}"
        )
    return "\n".join([header, "-" * len(header), *rows])


def write_report(runs: list[Run], folder: Path) -> list[Path]:
    """Write the table as JSON, and the pictures.

    Args:
        runs: one or more.
        folder: to write to.

    Returns:
        The files.

    Raises:
        UserError: matplotlib is missing; the table is written nevertheless.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "table.json"
    table.write_text(json.dumps(_numbers(runs), indent=1) + "\n", encoding="utf-8")
    require_packages("drawing", "matplotlib")
    from fused_prefopt.cli.pictures import plot_histories

    return [table, *plot_histories({run.name: run.history for run in runs}, folder)]


def _numbers(runs: list[Run]) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = {}
    for each in runs:
        row = {"steps": each.last("step")}
        row |= {column: each.last(metric) for column, metric in _LOGGED.items()}
        row |= {column: each.held_out.get(name) for column, name in _HELD_OUT.items()}
        table[each.name] = {column: value for column, value in row.items() if value is not None}
    return table


def _folder(runs: list[Run]) -> Path:
    first = runs[0].folder
    return first / "report" if len(runs) == 1 else first.parent / "comparison"
