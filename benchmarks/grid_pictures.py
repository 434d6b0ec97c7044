"""The pictures of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.pictures import FAINT, LINES, STYLE, pyplot, save, thousands
from benchmarks.results import Row

_COMPARED = ("ours: local", "ours: recompute", "TRL")


def draw_shares(rows: Sequence[Row], path: Path) -> None:
    """Speedup over eager, and time in P with its quartiles, over the share of labelled tokens."""
    panels: dict[str, Callable[[Row, Row], tuple[float, ...]]] = {
        "times as fast as eager": lambda row, eager: (eager["ms"] / row["ms"],),
        "time of a step, in P": lambda row, _: (row["in_p"], *row["in_p_quartiles"]),
    }
    _draw_lines(rows, path, "labelled tokens", _share, "{:.0%}".format, panels)


def draw_rows(rows: Sequence[Row], path: Path) -> None:
    """Time in P with its quartiles over the labelled rows."""
    panels: dict[str, Callable[[Row, Row], tuple[float, ...]]] = {
        "time of a step, in P": lambda row, _: (row["in_p"], *row["in_p_quartiles"]),
    }
    _draw_lines(
        rows,
        path,
        "labelled rows",
        lambda row: row["labelled_rows"],
        lambda tick: thousands(int(tick)),
        panels,
    )


def _draw_lines(
    rows: Sequence[Row],
    path: Path,
    label: str,
    place: Callable[[Row], float],
    shown: Callable[[float], str],
    panels: Mapping[str, Callable[[Row, Row], tuple[float, ...]]],
) -> None:
    good = [row for row in rows if row["status"] == "ok" and row["in_p"] is not None]
    eager = {place(row): row for row in good if row["candidate"] == "eager"}
    with pyplot.rc_context(STYLE):
        width = 4.8 * len(panels)
        figure, axes = pyplot.subplots(1, len(panels), figsize=(width, 3.8), squeeze=False)
        for panel, (title, value) in zip(axes[0], panels.items(), strict=True):
            for name in _compared(good):
                mine = sorted((row for row in good if row["candidate"] == name), key=place)
                mine = [row for row in mine if place(row) in eager or not eager]
                places = [place(row) for row in mine]
                values = [value(row, eager.get(place(row), row)) for row in mine]
                colour, line, marker = LINES.get(name, LINES[_alias(name)])
                style = {"color": colour, "linestyle": line, "marker": marker, "label": name}
                middle = [entry[0] for entry in values]
                spread = None
                if values and len(values[0]) == 3:
                    spread = [
                        [max(0.0, entry[0] - entry[1]) for entry in values],
                        [max(0.0, entry[2] - entry[0]) for entry in values],
                    ]
                panel.errorbar(places, middle, yerr=spread, capsize=3, markersize=4, **style)
                panel.set_xticks(places, [shown(tick) for tick in places])
            panel.set_xlabel(label)
            panel.set_ylabel(title)
            panel.set_ylim(bottom=0)
            panel.grid(color=FAINT)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
        save(figure, path, top=0.92)


def _compared(rows: Sequence[Row]) -> list[str]:
    """Ours that train the head, and TRL, in the order in which they stand."""
    names = dict.fromkeys(row["candidate"] for row in rows)
    return [name for name in names if name.split(",")[0] in _COMPARED and "torch" not in name]


def _alias(name: str) -> str:
    """Whose line a path of ours is drawn with."""
    return "ours: auto" if name.startswith("ours: local") else "ours: recompute"


def _share(row: Row) -> float:
    return row["labelled_rows"] / (row["sequences"] * row["length"])
