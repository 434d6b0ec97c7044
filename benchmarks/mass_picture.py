"""The picture of docs/drop_mass.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.mass_study import DROPS
from benchmarks.pictures import FAINT, OURS, STYLE, pyplot, save
from fused_prefopt.ops.dropped_mass import PART
from fused_prefopt.report import legends_below


def draw_masses(content: Mapping[str, Any], path: Path) -> None:
    """Error over share kept, and time over ε."""
    with pyplot.rc_context(STYLE):
        figure, (errors, times) = pyplot.subplots(1, 2, figsize=(9.5, 3.8))
        _draw_panels(content, errors, times)
        legends_below(figure)
        save(figure, path)


def _draw_panels(content: Mapping[str, Any], errors: Any, times: Any) -> None:
    colours = {"held-out": OURS, "seen": "#d1782f"}
    for text, colour in colours.items():
        rows = [
            row for row in content["rows"] if row["order"] == "frequency" and row["text"] == text
        ]
        ours = [r for r in rows if r["method"] == "drop_mass" and r["part"] == PART]
        filters = [r for r in rows if r["method"] == "filter, rows by target"]
        for found, line, marker, name in (
            (ours, "-", "o", f"drop_mass, {text} text"),
            (filters, ":", "^", f"filter by tiles, {text} text"),
        ):
            shares = [row["kept"] for row in found]
            errors.plot(
                shares,
                [row["hidden_error"] for row in found],
                line,
                marker=marker,
                color=colour,
                label=name,
                markersize=4,
            )
        for order, line in (("frequency", "-"), ("tokenizer", "--")):
            chosen = [
                row
                for row in content["times"]
                if (row["path"], row["order"], row["text"]) == ("recompute", order, text)
            ]
            drops = [row["drop_mass"] or DROPS[0] / 4 for row in chosen]
            label = f"{text} text, {order} order"
            in_p = [row["in_p"] for row in chosen]
            times.plot(drops, in_p, line, marker="o", color=colour, label=label, markersize=4)
    errors.set_yscale("log")
    errors.set_title("Error at equal work")
    errors.set_xlabel("share of (row, part) or tiles kept")
    errors.set_ylabel("relative error of d hidden")
    times.set_xscale("log")
    times.set_title("Time of a step (recompute)")
    times.set_xlabel("ε (leftmost: exact)")
    times.set_ylabel("P")
    times.set_ylim(bottom=0)
    for panel in (errors, times):
        panel.grid(color=FAINT)
