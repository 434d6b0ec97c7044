"""Pictures of preference training runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fused_prefopt.losses.metrics import (
    KL_CHOSEN,
    KL_MEAN,
    KL_REJECTED,
    LOGPS_CHOSEN,
    LOGPS_MEAN,
    LOGPS_REJECTED,
    MARGIN_MEAN,
    MARGIN_STD,
    REWARDS_ACCURACIES,
    REWARDS_CHOSEN,
    REWARDS_MARGINS,
    REWARDS_MEAN,
    REWARDS_REJECTED,
    SEQUENCE_KL_CHOSEN,
    SEQUENCE_KL_REJECTED,
)

History = Sequence[Mapping[str, float]]
# Picture → its vertical axis, and the logged metrics that it shows.
_PICTURES = {
    "loss": ("loss", ("loss",)),
    "accuracies": ("share of pairs", (REWARDS_ACCURACIES,)),
    "rewards": ("implicit reward", (REWARDS_CHOSEN, REWARDS_REJECTED, REWARDS_MEAN)),
    "margins": ("reward", (REWARDS_MARGINS, MARGIN_MEAN)),
    "kl": (
        "policy − reference, nats",
        (KL_CHOSEN, KL_REJECTED, KL_MEAN, "kl", SEQUENCE_KL_CHOSEN, SEQUENCE_KL_REJECTED),
    ),
    "logps": ("summed log-prob, nats", (LOGPS_CHOSEN, LOGPS_REJECTED, LOGPS_MEAN)),
}
_LONG_LABEL, _LEGEND_ROW = 24, 0.22  # characters; inches
_LABELS = {REWARDS_MARGINS: "reward margin", MARGIN_MEAN: "target margin γ_i, mean ± std"}


def plot_margins(before: Tensor, after: Mapping[str, Tensor], path: Path) -> None:
    """Histograms of held-out margins before and after training.

    Args:
        before: (P,) margins of the reference, in nats per token.
        after: method → (P,) margins of its model.
        path: PNG to write.
    """
    figure, axes = _figure(len(after))
    for axis, (name, margins) in zip(axes, after.items(), strict=True):
        both = before.tolist() + margins.tolist()
        span = (min(both), max(both))
        axis.hist(before.tolist(), bins=40, range=span, alpha=0.55, label="before", color="C7")
        axis.hist(margins.tolist(), bins=40, range=span, alpha=0.55, label="after", color="C0")
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(name)
        axis.set_xlabel("log-prob margin, nats per token")
    axes[0].set_ylabel("held-out pairs")
    _save(figure, path)


def plot_target_margins(
    target_margins: Mapping[str, Tensor],
    gaps: Mapping[str, Mapping[str, Tensor]],
    path: Path,
) -> None:
    """Each method's target margins against what they may follow, an axis for each of it.

    γ-PO's are a curve over the reward margin (its Figure 5), α-DPO's a line over the gap between
    policy and reference (its eq. 10); against the other one each is a cloud.

    Args:
        target_margins: method → (P,) γ_i.
        gaps: name of a quantity → method → (P,) its values.
        path: PNG to write.
    """
    figure, axes = _figure(len(gaps))
    for axis, (quantity, values) in zip(axes, gaps.items(), strict=True):
        for name, margins in target_margins.items():
            axis.scatter(values[name].tolist(), margins.tolist(), s=12, alpha=0.6, label=name)
        axis.set_xlabel(quantity)
    axes[0].set_ylabel("target margin γ_i")
    _save(figure, path)


def plot_rewards(histories: Mapping[str, History], path: Path) -> None:
    """Implicit rewards over training steps; methods that log the same of them share their scale.

    Args:
        histories: method → `Trainer.state.log_history`.
        path: PNG to write.
    """
    figure, axes = _figure(len(histories))
    alike: dict[tuple[str, ...], Any] = {}
    for axis, (name, history) in zip(axes, histories.items(), strict=True):
        curves = {m: _points(history, m) for m in (REWARDS_CHOSEN, REWARDS_REJECTED, REWARDS_MEAN)}
        logged = tuple(metric for metric, points in curves.items() if points)
        for metric in logged:
            axis.plot(*zip(*curves[metric], strict=True), marker=".", label=metric)
        if alike.setdefault(logged, axis) is not axis:
            axis.sharey(alike[logged])
        axis.set_title(name)
        axis.set_xlabel("optimizer step")
    axes[0].set_ylabel("implicit reward")
    _save(figure, path)


def plot_histories(histories: Mapping[str, History], folder: Path) -> list[Path]:
    """A picture each of loss, accuracies, rewards, margins with γ_i, KL and log-probs over steps.

    One run has its metrics on one axis; several have an axis for each metric, with a line for
    each run. The trainer's own evaluations (`eval_…`) are dashed.

    Args:
        histories: run → `Trainer.state.log_history`, of transformers or TRL.
        folder: to write PNGs to.

    Returns:
        The files, without those that nothing was logged for.
    """
    written, alone = [], len(histories) == 1
    for picture, (unit, metrics) in _PICTURES.items():
        logged = [m for m in metrics if any(_points(h, m) for h in histories.values())]
        if not logged:
            continue
        figure, axes = _figure(1 if alone else len(logged))
        axes[0].set_ylabel(unit)
        for row, metric in enumerate(logged):
            axis, label = axes[0 if alone else row], _LABELS.get(metric, metric)
            for number, (name, history) in enumerate(histories.items()):
                color = f"C{row if alone else number}"
                _curve(axis, history, metric, label if alone else name, color)
            axis.set_title(next(iter(histories)) if alone else label)
            axis.set_xlabel("optimizer step")
        written.append(folder / f"{picture}.png")
        _save(figure, written[-1])
    return written


def legends_below(figure: Any) -> None:
    """Give each axis of a figure its legend below it, where no curve runs, and room for that.

    Args:
        figure: of matplotlib, with a layout that arranges it; it becomes higher.
    """
    rows = 0
    for axis in figure.axes:
        labels = axis.get_legend_handles_labels()[1]
        if labels:
            columns = 1 if max(map(len, labels)) > _LONG_LABEL else 2
            # Of the axis the edge, and below it ticks and their label, in units of the font size.
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 3.8}
            axis.legend(ncols=columns, frameon=False, **place)
            rows = max(rows, math.ceil(len(labels) / columns))
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * rows)


def _curve(axis: Any, history: History, metric: str, label: str, color: str) -> None:
    """A metric over steps, its evaluations, and for γ_i a band of one standard deviation."""
    for name, style in ((metric, "-"), (f"eval_{metric}", "--")):
        points = _points(history, name)
        if points:
            shown = label if style == "-" else f"{label}, held out"
            axis.plot(*zip(*points, strict=True), style, marker=".", label=shown, color=color)
    spread = dict(_points(history, MARGIN_STD)) if metric == MARGIN_MEAN else {}
    band = [(step, mean, spread[step]) for step, mean in _points(history, metric) if step in spread]
    if band:
        steps, means, stds = zip(*band, strict=True)
        low, high = ([m + sign * s for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
        axis.fill_between(steps, low, high, alpha=0.2, color=color)


def _points(history: History, metric: str) -> list[tuple[float, float]]:
    return [(row["step"], row[metric]) for row in history if metric in row]


def _figure(columns: int) -> tuple[Any, Sequence[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 4 * columns, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure: Any, path: Path) -> None:
    legends_below(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
