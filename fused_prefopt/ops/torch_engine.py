"""The torch engine: everything that happens to one tile of logits (c rows × v entries).

The loops over tiles are in `passes`. Matmuls take their operands in
`HeadMath.operand` and leave an accumulator (fp32, or float64 for float64 inputs) that nothing
rounds before it is used.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fused_prefopt.checks import is_on_host
from fused_prefopt.ops.cutting import TileCost, Tiles, TileShape, WeightKind
from fused_prefopt.ops.precision import HeadMath
from fused_prefopt.ops.tile import (
    Details,
    KeptTile,
    KlGradients,
    KlStatistics,
    MixtureStatistics,
    RowGradients,
    RowStatistics,
    Tile,
    WeighedRows,
)

# exp(-46) is about 1e-20. Probabilities below it change no sum, but as denormals, their own or
# those of their product with an upstream gradient, they make a CPU matmul 20 times slower.
_SMALLEST_EXPONENT = -46.0
# Tiles that keep the logits in a CPU's last-level cache, and a GPU's matmul units busy.
_PREFERRED = {"cpu": TileShape(1024, 2048)}
_PREFERRED_ELSEWHERE = TileShape(8192, 16384)


class TorchEngine:
    """Tiles of one pass over the head, in torch operations.

    Args:
        math: the head's scalars.
        tiles: how the pass is cut.
        device: of hidden and weight.

    Attributes:
        part_width: vocabulary entries that share one of `fold_and_keep`'s maxima.
        keeps_some: whether `fold_and_keep` may keep some rows of a tile and not others.
        keeps_gradients: whether what it keeps is the gradient, but for a factor of each row and the
            targets' entries: `finish_kept`.
    """

    name: ClassVar[str] = "torch"
    keeps_some: ClassVar[bool] = False
    keeps_gradients: ClassVar[bool] = False

    def __init__(self, math: HeadMath, tiles: Tiles, device: torch.device) -> None:
        self.math, self.tiles, self.device = math, tiles, device
        self.part_width = tiles.products
        self._buffer: Tensor | None = None
        self._second: Tensor | None = None

    @staticmethod
    def cost(math: HeadMath, weight: WeightKind, role: str) -> TileCost:
        """Bytes of the buffers for a tile of a head with such a weight (V, D).

        Args:
            role: what is asked, one of `engines.ROLES`.
        """
        operand, accumulator = math.operand(weight.device), math.accumulator
        logit = accumulator.itemsize * (1 if math.softcap is None else 2)
        if operand != accumulator:
            logit += operand.itemsize
        hidden = operand.itemsize
        slabs = operand.itemsize if weight.dtype != operand else 0
        # On their way to a wider operand dtype, rows and slabs pass through the dtype computed in;
        # and oneDNN reorders a matmul's operands to it, in a buffer of up to the tile's size.
        if math.dtype != operand:
            logit += operand.itemsize
            hidden += math.dtype.itemsize
            slabs += 0 if weight.dtype == math.dtype else math.dtype.itemsize
        # Nothing here may depend on the pass: what is kept has a maximum for each forward's tile.
        if weight.dtype != accumulator and role not in ("weigh", "details"):
            slabs += accumulator.itemsize
        if role == "details":
            logit += accumulator.itemsize  # of the logarithms
        preferred = _PREFERRED.get(weight.device.type, _PREFERRED_ELSEWHERE)
        return TileCost(logit, hidden, slabs, preferred)

    @classmethod
    def kl_cost(
        cls,
        math: HeadMath,
        weight: WeightKind,
        other: WeightKind,
        backward: bool,
        mixtures: bool = False,
    ) -> TileCost:
        """Bytes of the buffers for a tile of both heads, whose hidden sizes add up.

        Args:
            math: of the head that has a softcap, if one of them has.
            weight: (V, D) of the policy.
            other: (V, D') of the reference.
            backward: whether the pass is a backward.
            mixtures: whether a forward also folds mixtures of the logits.
        """
        policy, reference = cls.cost(math, weight, "rebuild"), cls.cost(math, other, "rebuild")
        beside = 0 if backward else 1 + mixtures
        logit = policy.logit + reference.logit + beside * math.accumulator.itemsize
        slab = max(policy.weight, reference.weight)
        return TileCost(logit, policy.hidden, slab, policy.preferred)

    @staticmethod
    def in_place(math: HeadMath, device: torch.device) -> bool:
        """Whether `kept_gradient` may overwrite what was kept."""
        return False

    def fold(self, tile: Tile, statistics: RowStatistics) -> None:
        """Fold the tile's logits into the running statistics of its rows, in place."""
        logits = self._logits(tile, self._tile(tile.shape))
        self._fold(logits, tile, statistics)

    def fold_details(self, tile: Tile, statistics: RowStatistics, details: Details) -> None:
        """`fold`, and the same for the details."""
        logits = self._logits(tile, self._tile(tile.shape))
        before, sums = statistics.maximum.clone(), statistics.sum.clone()
        highest, best = logits.max(1)
        details.logit_sum.add_(logits.sum(1))
        details.best.copy_(torch.where(highest > before, best + tile.first, details.best))
        factor = self._fold(logits, tile, statistics)
        # Σ (z − old maximum) e^… becomes Σ (z − new maximum) e^…; with nothing summed yet, 0.
        moved = (details.weighted + sums * (before - statistics.maximum)) * factor
        details.squares.mul_(factor.square()).add_(torch.linalg.vecdot(logits, logits))
        terms = logits.log().clamp_(min=_SMALLEST_EXPONENT).mul_(logits).sum(1)
        details.weighted.copy_(moved.where(sums > 0, 0.0) + terms)

    def fold_and_keep(
        self, tile: Tile, statistics: RowStatistics, kept: Tensor, maxima: Tensor
    ) -> None:
        """`fold`, and leave exp(logit − maximum) in the tile's columns of what is kept.

        Args:
            tile: a slab of the vocabulary.
            statistics: of its rows.
            kept: (k, V) in `HeadMath.kept`, of the first k rows; of all unless `keeps_some`.
            maxima: (parts, k) that it refers to, one for each `part_width` entries.
        """
        columns = kept[:, tile.first : tile.first + tile.shape[1]]
        in_place = kept.dtype == self.math.accumulator
        logits = self._logits(tile, columns if in_place else self._tile(tile.shape))
        self._fold(logits, tile, statistics)
        if not in_place:
            columns.copy_(logits)
        maxima[tile.first // self.part_width] = statistics.maximum

    def finish_kept(self, kept: KeptTile, rows: RowGradients) -> Tensor:
        """With `keeps_gradients`: put the targets' into what was kept.

        Args:
            kept: of the whole vocabulary (k, V), changed in place: it is the gradient then, but
                for a factor of each row.
            rows: of these rows.

        Returns:
            (k,) that factor.
        """
        raise NotImplementedError

    def fold_and_weigh(
        self, tile: Tile, statistics: RowStatistics, weighed: WeighedRows, columns: slice
    ) -> None:
        """`fold`, and leave exp(logit − reference) · slope in `columns` of the weighed slab.

        Where a row's reference moves, what was weighed by it is rescaled.
        """
        out = weighed.at(columns)
        in_place = out.dtype == self.math.accumulator
        logits = self._logits(tile, out if in_place else self._tile(tile.shape))
        slope = None if self.math.softcap is None else self.math.cap_slope(logits)
        factor = self._fold(logits, tile, statistics).unsqueeze(1)
        # Always the running maximum: what has been summed by it passes through the cache anyway.
        weighed.reference.copy_(statistics.maximum)
        if weighed.done:
            weighed.weights[:, : weighed.done].mul_(factor)
        if weighed.sums is not None:
            weighed.sums.mul_(factor)
        if slope is not None:
            logits.mul_(slope)
        inside, column = locate(tile.targets, tile.first, logits.shape[1])
        others = logits.gather(1, column).squeeze(1)
        logits.scatter_(1, column, others.masked_fill(inside, 0.0).unsqueeze(1))
        if not in_place:
            out.copy_(logits)

    def gradient(self, tile: Tile, rows: RowGradients, out: Tensor, bias: bool) -> Tensor | None:
        """The gradient of a tile's logits, ``scale · (softmax − one-hot) · slope``.

        With entropies, what they add to it.

        Args:
            rows: of these rows.
            out: (c, v) in the operand dtype, filled.
            bias: whether its sums over the rows are wanted.

        Returns:
            (v,) the sums, or None.
        """
        in_place = out.dtype == self.math.accumulator
        logits = self._logits(tile, out if in_place else self._tile(tile.shape))
        slope = None if self.math.softcap is None else self.math.cap_slope(logits)
        added = None
        if rows.entropy is not None:
            # The floor: 0 times the logarithm of an underflowed p would be NaN.
            added = (logits - rows.logsumexps.unsqueeze(1)).clamp_(min=_SMALLEST_EXPONENT)
            added.add_(rows.entropy.entropies.unsqueeze(1))
            added.mul_(rows.entropy.scale.unsqueeze(1))
        exp_below(logits, rows.logsumexps)
        if slope is not None:
            logits.mul_(slope)
        if added is not None:
            added.mul_(logits)
        logits.mul_(rows.scale.unsqueeze(1))
        gradient = self._finish(logits, tile.targets, tile.first, rows)
        return self._summed(gradient if added is None else gradient.add_(added), out, bias)

    def kept_gradient(
        self, kept: KeptTile, rows: RowGradients, out: Tensor, bias: bool
    ) -> Tensor | None:
        """The same from what `fold_and_keep` has left.

        Args:
            kept: a slab of it.
            rows: of these rows.
            out: (c, v) in the operand dtype, filled; with `in_place` it may be what was kept.
            bias: whether its sums over the rows are wanted.
        """
        values = kept.values
        in_place = out.dtype == self.math.accumulator
        gradient = out if in_place else self._tile((values.shape[0], values.shape[1]))
        maximum = kept.maxima[kept.first // kept.part_width]
        factor = (maximum - rows.logsumexps).exp_().mul_(rows.scale)
        torch.mul(values, factor.unsqueeze(1), out=gradient)
        if self.math.softcap is not None:
            # Where a value has underflowed to 0, 0 times the slope of its log, -inf, would be NaN.
            logits = values.to(gradient.dtype, copy=True).log_().clamp_(min=_SMALLEST_EXPONENT)
            logits.add_(maximum.unsqueeze(1))
            gradient.mul_(self.math.cap_slope(logits, out=logits))
        return self._summed(self._finish(gradient, kept.targets, kept.first, rows), out, bias)

    def fold_both(
        self, tile: Tile, reference: Tile, other: TorchEngine, statistics: KlStatistics
    ) -> None:
        """Fold a policy's and a reference's logits into the running statistics of their rows.

        Args:
            tile: of the policy's head.
            reference: the same rows and vocabulary entries of the reference's.
            other: of the reference's head, of the same class.
            statistics: of these rows, changed in place.
        """
        logits = self._logits(tile, self._tile(tile.shape))
        others = other._logits(reference, other._tile(reference.shape))
        differences = torch.sub(others, logits, out=other._second_tile(tile.shape))
        if statistics.mixtures is not None:
            self._fold_mixtures(logits, differences, tile, statistics.mixtures)
        if reference.bias is not None:
            # A bias of -inf: where the reference gives no probability, the policy may give none.
            differences.masked_fill_(others.isneginf(), 0.0)
        self._fold(logits, tile, statistics.policy)
        factor = self._fold(others, reference, statistics.reference)
        terms = differences.mul_(others).sum(1)
        statistics.weighted.mul_(factor).add_(terms)

    def _fold_mixtures(
        self, logits: Tensor, differences: Tensor, tile: Tile, statistics: MixtureStatistics
    ) -> None:
        """Fold mixtures of logits z (c, v) and what the reference's exceed them by, kept as is."""
        size = statistics.perturbation
        for weight, into in ((-size, statistics.extrapolated), (size, statistics.interpolated)):
            # Of z and a difference: where that is 0, the mixture is z to the last bit.
            mixture = torch.add(
                logits, differences, alpha=weight, out=self._second_tile(tile.shape)
            )
            if tile.bias is not None:
                # What the policy may not say, no mixture may: inf − inf.
                mixture.masked_fill_(logits.isneginf(), -torch.inf)
            self._fold(mixture, tile, into)

    def kl_gradient(
        self,
        tile: Tile,
        reference: Tile,
        other: TorchEngine,
        rows: KlGradients,
        out: Tensor,
        bias: bool,
    ) -> Tensor | None:
        """The gradient of the policy's logits where they meet a reference's, as in `fold_both`.

        Args:
            rows: of these rows.
            out: (c, v) in the operand dtype, filled.
            bias: whether its sums over the rows are wanted.

        Returns:
            (v,) the sums, or None.
        """
        in_place = out.dtype == self.math.accumulator
        logits = self._logits(tile, out if in_place else self._tile(tile.shape))
        slope = None if self.math.softcap is None else self.math.cap_slope(logits)
        exp_below(logits, rows.logsumexps)
        logits.mul_(rows.scale.unsqueeze(1))
        # Half of TDPO2's rows.
        if not is_on_host(rows.reference_scale) or rows.reference_scale.any():
            others = other._logits(reference, other._tile(reference.shape))
            exp_below(others, rows.reference_logsumexps)
            logits.addcmul_(others, rows.reference_scale.unsqueeze(1))
        if slope is not None:
            logits.mul_(slope)
        inside, column = locate(tile.targets, tile.first, tile.shape[1])
        own = rows.targets.where(inside, logits.gather(1, column).squeeze(1))
        logits.scatter_(1, column, own.unsqueeze(1))
        return self._summed(logits, out, bias)

    @staticmethod
    def sequence_sums(
        values: Tensor, ids: Tensor, num_sequences: int, sorted_ids: bool
    ) -> tuple[Tensor, Tensor]:
        """Sums in float64, rounded once, and counts (S,); in row order, no atomics on floats.

        Args:
            values: (n,).
            ids: (n,) int64 in [0, S).
            num_sequences: S.
            sorted_ids: the ids never fall from one row to the next.
        """
        if not sorted_ids:
            ids, order = ids.sort(stable=True)
            values = values[order]
        lengths = ids.new_zeros(num_sequences).scatter_add_(0, ids, torch.ones_like(ids))
        sums = torch.segment_reduce(values.double(), "sum", lengths=lengths, unsafe=True)
        return sums.to(values.dtype), lengths

    @staticmethod
    def spread_rows(
        values: Tensor,
        index: Tensor,
        out: Tensor,
        factor: Tensor | None = None,
        scale: Tensor | None = None,
        added: Tensor | None = None,
        own: Tensor | None = None,
    ) -> None:
        """``out[index] = factor · values``, or ``factor · (scale · values + own · added)``.

        Rounded once.

        Args:
            values: (c, D) in the accumulator's dtype.
            index: (c,) rows of `out`, each once.
            out: (M, D).
            factor: (c,) or None for 1.
            scale: (c,), given with `added`, or None.
            added: (c, D) in any dtype, or None.
            own: (c,), given with it.
        """
        if scale is not None and added is not None and own is not None:
            values = values * scale.unsqueeze(1) + added.to(values.dtype).mul_(own.unsqueeze(1))
        if factor is not None:
            values = values * factor.unsqueeze(1)
        out[index] = values.to(out.dtype)

    def _tile(self, shape: tuple[int, int]) -> Tensor:
        """A contiguous tile in the one buffer of accumulators."""
        if self._buffer is None:
            self._buffer = self._new_tile()
        return self._buffer[: shape[0] * shape[1]].view(shape)

    def _second_tile(self, shape: tuple[int, int]) -> Tensor:
        """The same in a buffer beside it."""
        if self._second is None:
            self._second = self._new_tile()
        return self._second[: shape[0] * shape[1]].view(shape)

    def _new_tile(self) -> Tensor:
        size = self.tiles.rows * self.tiles.products
        return torch.empty(size, dtype=self.math.accumulator, device=self.device)

    def _logits(self, tile: Tile, out: Tensor) -> Tensor:
        alpha = self.math.alpha
        if tile.bias is not None:
            out.copy_(tile.bias).mul_(alpha)
        product(tile.hidden, tile.weight.t(), out, alpha=alpha, accumulate=tile.bias is not None)
        if self.math.ceiling is not None:
            out.tanh_().mul_(self.math.ceiling)
        return out

    @staticmethod
    def _fold(logits: Tensor, tile: Tile, statistics: RowStatistics) -> Tensor:
        """Leave exp(logit − maximum) in the tile; return exp(old maximum − new maximum)."""
        inside, column = locate(tile.targets, tile.first, logits.shape[1])
        found = logits.gather(1, column).squeeze(1)
        statistics.target.copy_(found.where(inside, statistics.target))
        maximum = torch.maximum(statistics.maximum, logits.amax(1))
        factor = (statistics.maximum - maximum).exp_()
        exp_below(logits, maximum)
        statistics.sum.mul_(factor).add_(logits.sum(1))
        statistics.maximum.copy_(maximum)
        return factor

    @staticmethod
    def _finish(tile: Tensor, targets: Tensor, first: int, rows: RowGradients) -> Tensor:
        """Put the targets' own gradient into the tile."""
        inside, column = locate(targets, first, tile.shape[1])
        others = tile.gather(1, column).squeeze(1)
        own = rows.residuals * rows.scale
        return tile.scatter_(1, column, own.where(inside, others).unsqueeze(1))

    @staticmethod
    def _summed(tile: Tensor, out: Tensor, bias: bool) -> Tensor | None:
        if tile is not out:
            out.copy_(tile)
        return tile.sum(0) if bias else None


def product(
    left: Tensor, right: Tensor, out: Tensor, *, alpha: float = 1.0, accumulate: bool = False
) -> Tensor:
    """``out = [out +] alpha * left @ right``, summed in fp32 at least: (a, b) @ (b, c) → (a, c)."""
    if left.dtype == out.dtype:
        return torch.addmm(out, left, right, beta=float(accumulate), alpha=alpha, out=out)
    return torch.addmm(
        out, left, right, beta=float(accumulate), alpha=alpha, out_dtype=out.dtype, out=out
    )


def exp_below(tile: Tensor, ceiling: Tensor) -> None:
    """exp(tile − ceiling), in place: (c, v) and (c,); no denormals on a CPU."""
    tile.sub_(ceiling.unsqueeze(1))
    if tile.device.type == "cpu":
        tile.clamp_(min=_SMALLEST_EXPONENT)
    tile.exp_()


def locate(targets: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Whether each target is in a slab (c,), and its column there (c, 1): any if it is not."""
    within = targets - first if first else targets
    inside = (within >= 0) & (within < width)
    return inside, within.clamp(0, width - 1).unsqueeze(1)
