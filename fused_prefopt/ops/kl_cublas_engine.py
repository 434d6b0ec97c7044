"""The cuBLAS engine of `sequence_kl`: library matmuls, and one Triton kernel for each pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_prefopt.kernels.fold_kl_rows import SlabLogits, fold_kl_rows
from fused_prefopt.kernels.kl_gradient import kl_gradient
from fused_prefopt.ops.cublas_engine import CublasEngine
from fused_prefopt.ops.head_math import HeadMath
from fused_prefopt.ops.kl_tile import KlGradients, KlStatistics
from fused_prefopt.ops.plan import TileCost, TileShape
from fused_prefopt.ops.tile import Tile, TileGradient


class CublasKlEngine(CublasEngine):
    """As `TorchKlEngine`; statistics and gradient cost one read of each slab."""

    def __init__(
        self, math: HeadMath, reference: HeadMath, shape: TileShape, device: torch.device
    ) -> None:
        super().__init__(math, shape, device)
        self._reference = CublasEngine(reference, shape, device)

    @staticmethod
    def costs(math: HeadMath, weight: Tensor, other: Tensor, backward: bool) -> TileCost:
        """What the buffers take for a tile of both heads, whose hidden sizes add up."""
        policy = CublasEngine.cost(math, weight, "recompute", backward)
        reference = CublasEngine.cost(math, other, "evaluate", False)
        slab = max(policy.weight, reference.weight)
        return TileCost(policy.logit + reference.logit, policy.hidden, slab, policy.preferred)

    def fold_both(self, tile: Tile, reference: Tile, statistics: KlStatistics) -> None:
        """Fold both tiles' logits into the running statistics of their rows, in place."""
        fold_kl_rows(
            *self._both(tile, reference),
            tile.targets,
            statistics.policy,
            statistics.reference,
            statistics.weighted,
        )

    def kl_gradient(
        self, tile: Tile, reference: Tile, rows: KlGradients, bias: bool
    ) -> TileGradient:
        """The gradient of the policy's logits; with its sums over the rows if `bias`."""
        both, out = self._both(tile, reference), self._operand(tile.shape)
        return TileGradient(out, kl_gradient(*both, tile.targets, rows, out, sums=bias))

    def _both(self, tile: Tile, reference: Tile) -> tuple[SlabLogits, SlabLogits]:
        def logits(engine: CublasEngine, part: Tile) -> SlabLogits:
            math = engine.math
            return SlabLogits(engine._products(part), part.bias, math.alpha, math.ceiling)

        return logits(self, tile), logits(self._reference, reference)
