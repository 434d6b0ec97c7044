"""Where reward margins usually lie: β-DPO's threshold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_prefopt.checks import require_number
from fused_prefopt.statistics.moments import BatchStatistic


@dataclass(frozen=True)
class RewardLevel:
    """Mean reward margins, now and on average.

    Attributes:
        batch: 0-d float64, mean of the current global batch; `average` where it has no value.
        average: 0-d float64, exponential average of the batches' means.
    """

    batch: Tensor
    average: Tensor


class RunningLevel(BatchStatistic):
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
    def forward(self, observed: Tensor) -> RewardLevel:
        """Take a batch in (training only) and return the levels.

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
        summary = RewardLevel(torch.where(defined, batch.mean, level), level)
        if self.training:
            # Commit only now, when nothing can fail any more.
            self._store(self.average, average)
            self._store(self.weight, weight)
            self.nonfinite.add_(batch.nonfinite.to(torch.int64))
        return summary


class ReferenceLevel(BatchStatistic):
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
    def forward(self, observed: Tensor) -> RewardLevel:
        """Return the levels of a batch, then (training only) take it in.

        Args:
            observed: (P,) this rank's reward margins; P may be 0.

        Returns:
            The batch's mean and the average of those before it.
        """
        batch = self._sums(observed)
        defined, level = batch.count >= 1, self.average.clone()
        summary = RewardLevel(torch.where(defined, batch.mean, level), level)
        if self.training:
            average = torch.lerp(batch.mean, level, self.momentum)
            self._store(self.average, torch.where(defined, average, level))
            self.nonfinite.add_(batch.nonfinite.to(torch.int64))
        return summary
