"""Findings about claims: intervals over seeds, a fitted curve, verdicts, and their pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import optimize, special, stats

from fused_prefopt.cli.pictures import legends_below
from paper_claims.runs import Results
from paper_claims.trainings import Training

LEVEL = 0.95


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        claim: what is claimed.
        paper: where, with its figures.
        here: what came out, written from the numbers.
        rule: when the claim counts as met.
        agrees: "yes", "no" or "undecided", by the rule.
    """

    claim: str
    paper: str
    here: str
    rule: str
    agrees: str


@dataclass(frozen=True)
class Experiment:
    """A claim or several, on the same trainings.

    Attributes:
        name: of the picture's file.
        title: a heading.
        text: what was done.
        trainings: what to run, with every seed.
        metrics: of `execute`, to show for each training.
        findings: the rows, from the results.
        draw: writes the picture to a path.
    """

    name: str
    title: str
    text: str
    trainings: tuple[Training, ...]
    metrics: tuple[str, ...]
    findings: Callable[[Results], list[Finding]]
    draw: Callable[[Results, Path], None]


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided confidence interval."""

    mean: float
    low: float
    high: float

    def show(self, digits: int = 3, scale: float = 1.0, unit: str = "") -> str:
        """``mean [low, high]unit`` of `scale` times the numbers."""
        mean, low, high = (fixed(scale * x, digits) for x in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]{unit}"


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Student's interval of the mean: ``mean ± t · stdev / √n`` with n − 1 degrees of freedom.

    Args:
        values: one for each seed, at least two.
        level: probability that the interval holds the true mean.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"values: got {len(values)}, needs at least 2")
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values))
    return Interval(fmean(values), fmean(values) - half, fmean(values) + half)


def above(found: Interval, limit: float = 0.0) -> str:
    """`yes` when the whole interval is above the limit, `no` when it is below, else `undecided`."""
    if found.low > limit:
        return "yes"
    return "no" if found.high < limit else "undecided"


def one_of(samples: Sequence[Sequence[float]]) -> list[Interval]:
    """Intervals of which all hold at once with the usual probability (Bonferroni)."""
    return [interval(values, 1 - (1 - LEVEL) / len(samples)) for values in samples]


def below(found: Interval, limit: float = 0.0) -> str:
    """`above`, the other way round."""
    return {"yes": "no", "no": "yes"}.get(above(found, limit), "undecided")


def together(verdicts: Sequence[str]) -> str:
    """`yes` when all are, `no` when one is, else `undecided`."""
    if "no" in verdicts:
        return "no"
    return "yes" if all(verdict == "yes" for verdict in verdicts) else "undecided"


def fixed(value: float, digits: int) -> str:
    """The number with so many decimals and a true minus sign."""
    shown = f"{value:.{digits}f}"
    # "-0.000" says less than "0.000".
    return shown.lstrip("-") if float(shown) == 0 else shown.replace("-", "−")


@dataclass(frozen=True)
class Logistic:
    """``floor + height · σ((x − centre) / width)``, with the share of variance it explains."""

    floor: float
    height: float
    centre: float
    width: float
    r_squared: float

    def __call__(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.floor + self.height * special.expit((x - self.centre) / self.width)


def fit_logistic(x: Sequence[float], y: Sequence[float]) -> Logistic:
    """Least squares over all four parameters, on standardised variables.

    Args:
        x: at least five numbers that are not all equal.
        y: as many, not all equal.
    """
    xs, ys = np.asarray(x), np.asarray(y)
    scaled, target = stats.zscore(xs, ddof=1), stats.zscore(ys, ddof=1)

    def curve(parameters: Sequence[float]) -> Any:
        floor, height, centre, log_width = parameters
        return floor + height * special.expit((scaled - centre) * np.exp(-log_width))

    start = (target.min(), np.ptp(target), 0.0, 0.0)
    # Points on a line want a curve without end: it is then as wide as these steps make it.
    found = optimize.least_squares(
        lambda parameters: curve(parameters) - target, start, ftol=1e-12, xtol=1e-12, max_nfev=500
    ).x
    floor, height, centre, log_width = found
    residuals = curve(found) - target
    return Logistic(
        floor=float(ys.mean() + ys.std(ddof=1) * floor),
        height=float(ys.std(ddof=1) * height),
        centre=float(xs.mean() + xs.std(ddof=1) * centre),
        width=float(xs.std(ddof=1) * np.exp(log_width)),
        r_squared=float(1 - np.square(residuals).sum() / np.square(target).sum()),
    )


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
