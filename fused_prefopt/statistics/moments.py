"""Mean and standard deviation of a per-pair value, in a batch and over the batches so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_prefopt.checks import require_number
from fused_prefopt.distributed import sum_over_ranks
from fused_prefopt.statistics.base import Statistic

STD_FLOOR = 1e-6


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation that standardise a value.

    Attributes:
        mean: 0-d float64.
        std: 0-d float64, at least 1e-6.
    """

    mean: Tensor
    std: Tensor

    def standardise(self, values: Tensor) -> Tensor:
        """``(values − mean) / std`` in the dtype of `values`, any shape."""
        return (values - self.mean.to(values.dtype)) / self.std.to(values.dtype)


@dataclass(frozen=True)
class BatchSums:
    """0-d float64 sums over a batch's values with a finite square, and how many have none."""

    count: Tensor
    total: Tensor
    squares: Tensor
    nonfinite: Tensor

    @property
    def mean(self) -> Tensor:
        return self.total / self.count.clamp(min=1)

    @property
    def mean_square(self) -> Tensor:
        return self.squares / self.count.clamp(min=1)

    @property
    def unbiased_std(self) -> Tensor:
        spread = (self.squares - self.count * self.mean.square()).clamp(min=0)
        return (spread / (self.count - 1).clamp(min=1)).sqrt()


def _moments(mean: Tensor, mean_square: Tensor) -> Moments:
    std = (mean_square - mean.square()).clamp(min=0).sqrt()
    return Moments(mean, std.clamp(min=STD_FLOOR))


class BatchStatistic(Statistic):
    """A statistic that sees a batch through its sums."""

    def _sums(self, observed: Tensor) -> BatchSums:
        values = observed.detach().to(torch.float64)
        # A value whose square is infinite would stay in the averages for good.
        finite = values.square().isfinite()
        values = values.where(finite, 0.0)
        sums = torch.stack(
            [finite.sum(), values.sum(), values.square().sum(), finite.logical_not().sum()]
        )
        if self.training and not self.sees_all_ranks:
            sums = sum_over_ranks(sums, self.process_group)
        return BatchSums(*sums.unbind())


