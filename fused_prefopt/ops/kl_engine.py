"""The torch engine of `sequence_kl`: one tile of the policy's logits beside the reference's."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_prefopt.checks import is_on_host
from fused_prefopt.ops.cutting import TileCost, Tiles, WeightKind
from fused_prefopt.ops.head_math import HeadMath
from fused_prefopt.ops.kl_tile import KlGradients, KlStatistics
from fused_prefopt.ops.tile import Tile
from fused_prefopt.ops.torch_engine import TorchEngine, exp_below, locate


class TorchKlEngine(TorchEngine):
    """Tiles of both heads, in torch operations.

    Args:
        math: of the policy's head.
        reference: of the reference's, with the same dtype.
        tiles: how the pass is cut.
        device: of all tensors.
    """

    def __init__(
        self, math: HeadMath, reference: HeadMath, tiles: Tiles, device: torch.device
    ) -> None:
        super().__init__(math, tiles, device)
        self._reference = TorchEngine(reference, tiles, device)
        self._differences = TorchEngine(reference, tiles, device)

    @staticmethod
    def costs(math: HeadMath, weight: WeightKind, other: WeightKind, backward: bool) -> TileCost:
        """What the buffers take for a tile of both heads, whose hidden sizes add up.

        Args:
            math: of the head that has a softcap, if one of them has.
            weight: (V, D) of the policy.
            other: (V, D') of the reference.
            backward: whether the pass is a backward.
        """
        policy = TorchEngine.cost(math, weight, "rebuild")
        reference = TorchEngine.cost(math, other, "rebuild")
        logit = policy.logit + reference.logit + (0 if backward else math.accumulator.itemsize)
        slab = max(policy.weight, reference.weight)
        return TileCost(logit, policy.hidden, slab, policy.preferred)

    def fold_both(self, tile: Tile, reference: Tile, statistics: KlStatistics) -> None:
        """Fold both tiles' logits into the running statistics of their rows, in place.

        Args:
            tile: of the policy's head.
            reference: the same rows and vocabulary entries of the reference's.
            statistics: of these rows.
        """
        logits, others = self._logits(tile, self._tile(tile.shape)), self._of_reference(reference)
        differences = torch.sub(others, logits, out=self._differences._tile(tile.shape))
        if reference.bias is not None:
            # A bias of -inf: where the reference gives no probability, the policy may give none.
            differences.masked_fill_(others.isneginf(), 0.0)
        self._fold(logits, tile, statistics.policy)
        factor = self._fold(others, reference, statistics.reference)
        terms = differences.mul_(others).sum(1)
        statistics.weighted.mul_(factor).add_(terms)

    def kl_gradient(
        self, tile: Tile, reference: Tile, rows: KlGradients, out: Tensor, bias: bool
    ) -> Tensor | None:
        """Fill `out` (c, v) with the gradient of the policy's logits.

        Returns:
            (v,) its sums over the rows if `bias`, or None.
        """
        in_place = out.dtype == self.math.accumulator
        logits = self._logits(tile, out if in_place else self._tile(tile.shape))
        slope = None if self.math.softcap is None else self.math.cap_slope(logits)
        exp_below(logits, rows.logsumexps)
        logits.mul_(rows.scale.unsqueeze(1))
        # Half of TDPO2's rows.
        if not is_on_host(rows.reference_scale) or rows.reference_scale.any():
            others = self._of_reference(reference)
            exp_below(others, rows.reference_logsumexps)
            logits.addcmul_(others, rows.reference_scale.unsqueeze(1))
        if slope is not None:
            logits.mul_(slope)
        inside, column = locate(tile.targets, tile.first, tile.shape[1])
        own = rows.targets.where(inside, logits.gather(1, column).squeeze(1))
        logits.scatter_(1, column, own.unsqueeze(1))
        return self._summed(logits, out, bias)

    def _of_reference(self, tile: Tile) -> Tensor:
        return self._reference._logits(tile, self._reference._tile(tile.shape))
