"""The pictures of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, ticker  # noqa: E402

from benchmarks.peers import CANDIDATES, IN_SWEEP  # noqa: E402
from benchmarks.results import Row  # noqa: E402

OURS, _PEER, FAINT = "#0b6e99", "#9aa5ad", "#d7dce0"
LINES = {
    "ours: auto": (OURS, "-", "o"),
    "ours: recompute": ("#56b4d3", "--", "s"),
    "TRL": ("#d1782f", "-", "^"),
    "eager": ("#6b6b6b", "-", "D"),
}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}


def draw_all(results: Mapping[str, Any], folder: Path) -> None:
    """Draw time.png, error.png and sweep.png into the folder."""
    heads = {name: results[f"head-{name}"]["rows"] for name in ("fp32", "bf16")}
    with pyplot.rc_context(STYLE):
        draw_time(heads, folder / "time.png")
        draw_error(heads, folder / "error.png")
        draw_sweep(results["sweep"]["rows"], folder / "sweep.png")


def draw_time(heads: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Bars of time in P, a panel per dtype."""
    figure, panels = pyplot.subplots(1, len(heads), figsize=(9.5, 4.2), sharey=True)
    for panel, (dtype, rows) in zip(panels, heads.items(), strict=True):
        rows = _in_order(rows)
        names = [row["candidate"] for row in rows]
        values = [row["in_p"] or 0.0 for row in rows]
        colours = [OURS if CANDIDATES[row["candidate"]].ours else _PEER for row in rows]
        panel.barh(names, values, color=colours, height=0.7)
        for place, row in enumerate(rows):
            text = "no figure" if row["in_p"] is None else f"{row['in_p']:.1f}"
            panel.annotate(
                text, (values[place], place), (3, 0), textcoords="offset points", va="center"
            )
        panel.set_title(dtype)
        panel.set_xlabel("time of a step, in P")
        panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        panel.set_xlim(0, max(values, default=1.0) * 1.12 or 1.0)
        panel.grid(axis="x", color=FAINT)
        panel.tick_params(axis="y", length=0)
    panels[0].invert_yaxis()
    save(figure, path)


def draw_error(heads: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Dots of the errors against float64, a panel per kind of error."""
    kinds = {
        "logp_error": "largest error of a sequence's log-prob, in nats",
        "dhidden_error": "relative error of hidden's gradient",
        "dweight_error": "relative error of the weight's gradient",
    }
    figure, panels = pyplot.subplots(1, len(kinds), figsize=(11.5, 4.2), sharey=True)
    markers = {"fp32": "o", "bf16": "D"}
    for panel, (field, title) in zip(panels, kinds.items(), strict=True):
        for dtype, rows in heads.items():
            rows = _in_order(rows)
            found = [(place, row) for place, row in enumerate(rows) if row[field]]
            panel.scatter(
                [row[field] for _, row in found],
                [place for place, _ in found],
                c=[OURS if CANDIDATES[row["candidate"]].ours else _PEER for _, row in found],
                marker=markers[dtype],
                s=28,
            )
            panel.scatter([], [], c="#444444", marker=markers[dtype], s=28, label=dtype)
        panel.set_xscale("log")
        panel.set_xlabel(title)
        panel.set_yticks(range(len(rows)), [row["candidate"] for row in rows])
        panel.tick_params(axis="y", length=0)
        panel.grid(color=FAINT)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=2, frameon=False)
    save(figure, path, top=0.94)


def draw_sweep(rows: Sequence[Row], path: Path) -> None:
    """Extra peak memory over V and over T."""
    axes = {"vocab": "vocabulary V", "length": "sequence length T"}
    figure, panels = pyplot.subplots(1, len(axes), figsize=(9.5, 3.8), sharey=True)
    for panel, (axis, title) in zip(panels, axes.items(), strict=True):
        ticks = sorted({row[axis] for row in rows if row["axis"] == axis})
        for name in IN_SWEEP:
            mine = [row for row in rows if row["axis"] == axis and row["candidate"] == name]
            mine = [row for row in mine if row["extra_bytes"] is not None]
            mine.sort(key=itemgetter(axis))
            colour, line, marker = LINES[name]
            panel.plot(
                [row[axis] for row in mine],
                [max(row["extra_bytes"] / 2**20, 1.0) for row in mine],
                color=colour,
                linestyle=line,
                marker=marker,
                markersize=4,
                label=name,
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(ticks, [thousands(tick) for tick in ticks])
        panel.minorticks_off()
        panel.set_xlabel(title)
        panel.grid(color=FAINT)
    panels[0].set_ylabel("extra peak memory, MiB")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    save(figure, path, top=0.93)


def _in_order(rows: Sequence[Row]) -> list[Row]:
    known = list(CANDIDATES)
    return sorted(rows, key=lambda row: known.index(row["candidate"]))


def thousands(value: int) -> str:
    return f"{value // 1000}k" if value % 1000 == 0 else str(value)


def save(figure: Any, path: Path, top: float = 1.0) -> None:
    figure.tight_layout(rect=(0, 0, 1, top))
    # No software version in the file: the same figures give the same bytes.
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
