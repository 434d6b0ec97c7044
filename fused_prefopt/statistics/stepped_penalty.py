"""The strength of a KL penalty that moves in steps, as the pairs of each batch ask for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_prefopt.checks import require_count, require_number
from fused_prefopt.statistics.moments import BatchStatistic


@dataclass(frozen=True)
class Penalty:
    """Strength of the KL penalty.

    Attributes:
        factor: 0-d float64, by which β has changed since training began.
    """

    factor: Tensor


class SteppedPenalty(BatchStatistic):
    """ε-DPO's β as a multiple of its first value: ``β ← β / (1 + ε E[s])``, after use.

    E[s] is the mean over the finite steps s of all ranks' pairs since the last update.

    Args:
        epsilon: 0 < ε < 1, size of a step.
        update_every: batches of training after which β moves: those that make one step of the
            optimizer.

    Raises:
        ValueError: an argument is out of range.

    Source: the code of ε-DPO (Lee et al. 2025, arXiv:2502.13177).
    """

    factor: Tensor
    pending: Tensor

    def __init__(self, epsilon: float = 0.01, update_every: int = 1) -> None:
        super().__init__()
        require_number("epsilon", epsilon, low=0, high=1, above=True, below=True)
        require_count("update_every", update_every, low=1)
        self.epsilon, self.update_every = epsilon, update_every
        self.register_buffer("factor", torch.ones((), dtype=torch.float64))
        # Batches, pairs and sum of their steps since the last update.
        self.register_buffer("pending", torch.zeros(3, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, observed: Tensor) -> Penalty:
        """Return the penalty for a batch, then (training only) take the batch in.

        Args:
            observed: (P,) steps of this rank's pairs, −1, 0 or 1; P may be 0.

        Returns:
            The strength before this batch.
        """
        penalty = Penalty(self.factor.clone())
        if self.training:
            batch = self._sums(observed)
            one = torch.ones_like(batch.count)
            batches, pairs, total = (
                self.pending + torch.stack([one, batch.count, batch.total])
            ).unbind()
            due = batches >= self.update_every
            moved = penalty.factor / (1 + self.epsilon * total / pairs.clamp(min=1))
            # Commit only now, when nothing can fail any more.
            self._store(self.factor, moved.where(due, penalty.factor))
            self._store(self.pending, torch.stack([batches, pairs, total]).where(~due, 0.0))
            self.nonfinite.add_(batch.nonfinite.to(torch.int64))
        return penalty
