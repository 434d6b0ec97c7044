"""The cuBLAS engine: the library's matmuls, and one Triton kernel for each pass over a slab."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fused_prefopt.kernels.accumulators import spread_rows
from fused_prefopt.kernels.fold_rows import fold_rows
from fused_prefopt.kernels.kl import SlabLogits, fold_kl_rows, kl_gradient
from fused_prefopt.kernels.logits_gradient import logits_gradient
from fused_prefopt.kernels.sequence_sums import sequence_sums
from fused_prefopt.ops.cutting import TileCost, Tiles, TileShape, WeightKind, aligned
from fused_prefopt.ops.precision import HeadMath
from fused_prefopt.ops.tile import (
    KeptTile,
    KlGradients,
    KlStatistics,
    RowGradients,
    RowStatistics,
    Tile,
    WeighedRows,
)
from fused_prefopt.ops.torch_engine import TorchEngine, locate, product

_ANY = 1 << 30
_PREFERRED_OF_TWO = TileShape(8192, 16384)


class CublasEngine(TorchEngine):
    """As `TorchEngine`; a slab's transforms, statistics and gradient cost one read each."""

    name: ClassVar[str] = "cublas"
    keeps_some: ClassVar[bool] = True
    keeps_gradients: ClassVar[bool] = True

    def __init__(self, math: HeadMath, tiles: Tiles, device: torch.device) -> None:
        super().__init__(math, tiles, device)
        # One reference a row, which nearly never moves.
        self.part_width = _ANY

    @staticmethod
    def cost(math: HeadMath, weight: WeightKind, role: str) -> TileCost:
        """fp32 products, and the slab of a gradient in the operand dtype."""
        operand, single = math.operand(weight.device), math.accumulator.itemsize
        gradient = role in ("kept", "rebuild", "entropy")
        slab = float(operand.itemsize) if gradient or role == "weigh" else 0.0
        # Products of fp32 operands become their gradient where they are.
        logit = 0.0 if role == "kept" or (slab and operand == math.accumulator) else float(single)
        slabs = operand.itemsize if weight.dtype != operand else 0
        once = weight.dtype == math.accumulator or weight.dtype == operand == torch.bfloat16
        if gradient and not once:
            slabs += single
        sliced = single if gradient and once and weight.dtype != math.accumulator else 0
        return TileCost(
            logit,
            operand.itemsize,
            slabs,
            TileShape(_ANY, _ANY),
            slab=slab,
            sliced=sliced,
            sums_rows=gradient,
        )

    @classmethod
    def kl_cost(
        cls,
        math: HeadMath,
        weight: WeightKind,
        other: WeightKind,
        backward: bool,
        mixtures: bool = False,
    ) -> TileCost:
        policy = cls.cost(math, weight, "rebuild" if backward else "fold")
        reference = cls.cost(math, other, "fold")
        slab = max(policy.weight + policy.sliced, reference.weight)
        logit = policy.logit + policy.slab + reference.logit
        return TileCost(logit, policy.hidden, slab, _PREFERRED_OF_TWO)

    @staticmethod
    def in_place(math: HeadMath, device: torch.device) -> bool:
        return math.kept == math.operand(device) and device.type != "cpu"

    @property
    def kept_ceiling(self) -> float | None:
        """Ceiling of the softcap if what is kept lacks its slope: what `fold_rows` keeps has it."""
        return None

    def fold(self, tile: Tile, statistics: RowStatistics) -> None:
        self._fold_rows(tile, statistics, self._tile(tile.shape))

    def fold_and_keep(
        self, tile: Tile, statistics: RowStatistics, kept: Tensor, maxima: Tensor
    ) -> None:
        if tile.first == 0:
            maxima.fill_(torch.finfo(maxima.dtype).min)
        weighed = WeighedRows(maxima[0], kept, tile.first, None)
        out = weighed.at(slice(tile.first, tile.first + tile.shape[1]))
        self._fold_rows(tile, statistics, self._tile(tile.shape), out, weighed)

    def finish_kept(self, kept: KeptTile, rows: RowGradients) -> Tensor:
        values = kept.values
        shift = kept.maxima[0] - rows.logsumexps
        inside, column = locate(kept.targets, 0, values.shape[1])
        place = torch.arange(values.shape[0], device=values.device), column.squeeze(1)
        own = (rows.residuals * (-shift).exp_()).to(values.dtype)
        values[place] = own.where(inside, values[place])
        return shift.exp_().mul_(rows.scale)

    def fold_and_weigh(
        self, tile: Tile, statistics: RowStatistics, weighed: WeighedRows, columns: slice
    ) -> None:
        out = weighed.at(columns)
        self._fold_rows(tile, statistics, self._beside(out), out, weighed)

    def gradient(self, tile: Tile, rows: RowGradients, out: Tensor, bias: bool) -> Tensor | None:
        return logits_gradient(
            product(tile.hidden, tile.weight.t(), self._beside(out)),
            rows.logsumexps,
            out,
            targets=tile.targets,
            first=tile.first,
            residuals=rows.residuals,
            scale=rows.scale,
            bias=tile.bias,
            alpha=self.math.alpha,
            ceiling=self.math.ceiling,
            entropies=None if rows.entropy is None else rows.entropy.entropies,
            entropy_scale=None if rows.entropy is None else rows.entropy.scale,
            sums=bias,
        )

    def kept_gradient(
        self, kept: KeptTile, rows: RowGradients, out: Tensor, bias: bool
    ) -> Tensor | None:
        return logits_gradient(
            kept.values,
            rows.logsumexps,
            out,
            targets=kept.targets,
            residuals=rows.residuals,
            scale=rows.scale,
            ceiling=self.kept_ceiling,
            maxima=kept.maxima,
            part_width=kept.part_width,
            first=kept.first,
            sums=bias,
        )

    def fold_both(
        self, tile: Tile, reference: Tile, other: TorchEngine, statistics: KlStatistics
    ) -> None:
        assert isinstance(other, CublasEngine)
        fold_kl_rows(
            self._slab_logits(tile, self._tile(tile.shape)),
            other._slab_logits(reference, other._tile(reference.shape)),
            tile.targets,
            statistics.policy,
            statistics.reference,
            statistics.weighted,
            tile.first,
            statistics.mixtures,
        )

    def kl_gradient(
        self,
        tile: Tile,
        reference: Tile,
        other: TorchEngine,
        rows: KlGradients,
        out: Tensor,
        bias: bool,
    ) -> Tensor | None:
        assert isinstance(other, CublasEngine)
        logits = self._slab_logits(tile, self._beside(out))
        others = other._slab_logits(reference, other._tile(reference.shape))
        return kl_gradient(logits, others, tile.targets, rows, out, first=tile.first, sums=bias)

    sequence_sums = staticmethod(sequence_sums)
    spread_rows = staticmethod(spread_rows)

    def _fold_rows(
        self,
        tile: Tile,
        statistics: RowStatistics,
        products: Tensor,
        kept: Tensor | None = None,
        weighed: WeighedRows | None = None,
    ) -> None:
        fold_rows(
            product(tile.hidden, tile.weight.t(), products),
            tile.bias,
            tile.targets,
            statistics.maximum,
            statistics.sum,
            statistics.target,
            alpha=self.math.alpha,
            ceiling=self.math.ceiling,
            first=tile.first,
            kept=kept,
            weighed=weighed,
            slack=self.math.slack,
        )

    def _slab_logits(self, tile: Tile, products: Tensor) -> SlabLogits:
        """Products of a head, and how they become logits: what the kernels of two heads read."""
        values = product(tile.hidden, tile.weight.t(), products)
        return SlabLogits(values, tile.bias, self.math.alpha, self.math.ceiling)

    def _beside(self, out: Tensor) -> Tensor:
        """Place of the products of `out` (c, v): there if it takes fp32, else a tile."""
        if out.dtype == self.math.accumulator:
            return out
        return self._tile((out.shape[0], out.shape[1]))

    def _tile(self, shape: tuple[int, int]) -> Tensor:
        """Rows keep the stride of the widest tile: those of the last slab are aligned as well."""
        if self._buffer is None:
            size = (self.tiles.multiplied, aligned(self.tiles.products))
            self._buffer = torch.empty(size, dtype=self.math.accumulator, device=self.device)
        return self._buffer[: shape[0], : shape[1]]
