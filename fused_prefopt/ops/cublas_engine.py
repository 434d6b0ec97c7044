"""The cuBLAS engine: the library's matmuls, and one Triton kernel for each pass over a slab."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fused_prefopt.kernels import logits_gradient as gradients
from fused_prefopt.kernels.rescale import rescale_rows
from fused_prefopt.kernels.row_statistics import fold_rows
from fused_prefopt.kernels.sequence_sums import sequence_sums
from fused_prefopt.ops.head_math import HeadMath
from fused_prefopt.ops.plan import TileCost, TileShape, aligned
from fused_prefopt.ops.tile import RowGradients, RowStatistics, Tile, TileGradient
from fused_prefopt.ops.torch_engine import TorchEngine, product


class CublasEngine(TorchEngine):
    """As `TorchEngine`; a slab's transforms, statistics and gradient cost one read each."""

    name: ClassVar[str] = "cublas"

    def __init__(self, math: HeadMath, shape: TileShape, device: torch.device) -> None:
        super().__init__(math, shape, device)
        self.in_place = math.kept == math.operand(device) and device.type != "cpu"
        self._narrow: Tensor | None = None

    @staticmethod
    def cost(math: HeadMath, weight: Tensor, path: str, backward: bool) -> TileCost:
        """fp32 products and, where operands are narrower, the operand beside them."""
        operand = math.operand(weight.device)
        logit = float(math.accumulator.itemsize)
        # Nothing here may depend on the pass for `local`, whose parts are the forward's tiles.
        rebuilt = path in ("stash", "recompute") or (backward and path == "details")
        if operand != math.accumulator and rebuilt:
            logit += operand.itemsize
        slabs = operand.itemsize if weight.dtype != operand else 0
        if weight.dtype not in (math.accumulator, operand) or operand == torch.float16:
            slabs += math.accumulator.itemsize
        preferred = TileShape(8192, 16384)
        return TileCost(logit, operand.itemsize, slabs, preferred)

    def fold(self, tile: Tile, statistics: RowStatistics) -> None:
        self._fold_rows(tile, statistics, None)

    def fold_and_keep(self, tile: Tile, statistics: RowStatistics, kept: Tensor) -> Tensor:
        self._fold_rows(tile, statistics, kept)
        return statistics.maximum.unsqueeze(0)

    def fold_and_weigh(self, tile: Tile, statistics: RowStatistics, gradient: Tensor) -> Tensor:
        weights = self._operand(tile.shape)
        factor = self._fold_rows(tile, statistics, weights, slope=True)
        rescale_rows(gradient, factor)
        return weights

    def gradient(self, tile: Tile, rows: RowGradients, bias: bool) -> TileGradient:
        out = self._operand(tile.shape)
        sums = gradients.logits_gradient(
            self._products(tile),
            rows.logsumexps,
            out,
            targets=tile.targets,
            residuals=rows.residuals,
            scale=rows.scale,
            bias=tile.bias,
            alpha=self.math.alpha,
            ceiling=self.math.ceiling,
            entropies=None if rows.entropy is None else rows.entropy.entropies,
            entropy_scale=None if rows.entropy is None else rows.entropy.scale,
            sums=bias,
        )
        return TileGradient(out, sums)

    def kept_gradient(
        self, kept: Tensor, maxima: Tensor, targets: Tensor, rows: RowGradients, bias: bool
    ) -> TileGradient:
        out = kept if self.in_place else self._operand((kept.shape[0], kept.shape[1]))
        sums = gradients.logits_gradient(
            kept,
            rows.logsumexps,
            out,
            targets=targets,
            residuals=rows.residuals,
            scale=rows.scale,
            ceiling=self.math.ceiling,
            maxima=maxima,
            part_width=self.part_width,
            sums=bias,
        )
        return TileGradient(out, sums)

    sequence_sums = staticmethod(sequence_sums)

    def _fold_rows(
        self, tile: Tile, statistics: RowStatistics, kept: Tensor | None, slope: bool = False
    ) -> Tensor:
        return fold_rows(
            self._products(tile),
            tile.bias,
            tile.targets,
            statistics.maximum,
            statistics.sum,
            statistics.target,
            alpha=self.math.alpha,
            ceiling=self.math.ceiling,
            kept=kept,
            slope=slope,
        )

    def _products(self, tile: Tile) -> Tensor:
        return product(tile.hidden, tile.weight.t(), self._tile(tile.shape))

    def _tile(self, shape: tuple[int, int]) -> Tensor:
        """Rows keep the stride of the widest tile: those of the last slab are aligned as well."""
        if self._buffer is None:
            self._buffer = self._new(self.math.accumulator)
        return self._buffer[: shape[0], : shape[1]]

    def _operand(self, shape: tuple[int, int]) -> Tensor:
        """A tile in the operand dtype: over the products where that is theirs, else beside them."""
        operand = self.math.operand(self.device)
        if operand == self.math.accumulator:
            return self._tile(shape)
        if self._narrow is None:
            self._narrow = self._new(operand)
        return self._narrow[: shape[0], : shape[1]]

    def _new(self, dtype: torch.dtype) -> Tensor:
        size = (self.shape.rows, aligned(self.shape.vocab))
        return torch.empty(size, dtype=dtype, device=self.device)
