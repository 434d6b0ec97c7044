"""The Triton engine: the head's matmul inside the kernels, so that no logits reach memory."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from fused_prefopt.kernels.accumulators import rescale_rows
from fused_prefopt.kernels.architectures import Block
from fused_prefopt.kernels.fold_logits import Partials, fold_logits, merge_partials
from fused_prefopt.kernels.logits_gradient import logits_gradient
from fused_prefopt.kernels.recompute_gradient import recompute_gradient
from fused_prefopt.ops.cublas_engine import CublasEngine
from fused_prefopt.ops.cutting import TileCost, Tiles, WeightKind
from fused_prefopt.ops.precision import HeadMath
from fused_prefopt.ops.tile import Details, RowGradients, RowStatistics, Tile, WeighedRows
from fused_prefopt.ops.tuning import Tuning, tuning_of


class TritonEngine(CublasEngine):
    """Forward and recomputation in one kernel a tile; the gradients' matmuls are the library's."""

    name: ClassVar[str] = "triton"

    keeps_some: ClassVar[bool] = False
    keeps_gradients: ClassVar[bool] = False

    def __init__(self, math: HeadMath, tiles: Tiles, device: torch.device) -> None:
        super().__init__(math, tiles, device)
        self._tuning: Tuning = tuning_of(device)
        self.part_width = self._tuning.block("kept", math.operand(device), rich=True).vocab

    @staticmethod
    def cost(math: HeadMath, weight: WeightKind, role: str) -> TileCost:
        """Partial statistics of the forward, the gradient's slab of the backward."""
        cost = CublasEngine.cost(math, weight, role)
        block = tuning_of(weight.device).block("kept", math.operand(weight.device), rich=True)
        partials = 2 * math.accumulator.itemsize / block.vocab
        logits = {"fold": partials, "keep": partials, "details": 2.5 * partials, "weigh": partials}
        slabs = cost.weight + (0 if weight.contiguous else weight.dtype.itemsize)
        # A slab below a program's width would split the parts that are kept the maxima of.
        return replace(cost, logit=logits.get(role, 0.0), weight=slabs, smallest=block.vocab)

    def fold(self, tile: Tile, statistics: RowStatistics) -> None:
        partials = self._partials(tile, statistics, "fold", None)
        merge_partials(partials, statistics.maximum, statistics.sum)

    def fold_details(self, tile: Tile, statistics: RowStatistics, details: Details) -> None:
        partials = self._partials(tile, statistics, "details", None)
        merge_partials(partials, statistics.maximum, statistics.sum, details, tile.first)

    def fold_and_keep(
        self, tile: Tile, statistics: RowStatistics, kept: Tensor, maxima: Tensor
    ) -> None:
        columns = kept[:, tile.first : tile.first + tile.shape[1]]
        first, last = tile.first, tile.first + tile.shape[1]
        own = maxima[first // self.part_width : -(-last // self.part_width)]
        # All kept rows in one tile, as nearly always: no copy.
        there = own if own.is_contiguous() else None
        partials = self._partials(tile, statistics, "kept", columns, there)
        merge_partials(partials, statistics.maximum, statistics.sum)
        if there is None:
            own.copy_(partials.maximum)

    @property
    def kept_ceiling(self) -> float | None:
        return self.math.ceiling

    def fold_and_weigh(
        self, tile: Tile, statistics: RowStatistics, weighed: WeighedRows, columns: slice
    ) -> None:
        out, reference = weighed.at(columns), weighed.reference
        partials = self._partials(tile, statistics, "kept", out)
        factor = merge_partials(
            partials,
            statistics.maximum,
            statistics.sum,
            reference=reference,
            slack=self.math.slack,
        )
        logits_gradient(
            out,
            reference,
            out,
            targets=tile.targets - tile.first,
            residuals=torch.zeros_like(factor),
            scale=torch.ones_like(factor),
            ceiling=self.math.ceiling,
            maxima=partials.maximum,
            part_width=self.part_width,
        )
        if weighed.done:
            rescale_rows(weighed.at(slice(0, weighed.done)), factor)
        if weighed.sums is not None:
            rescale_rows(weighed.sums, factor)

    def gradient(self, tile: Tile, rows: RowGradients, out: Tensor, bias: bool) -> Tensor | None:
        return recompute_gradient(
            tile.hidden,
            tile.weight.contiguous(),
            tile.bias,
            rows.logsumexps,
            tile.targets,
            rows.residuals,
            rows.scale,
            out,
            alpha=self.math.alpha,
            ceiling=self.math.ceiling,
            block=self._block("gradient", tile, rich=bias),
            descriptors=self._tuning.descriptors,
            first=tile.first,
            sums=bias,
        )

    def _partials(
        self,
        tile: Tile,
        statistics: RowStatistics,
        kernel: str,
        kept: Tensor | None,
        maximum: Tensor | None = None,
    ) -> Partials:
        return fold_logits(
            tile.hidden,
            tile.weight.contiguous(),
            tile.bias,
            tile.targets,
            statistics.target,
            alpha=self.math.alpha,
            ceiling=self.math.ceiling,
            block=self._block(kernel, tile, rich=kernel != "fold"),
            descriptors=self._tuning.descriptors,
            first=tile.first,
            kept=kept,
            maximum=maximum,
            details=kernel == "details",
        )

    def _block(self, kernel: str, tile: Tile, rich: bool) -> Block:
        # Loads of rows that are not whole 16 bytes take registers too.
        unaligned = tile.hidden.shape[1] * tile.hidden.itemsize % 16 > 0
        rich = rich or unaligned or self.math.ceiling is not None
        return self._tuning.block(kernel, tile.hidden.dtype, rich)