class RunningMoments(BatchStatistic):
    """Bias-corrected exponential averages of E[x] and E[x²], the current batch included.

    ``m₁ ← ρ m₁ + (1−ρ) E[x]``, ``m₂ ← ρ m₂ + (1−ρ) E[x²]``, ``w ← ρ w + (1−ρ)``, then
    ``μ = m₁/w`` and ``σ = sqrt(max(0, m₂/w − μ²))``, at least 1e-6. Expectations are over the
    finite values of all ranks. Finite from the first single pair on. In eval the stored moments
    are used as they are; with nothing stored, the batch's own.

    Args:
        momentum: ρ, weight of the past.

    Raises:
        ValueError: `momentum` is outside [0, 1).
    """

    average: Tensor
    weight: Tensor

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        require_number("momentum", momentum, low=0, high=1, below=True)
        self.momentum = momentum
        self.register_buffer("average", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def forward(self, observed: Tensor) -> Moments:
        """Take a batch in (training only) and return the moments to standardise it with.

        Args:
            observed: (P,) this rank's values; P may be 0.

        Returns:
            Moments of the finite values seen so far.
        """
        batch = self._sums(observed)
        average, weight = self.average, self.weight
        if self.training:
            features, enough = self._features(batch)
            average = torch.where(enough, torch.lerp(features, average, self.momentum), average)
            weight = torch.where(enough, 1 - self.momentum * (1 - weight), weight)
        own = _moments(batch.mean, batch.mean_square)
        seen = weight > 0
        stored = self._read(average, weight.where(seen, 1.0))
        moments = Moments(
            torch.where(seen, stored.mean, own.mean), torch.where(seen, stored.std, own.std)
        )
        if self.training:
            # Commit only now, when nothing can fail any more.
            self._store(self.average, average)
            self._store(self.weight, weight)
            self.nonfinite.add_(batch.nonfinite.to(torch.int64))
        return moments

    def _features(self, batch: BatchSums) -> tuple[Tensor, Tensor]:
        """(2,) the batch quantities that are averaged, and whether the batch defines them."""
        return torch.stack([batch.mean, batch.mean_square]), batch.count >= 1

    def _read(self, average: Tensor, weight: Tensor) -> Moments:
        return _moments(average[0] / weight, average[1] / weight)


class ReferenceMoments(RunningMoments):
    """The α-DPO authors' recipe: averages of mean and unbiased std, from zero, not corrected.

    ``μ ← ρ μ + (1−ρ) mean(x)``, ``σ ← ρ σ + (1−ρ) std(x)``. Their code makes the state NaN for
    good on a single pair, whose unbiased std does not exist; here a batch with fewer than two
    finite values leaves the state as it is.

    Args:
        momentum: ρ, weight of the past.
    """

    def _features(self, batch: BatchSums) -> tuple[Tensor, Tensor]:
        return torch.stack([batch.mean, batch.unbiased_std]), batch.count >= 2

    def _read(self, average: Tensor, weight: Tensor) -> Moments:
        return Moments(average[0], average[1].clamp(min=STD_FLOOR))


class BatchMoments(BatchStatistic):
    """Mean and population std of the current batch alone: nothing is remembered."""

    @torch.no_grad()
    def forward(self, observed: Tensor) -> Moments:
        """Return the moments of the finite values of `observed`, (P,), of all ranks."""
        batch = self._sums(observed)
        if self.training:
            self.nonfinite.add_(batch.nonfinite.to(torch.int64))
        return _moments(batch.mean, batch.mean_square)


class DatasetMoments(BatchStatistic):
    """Given moments, measured over the training set beforehand (α-DPO eq. 11 read literally).

    Args:
        mean: μ.
        std: σ.

    Raises:
        ValueError: `mean` is not finite or `std` is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        require_number("mean", mean)
        require_number("std", std, low=0, above=True)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float64))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, observed: Tensor) -> Moments:
        """Return the given moments; of `observed`, (P,), only the non-finite are counted."""
        if self.training:
            self.nonfinite.add_(self._sums(observed).nonfinite.to(torch.int64))
        return Moments(self.mean.clone(), self.std.clamp(min=STD_FLOOR))


@dataclass(frozen=True)
class MarginMeans:
    """Mean reward margins, now and on average.

    Attributes:
        batch: 0-d float64, mean of the current global batch; `average` where it has no value.
        average: 0-d float64, exponential average of the batches' means.
    """

    batch: Tensor
    average: Tensor


class RunningMean(BatchStatistic):
    """Bias-corrected exponential average of E[x], the current batch included.

    ``a ← ρ a + (1−ρ) E[x]``, ``w ← ρ w + (1−ρ)``, ``M₀ = a/w``. Expectations are over the finite
    values of all ranks. In eval the stored average is used as it is; with nothing stored, the
    batch's own mean.

    Args:
        momentum: ρ, weight of the past.

    Raises:
        ValueError: `momentum` is outside [0, 1).

    Source: β-DPO (Wu et al. 2024, arXiv:2407.08639), with the bias of the first steps corrected.
    """

    average: Tensor
    weight: Tensor

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        require_number("momentum", momentum, low=0, high=1, below=True)
        self.momentum = momentum
        self.register_buffer("average", torch.zeros((), dtype=torch.float64))
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def forward(self, observed: Tensor) -> MarginMeans:
        """Take a batch in (training only) and return the means.

        Args:
            observed: (P,) this rank's reward margins; P may be 0.

        Returns:
            The batch's mean and the running one.
        """
        batch = self._sums(observed)
        defined = batch.count >= 1
        average, weight = self.average, self.weight
        if self.training:
            average = average.where(~defined, torch.lerp(batch.mean, average, self.momentum))
            weight = weight.where(~defined, 1 - self.momentum * (1 - weight))
        seen = weight > 0
        level = torch.where(seen, average / weight.where(seen, 1.0), batch.mean)
        summary = MarginMeans(torch.where(defined, batch.mean, level), level)
        if self.training:
            # Commit only now, when nothing can fail any more.
            self._store(self.average, average)
            self._store(self.weight, weight)
            self.nonfinite.add_(batch.nonfinite.to(torch.int64))
        return summary


class ReferenceMean(BatchStatistic):
    """The γ-PO authors' baseline for β-DPO: from zero, not corrected, of the earlier batches.

    ``M₀ ← ρ M₀ + (1−ρ) E[x]``, once the batch has been judged by the M₀ before it. Expectations
    are over the finite values of all ranks. Their code also updates it in evaluation; here eval
    leaves it alone.

    Args:
        momentum: ρ, weight of the past.

    Raises:
        ValueError: `momentum` is outside [0, 1).

    Source: the code of γ-PO (Sun et al. 2025, arXiv:2506.03690), its "b-dpo" and "b-simpo".
    """

    average: Tensor

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        require_number("momentum", momentum, low=0, high=1, below=True)
        self.momentum = momentum
        self.register_buffer("average", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def forward(self, observed: Tensor) -> MarginMeans:
        """Return the means of a batch, then (training only) take it in.

        Args:
            observed: (P,) this rank's reward margins; P may be 0.

        Returns:
            The batch's mean and the average of those before it.
        """
        batch = self._sums(observed)
        defined, level = batch.count >= 1, self.average.clone()
        summary = MarginMeans(torch.where(defined, batch.mean, level), level)
        if self.training:
            average = torch.lerp(batch.mean, level, self.momentum)
            self._store(self.average, torch.where(defined, average, level))
            self.nonfinite.add_(batch.nonfinite.to(torch.int64))
        return summary
