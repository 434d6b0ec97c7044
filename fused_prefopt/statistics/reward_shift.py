"""The level of the rewards that BCO subtracts from all of them, over the batches so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_prefopt.checks import require_number
from fused_prefopt.distributed import sum_over_ranks
from fused_prefopt.statistics.base import Statistic


@dataclass(frozen=True)
class RewardLevel:
    """What rewards are measured from.

    Attributes:
        level: 0-d float64 δ, in units of reward.
    """

    level: Tensor


class ShiftStatistic(Statistic):
    """A level of the rewards of two classes, desirable and not, the current batch included.

    In eval the stored level is used as it is; with nothing stored, the batch's own. A column
    with a value that is not finite, or whose square is not, is skipped whole.
    """

    total: Tensor
    weight: Tensor
    # How many levels are kept apart: one of each class, or one of all.
    levels: int

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(self.levels, dtype=torch.float64))
        self.register_buffer("weight", torch.zeros(self.levels, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, observed: Tensor) -> RewardLevel:
        """Take a batch in (training only) and return the level.

        Args:
            observed: (4, n) this rank's sums of rewards, of the desirable and of the other
                completions of a pair (or of a single one), and how many of each it has; n may be 0.

        Returns:
            The level, of the values of all ranks so far.
        """
        values = observed.detach().to(torch.float64)
        finite = values.square().isfinite().all(0)
        sums = values.where(finite, 0.0).sum(1)
        sums = torch.cat([sums, finite.logical_not().sum().to(sums.dtype)[None]])
        if self.training and not self.sees_all_ranks:
            sums = sum_over_ranks(sums, self.process_group)
        # (levels,): of each class, or of both together.
        totals, counts = sums[:4].reshape(2, self.levels, -1).sum(-1)
        total, weight = self.total, self.weight
        if self.training:
            total, weight = self._entered(totals, counts)
        stored = weight.sum() > 0
        level = torch.where(stored, _mean_level(total, weight), _mean_level(totals, counts))
        if self.training:
            # Commit only now, when nothing can fail any more.
            self._store(self.total, total)
            self._store(self.weight, weight)
            self.nonfinite.add_(sums[4].to(torch.int64))
        return RewardLevel(level)

    def _entered(self, totals: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """(levels,) `total` and `weight`, whose quotient is a level, with a batch's sums in."""
        raise NotImplementedError


def _mean_level(total: Tensor, weight: Tensor) -> Tensor:
    """Mean of the levels that there are: of a class that was never seen there is none."""
    there = weight > 0
    levels = (total / weight.where(there, 1.0)).where(there, 0.0)
    return levels.sum() / there.sum().clamp(min=1)


class BalancedShift(ShiftStatistic):
    """BCO's ``δ = (δ₊ + δ₋)/2`` of bias-corrected exponential averages of the classes' means.

    ``a ← ρ a + (1−ρ) E[r]``, ``w ← ρ w + (1−ρ)``, ``δ± = a/w``, where a batch has the class. Until
    both were seen δ is the average of the one.

    Args:
        momentum: ρ, weight of the past.

    Raises:
        ValueError: `momentum` is outside [0, 1).

    Source: BCO (Jung et al. 2024, arXiv:2404.04656), eq. 7 and the sentence after eq. 8, which
    leaves ρ open; with the bias of the first steps corrected.
    """

    levels = 2

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        require_number("momentum", momentum, low=0, high=1, below=True)
        self.momentum = momentum

    def _entered(self, totals: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        there = counts > 0
        means = totals / counts.clamp(min=1)
        total = torch.lerp(means, self.total, self.momentum)
        weight = 1 - self.momentum * (1 - self.weight)
        return total.where(there, self.total), weight.where(there, self.weight)


class PooledShift(ShiftStatistic):
    """Mean of the rewards of all completions so far, of either class.

    Source: the code of BCO's authors in TRL, its `RunningMoments` in `BCOTrainer` (to TRL 1.13).
    """

    levels = 1

    def _entered(self, totals: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        return self.total + totals, self.weight + counts


class BatchwiseShift(ShiftStatistic):
    """Mean over the batches so far, of all ranks, of the mean reward of each.

    Source: the code of BCO's authors in TRL, in its "bco_pair" (TRL 0.24), and after it
    LLaMA-Factory's `pref_bco_weight` and ms-swift's "bco_pair". Theirs also moves in evaluation.
    """

    levels = 1

    def _entered(self, totals: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        return self.total + totals / counts.clamp(min=1), self.weight + (counts > 0)
