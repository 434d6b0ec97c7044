"""How one variable goes with another: rank correlation, a logistic curve, a straight line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Logistic:
    """``floor + height · σ((x − centre) / width)``, with the share of variance it explains."""

    floor: float
    height: float
    centre: float
    width: float
    r_squared: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.floor + self.height * torch.sigmoid((x - self.centre) / self.width)


def fit_logistic(x: Sequence[float], y: Sequence[float]) -> Logistic:
    """Least squares over all four parameters, by L-BFGS on standardised variables.

    Args:
        x: at least five numbers that are not all equal.
        y: as many, not all equal.
    """
    xs, ys = _column(x), _column(y)
    scaled, target = (xs - xs.mean()) / xs.std(), (ys - ys.mean()) / ys.std()
    span = target.max() - target.min()
    start = [target.min().item(), span.item(), 0.0, 0.0]
    parameters = torch.tensor(start, dtype=torch.float64, requires_grad=True)

    def curve() -> Tensor:
        floor, height, centre, log_width = parameters
        return floor + height * torch.sigmoid((scaled - centre) * (-log_width).exp())

    optimiser = torch.optim.LBFGS(
        [parameters], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = (curve() - target).square().mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    floor, height, centre, log_width = parameters.detach()
    return Logistic(
        floor=(ys.mean() + ys.std() * floor).item(),
        height=(ys.std() * height).item(),
        centre=(xs.mean() + xs.std() * centre).item(),
        width=(xs.std() * log_width.exp()).item(),
        r_squared=_r_squared(curve().detach(), target),
    )


def line_r_squared(x: Sequence[float], y: Sequence[float]) -> float:
    """Share of the variance of y that the best straight line explains."""
    return correlation(_column(x), _column(y)) ** 2


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of the least-squares line."""
    xs, ys = _column(x), _column(y)
    centred = xs - xs.mean()
    return ((centred * ys).sum() / centred.square().sum()).item()


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank."""
    return correlation(_ranks(_column(x)), _ranks(_column(y)))


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's, of two (n,) columns."""
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()


def _ranks(values: Tensor) -> Tensor:
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]


def _r_squared(fitted: Tensor, y: Tensor) -> float:
    return (1 - (fitted - y).square().sum() / (y - y.mean()).square().sum()).item()


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
