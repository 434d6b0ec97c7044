"""The Triton engine: the torch engine's matmuls, with one kernel for each pass over a tile."""

from __future__ import annotations

from torch import Tensor

from fused_prefopt.kernels.logits_gradient import residual_rows
from fused_prefopt.kernels.row_statistics import fold_rows
from fused_prefopt.ops.torch_engine import (
    HeadMath,
    RowStatistics,
    kept_residual,
    logits,
    operand_dtype,
    product,
    target_residual,
    tile_cost,
)


def fold(tile: Tensor, statistics: RowStatistics, targets: Tensor, keep: bool) -> Tensor:
    """As `torch_engine.fold`, in one launch."""
    return fold_rows(
        tile, targets, statistics.maximum, statistics.sum, statistics.target, keep=keep
    )


def residual(
    tile: Tensor, logsumexps: Tensor, targets: Tensor, logps: Tensor, math: HeadMath
) -> None:
    """As `torch_engine.residual`, in one launch."""
    inverse_cap = None if math.softcap is None else math.temperature / math.softcap
    residual_rows(tile, targets, logsumexps, target_residual(logps, logsumexps, math), inverse_cap)


__all__ = [
    "fold",
    "kept_residual",
    "logits",
    "operand_dtype",
    "product",
    "residual",
    "tile_cost",
]
