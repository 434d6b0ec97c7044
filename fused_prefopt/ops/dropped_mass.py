"""Backward without the parts of the vocabulary that a row gives next to no probability.

The forward leaves the log-sum-exp of each part of `PART` entries. A row leaves out its least likely
parts as long as their probability is at most `drop_mass` (ε) in all, never its target's, and the
others' probabilities are renormalised: what remains is the exact gradient of the log-prob among
the kept entries, and ``‖Δ d logits‖₁ <= 2 ε |d loss / d logp|`` in every row, whatever the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_prefopt.ops.tile import RowStatistics

# Entries that are kept or left out together: small enough that rows differ in what they need, large
# enough that a matmul over one part is as fast as any.
PART = 512
# Rows whose parts are sorted at a time, which bounds what the sort takes.
_ROWS = 1024
# Probabilities are added up in integers of this unit: in any order the same.
_UNIT = 2.0**-50


@dataclass(frozen=True)
class Parts:
    """Parts of the vocabulary, and the rows that need each.

    Attributes:
        kept: (parts, n) bool.
        counts: rows that need each part.
        kept_mass: (n,) probability of what a row keeps.
        dropped_mass: (n,) probability of what it leaves out.
    """

    kept: Tensor
    counts: Sequence[int]
    kept_mass: Tensor
    dropped_mass: Tensor

    def rows(self, slab: slice, most: int) -> list[Tensor]:
        """Indices of the rows that need a slab, at most `most` in a tensor."""
        part = slab.start // PART
        if not self.counts[part]:
            return []
        return list(self.kept[part].nonzero_static(size=self.counts[part]).squeeze(1).split(most))


def no_mass(vocab: int, statistics: RowStatistics) -> Tensor:
    """(parts, n) logsumexps of nothing."""
    rows = statistics.maximum.shape[0]
    return statistics.maximum.new_full((-(-vocab // PART), rows), -torch.inf)


def fresh(statistics: RowStatistics) -> RowStatistics:
    """Statistics of nothing, of as many rows."""
    like = statistics.maximum
    return RowStatistics.empty(like.shape[0], like.dtype, like.device)


def add_mass(logsumexps: Tensor, statistics: RowStatistics) -> None:
    """Add what a tile has found to the logsumexps (c,) of its part, in place."""
    torch.logaddexp(logsumexps, statistics.logsumexps(), out=logsumexps)


def choose_parts(masses: Tensor, logsumexps: Tensor, targets: Tensor, drop_mass: float) -> Parts:
    """Parts that each row keeps; waits for CUDA once.

    Args:
        masses: (parts, n) logsumexps of the parts.
        logsumexps: (n,) of the rows.
        targets: (n,) vocabulary index of the targets; outside where another rank holds it.
        drop_mass: ε.
    """
    kept = torch.ones(masses.shape, dtype=torch.bool, device=masses.device)
    kept_mass, dropped = torch.zeros_like(logsumexps), torch.zeros_like(logsumexps)
    for start in range(0, masses.shape[1], _ROWS):
        rows = slice(start, start + _ROWS)
        shares = (masses[:, rows] - logsumexps[rows]).exp_()
        own = targets[rows].div(PART, rounding_mode="floor").unsqueeze(0)
        inside = (own >= 0) & (own < masses.shape[0])
        own = own.clamp(0, masses.shape[0] - 1)
        # A share above 1 is never left out.
        weights = shares.scatter(0, own, shares.gather(0, own).masked_fill(inside, 2.0))
        ascending, order = (weights / _UNIT).ceil_().long().sort(dim=0, stable=True)
        leaves = ascending.cumsum(0) <= int(drop_mass / _UNIT)
        kept[:, rows].scatter_(0, order, ~leaves)
        kept_mass[rows] = (shares * kept[:, rows]).sum(0)
        dropped[rows] = (shares * ~kept[:, rows]).sum(0)
    return Parts(kept, kept.sum(1).tolist(), kept_mass, dropped)
