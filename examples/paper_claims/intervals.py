"""Confidence intervals over seeds, and what they say about a claim."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, stdev

LEVEL = 0.95
_INTERVALS = 1000  # of Simpson's rule, whose error is then far below the digits shown


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
    half = student_quantile(len(values) - 1, level) * stdev(values) / math.sqrt(len(values))
    return Interval(fmean(values), fmean(values) - half, fmean(values) + half)


@lru_cache
def student_quantile(degrees: int, level: float = LEVEL) -> float:
    """t with ``P(|T| < t) = level`` for Student's distribution.

    Substituting ``t = √n tan(a)`` turns ``P(|T| < t)`` into a ratio of integrals of
    ``cos(a)^(n−1)``, from 0 to a and from 0 to π/2.

    Args:
        degrees: n >= 1.
        level: in (0, 1).

    Raises:
        ValueError: an argument is out of its range.
    """
    if degrees < 1 or not 0 < level < 1:
        raise ValueError(f"degrees, level: got {degrees}, {level}, needs >= 1 and in (0, 1)")

    def density(angle: float) -> float:
        return math.cos(angle) ** (degrees - 1)

    wanted = level * _integral(density, math.pi / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _integral(density, middle) < wanted else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


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


def _integral(function: Callable[[float], float], end: float) -> float:
    """Simpson's rule from 0."""
    step = end / _INTERVALS
    odd = sum(function(step * i) for i in range(1, _INTERVALS, 2))
    even = sum(function(step * i) for i in range(2, _INTERVALS, 2))
    return step / 3 * (function(0.0) + 4 * odd + 2 * even + function(end))
