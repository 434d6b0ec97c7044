"""What the experiments' pictures share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fused_prefopt.report import legends_below
from paper_claims.intervals import interval


def panels(columns: int) -> tuple[Figure, Sequence[Any]]:
    """A figure with panels side by side."""
    figure = Figure(figsize=(1 + 4 * columns, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def curve(
    axis: Any, x: Sequence[float], values: Sequence[Sequence[float]], label: str, **style: Any
) -> None:
    """Means with their 95 % intervals; `values` holds one list over the seeds for each x."""
    found = [interval(each) for each in values]
    means = [each.mean for each in found]
    errors = [each.high - each.mean for each in found]
    axis.errorbar(x, means, yerr=errors, label=label, marker="o", capsize=3, **style)


def bars(axis: Any, names: Sequence[str], values: Sequence[Sequence[float]]) -> None:
    """Horizontal means with their 95 % intervals, first name on top."""
    found = [interval(each) for each in values]
    errors = [each.high - each.mean for each in found]
    axis.errorbar([each.mean for each in found], range(len(names)), xerr=errors, fmt="o", capsize=3)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)


def save(figure: Figure, path: Path) -> None:
    """Write the PNG, with legends below what they explain."""
    legends_below(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
