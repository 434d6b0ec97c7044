"""The cuBLAS engine of `sequence_kl`: library matmuls, and one Triton kernel for each pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_prefopt.kernels.fold_kl_rows import SlabLogits, fold_kl_rows
from fused_prefopt.kernels.kl_gradient import kl_gradient
from fused_prefopt.ops.cublas_engine import CublasEngine
from fused_prefopt.ops.cutting import TileCost, Tiles, TileShape, WeightKind
from fused_prefopt.ops.head_math import HeadMath
from fused_prefopt.ops.kl_tile import KlGradients, KlStatistics
from fused_prefopt.ops.tile import Tile
from fused_prefopt.ops.torch_engine import product

_PREFERRED = TileShape(8192, 16384)


class CublasKlEngine(CublasEngine):
    """As `TorchKlEngine`; statistics and gradient cost one read of each slab."""

    def __init__(
        self, math: HeadMath, reference: HeadMath, tiles: Tiles, device: torch.device
    ) -> None:
        super().__init__(math, tiles, device)
        self._reference = CublasEngine(reference, tiles, device)

    @staticmethod
    def costs(math: HeadMath, weight: WeightKind, other: WeightKind, backward: bool) -> TileCost:
        """What the buffers take for a tile of both heads, whose hidden sizes add up."""
        policy = CublasEngine.cost(math, weight, "rebuild" if backward else "fold")
        reference = CublasEngine.cost(math, other, "fold")
        slab = max(policy.weight + policy.sliced, reference.weight)
        logit = policy.logit + policy.slab + reference.logit
        return TileCost(logit, policy.hidden, slab, _PREFERRED)

    def fold_both(self, tile: Tile, reference: Tile, statistics: KlStatistics) -> None:
        """Fold both tiles' logits into the running statistics of their rows, in place."""
        fold_kl_rows(
            *self._both(tile, reference, self._tile(tile.shape)),
            tile.targets,
            statistics.policy,
            statistics.reference,
            statistics.weighted,
            tile.first,
        )

    def kl_gradient(
        self, tile: Tile, reference: Tile, rows: KlGradients, out: Tensor, bias: bool
    ) -> Tensor | None:
        """Fill `out` (c, v) with the gradient of the policy's logits; its sums if `bias`."""
        both = self._both(tile, reference, self._beside(out))
        return kl_gradient(*both, tile.targets, rows, out, first=tile.first, sums=bias)

    def _both(self, tile: Tile, reference: Tile, products: Tensor) -> tuple[SlabLogits, SlabLogits]:
        def logits(math: HeadMath, part: Tile, out: Tensor) -> SlabLogits:
            values = product(part.hidden, part.weight.t(), out)
            return SlabLogits(values, part.bias, math.alpha, math.ceiling)

        others = self._reference
        return (
            logits(self.math, tile, products),
            logits(others.math, reference, others._tile(reference.shape)),
        )
