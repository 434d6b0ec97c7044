"""The part of docs/benchmarks.md on whole trainer steps, and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Row
from benchmarks.tables import number, origin, spread, table
from benchmarks.trainer_candidates import TRAINERS

PICTURE = "trainer.png"
_INTRODUCTION = """\
Forward, backward and SGD update of a batch of random pairs, half of each sequence its answer, by
each trainer as a user builds it, on a random model of Qwen2.5-0.5B's width and vocabulary with
reference log-probs that are known. `all` trains every parameter, `adapter` LoRA beside a frozen
head. Brackets hold quartiles over interleaved rounds after a first step that is not timed; *of
eager's* is the time in the same round. The peak is what the step takes beyond model and batch, its
gradients among it; on a CPU it is the resident memory of a process of its own. Each step's loss and
gradient norm are compared with the eager trainer's: *distance* is the larger relative one."""


def trainer_section(content: Mapping[str, Any], machine: str) -> list[str]:
    """The paragraphs about one machine's file."""
    title = f"## A whole trainer step, {machine}"
    return [title, _INTRODUCTION, "Measured on " + origin(content), trainer_table(content["rows"])]


def trainer_table(rows: Sequence[Row]) -> str:
    """A line for each trainer and setup, in the order in which they were measured."""
    header = (
        "trainer",
        "trains",
        "model",
        "batch",
        "dtype",
        "ms",
        "of eager's",
        "peak MiB",
        "gradients MiB",
        "loss",
        "gradient norm",
        "distance",
    )
    return table(header, [_line(row) for row in rows], left=5)


def _line(row: Row) -> list[str]:
    model = f"{row['layers']} layers"
    batch = f"{row['sequences']} × {row['length']}"
    about = [row["candidate"], row["trains"], model, batch, row["dtype"]]
    if row["status"] != "ok":
        return [*about, row["status"], *[""] * 6]
    without = {"ok": "", "not measured": ""}.get(row["memory_status"], row["memory_status"])
    return [
        *about,
        spread(row, "ms", ".0f"),
        spread(row, "of_eager", ".2f"),
        without or _mib(row["extra_bytes"]),
        _mib(row["gradient_bytes"]),
        number(row["loss"], ".5f"),
        number(row["gradient_norm"], ".4g"),
        number(row["distance"], ".1e"),
    ]


def _mib(size: int | None) -> str:
    return number(None if size is None else size / 2**20, ".0f")


def draw_trainer(rows: Sequence[Row], path: Path) -> None:
    """Bars of the time and of the peak memory, a colour for what trains."""
    from benchmarks.pictures import FAINT, OURS, STYLE, pyplot, save

    panels = {"ms": ("s a step", 1e3), "extra_bytes": ("GiB of a step's peak", 2**30)}
    colours = {"all": OURS, "adapter": "#d1782f"}
    names = list(TRAINERS)
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(9.5, 3.2), sharey=True)
        for panel, (field, (title, unit)) in zip(axes, panels.items(), strict=True):
            for place, (trains, colour) in enumerate(colours.items()):
                shown = [row for row in rows if row["trains"] == trains and row[field] is not None]
                panel.barh(
                    [names.index(row["candidate"]) + 0.36 * (place - 0.5) for row in shown],
                    [row[field] / unit for row in shown],
                    height=0.34,
                    color=colour,
                    label=f"{trains} trained",
                )
            layers = {row["layers"] for row in rows if row[field] is not None}
            panel.set_title(" and ".join(f"{count} layers" for count in sorted(layers)))
            panel.set_xlabel(title)
            panel.grid(axis="x", color=FAINT)
            panel.tick_params(axis="y", length=0)
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper right", ncols=2, frameon=False)
        save(figure, path, top=0.92)
