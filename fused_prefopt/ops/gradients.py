"""Sums of the gradients of a backward over tiles: rows of hidden, slabs of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_prefopt.checks import is_on_host
from fused_prefopt.ops.head_rows import HeadRows
from fused_prefopt.ops.torch_engine import product
from fused_prefopt.ops.vocab_shard import RowSums

# Rows whose gradient is smaller than the largest row's by this factor change nothing in any dtype,
# but their products with small probabilities are denormals, which a CPU multiplies 20x slower.
_NEGLIGIBLE = 1e-18
# Bytes of copies of rows that ranks add up piece by piece: their workspaces may be of other sizes,
# their pieces not.
_SHARED_PIECE = 32 << 20


class Gradients(NamedTuple):
    """Gradients of `HeadTensors`, each in its tensor's shape and dtype, or None."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    low_hidden: Tensor | None = None
    low_weight: Tensor | None = None


class Wanted(NamedTuple):
    """Gradients that are wanted, of `HeadTensors`."""

    hidden: bool
    weight: bool
    bias: bool
    low_hidden: bool
    low_weight: bool

    @property
    def rows(self) -> bool:
        return self.hidden or self.low_hidden

    def columns(self, hidden_size: int) -> slice:
        """Of the D + r columns of hidden, those whose weights need a gradient."""
        return slice(0 if self.weight else hidden_size, None if self.low_weight else hidden_size)


def row_factors(
    factors: Sequence[Tensor], operand: torch.dtype
) -> tuple[list[Tensor], Tensor | None]:
    """Factors on the rows' gradients without those that change nothing, in a unit that they fit.

    Args:
        factors: (n,) each.
        operand: dtype of the gradients' matmuls.

    Returns:
        The factors, and the 0-d unit that they are in, None for 1.
    """
    if not factors[0].shape[0] or (operand != torch.float16 and not is_on_host(factors[0])):
        return list(factors), None
    largest = torch.stack([factor.abs() for factor in factors]).amax()
    # Not the other way round: a row that is NaN is no reason to leave out the others.
    kept = [each.masked_fill(each.abs() < _NEGLIGIBLE * largest, 0.0) for each in factors]
    if operand != torch.float16:
        return kept, None
    # fp16 holds nothing below 6e-8, which a row's probability times its gradient easily is.
    unit = largest.where(largest > 0, 1.0)
    return [factor / unit for factor in kept], unit


class GradientSums:
    """Gradients of one head's tensors, summed in fp32 at least and rounded once.

    The vocabulary is the outer loop: a slab of a weight's gradient is finished and written before
    the next begins.

    Args:
        head: the labelled rows.
        padded_vocab: rows of the weight with its padding, which gets zeros.
        wanted: the gradients to form.
        unit: what the tiles' gradients are to be multiplied by, or None for 1.
        scattered: tiles come with any rows, and not every row in every slab.

    Attributes:
        factor: (n,) that is missing in the tiles' rows; `hidden` has it already. Or None.
    """

    factor: Tensor | None = None

    def __init__(
        self,
        head: HeadRows,
        padded_vocab: int,
        wanted: Wanted,
        unit: Tensor | None = None,
        scattered: bool = False,
    ) -> None:
        tensors = head.tensors
        self._head, self._unit, self._scattered = head, unit, scattered
        self._columns = wanted.columns(tensors.weight.shape[1])
        self._hidden = head.new(head.rows, head.hidden_size) if wanted.rows else None
        self._hidden_sums: RowSums | None = None
        if self._hidden is not None:
            if scattered:
                self._hidden.zero_()
            self._hidden_sums = head.shard.sum_rows(self._hidden)
        self._wanted = wanted

        def padded(value: Tensor | None, needed: bool) -> Tensor | None:
            if value is None or not needed:
                return None
            gradient = value.new_empty(padded_vocab, *value.shape[1:])
            # Without labelled rows no slab is written.
            unwritten = value.shape[0] if head.rows else 0
            if unwritten < padded_vocab:
                gradient[unwritten:].zero_()
            return gradient

        self._weight = padded(tensors.weight, wanted.weight)
        self._bias = padded(tensors.bias, wanted.bias)
        self._low_weight = padded(tensors.low_weight, wanted.low_weight)
        self._slab, self._empty = slice(0, 0), True
        self._slab_weight: Tensor | None = None
        self._slab_bias: Tensor | None = None

    @property
    def wants_bias(self) -> bool:
        """Whether tiles must come with the sums over their rows."""
        return self._bias is not None

    def begin(self, slab: slice) -> None:
        """Start the sums of a vocabulary slab."""
        size = slab.stop - slab.start
        self._slab, self._empty = slab, True
        self._slab_bias = self._head.new(size).zero_() if self.wants_bias else None
        self._slab_weight = self._buffer(slab)

    def add_bias(self, sums: Tensor | None, columns: slice) -> None:
        """Add a tile's sums over its rows (v,), at columns of the slab."""
        if self._slab_bias is not None and sums is not None:
            self._slab_bias[columns] += sums

    def add(self, gradient: Tensor, rows: slice | Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Add a tile of the slab.

        Args:
            gradient: of its logits (c, v), in the operand dtype.
            rows: which rows these are: `HeadRows.row_slices` in their order, or indices (c,).
            hidden: (c, D + r) in the operand dtype.
            weight: (v, D + r) in the operand dtype.
        """
        # First the rows of hidden: other ranks wait for the last slab's.
        if self._hidden is not None:
            later = self._scattered or self._slab.start > 0
            sums = self._hidden[rows]
            total = self._head.add_product(gradient, weight, sums, accumulate=later)
            if isinstance(rows, Tensor):
                self._hidden[rows] = total
            elif self._hidden_sums is not None and self._last:
                self._hidden_sums.ready(rows.stop)
        if self._slab_weight is not None:
            columns = hidden[:, self._columns]
            product(gradient.t(), columns, self._slab_weight, accumulate=not self._empty)
        self._empty = False

    def finish(self) -> None:
        """Write the slab's sums, in the units that are wanted."""
        if self._hidden_sums is not None and self._last:
            self._hidden_sums.ready(self._head.rows)
        weight, bias = self._slab_weight, self._slab_bias
        if self._empty and weight is not None:
            weight.zero_()
        for total in (weight, bias):
            if total is not None and self._unit is not None:
                total.mul_(self._unit)
        if weight is not None:
            width = 0 if self._weight is None else self._weight.shape[1]
            _write(self._weight, self._slab, weight[:, :width])
            _write(self._low_weight, self._slab, weight[:, width:])
        _write(self._bias, self._slab, bias)

    def gradients(self) -> Gradients:
        """All of them, each in its tensor's shape and dtype."""
        found = Gradients()
        if self._hidden is not None:
            head = self._head
            if self._hidden_sums is not None:
                self._hidden_sums.wait()
            factor = self.factor
            if self._unit is not None:
                unit = self._unit.repeat(head.rows)
                factor = unit if factor is None else factor * unit
            found = spread(head, self._hidden, self._wanted, factor)
        return found._replace(weight=self._weight, bias=self._bias, low_weight=self._low_weight)

    @property
    def _last(self) -> bool:
        """Whether the slab is the vocabulary's last on this rank."""
        return self._slab.stop == self._head.vocab

    def _buffer(self, slab: slice) -> Tensor | None:
        """In the gradient itself where nothing is rounded twice, else (v, columns) beside it."""
        head = self._head
        if self._weight is None and self._low_weight is None:
            return None
        only = self._weight if self._low_weight is None else None
        if only is not None:
            one_product = head.rows <= head.tiles.rows and only.dtype == head.operand
            one_product = one_product and not self._scattered
            if only.dtype == head.math.accumulator or (
                one_product and only.dtype == torch.bfloat16
            ):
                return only[slab]
        return head.new(slab.stop - slab.start, len(range(head.hidden_size)[self._columns]))


def spread(
    head: HeadRows,
    rows: Tensor,
    wanted: Wanted,
    factor: Tensor | None = None,
    shares: tuple[Tensor, Tensor] | None = None,
) -> Gradients:
    """Gradients of all rows, (M, D) and (M, r), from those of the labelled ones, (n, D + r).

    Args:
        rows: (n, D + r) in the accumulator's dtype.
        wanted: the gradients to form.
        factor: (n,) on each row, or None.
        shares: (n,) of each row, and (n,) of the weight's row of its target, which is added; or
            None for 1 and 0.
    """
    width = head.tensors.weight.shape[1]
    places = {"hidden": slice(0, width), "low_hidden": slice(width, None)}
    found: dict[str, Tensor] = {}
    for name, columns in places.items():
        whole = getattr(head.tensors, name)
        if whole is None or not getattr(wanted, name):
            continue
        full = found[name] = torch.zeros_like(whole)
        # What passes through copies is cut: they may take no more than the workspace does.
        summed = head.shard.group and shares is not None
        budget = _SHARED_PIECE if summed else head.spec.workspace
        step = max(1, budget // (12 * max(1, rows.shape[1])))
        for start in range(0, head.rows, step):
            part = slice(start, start + step)
            options = {} if shares is None else _shares(head, part, columns, shares)
            scale = None if factor is None else factor[part]
            _spread_part(head, rows[part, columns], head.index[part], full, scale, options)
    return Gradients(**found)


def _shares(
    head: HeadRows, part: slice, columns: slice, shares: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    targets = head.targets[part].clamp(0, head.vocab - 1)
    added = head.weight_rows(targets)[:, columns]
    return {"scale": shares[0][part], "added": added, "own": shares[1][part]}


def _spread_part(
    head: HeadRows,
    values: Tensor,
    index: Tensor,
    full: Tensor,
    factor: Tensor | None,
    options: dict[str, Tensor],
) -> None:
    engine = head.build_engine("fold")
    if not (head.shard.group and options):
        engine.spread_rows(values, index, full, factor, **options)
        return
    # Every rank has a part of the sums, and one of them the target's row.
    whole = torch.empty_like(values, memory_format=torch.contiguous_format)
    places = torch.arange(len(index), device=index.device)
    engine.spread_rows(values, places, whole, **options)
    engine.spread_rows(head.shard.add(whole), index, full, factor)


def _write(gradient: Tensor | None, slab: slice, total: Tensor | None) -> None:
    if gradient is None or total is None:
        return
    if total.data_ptr() != gradient[slab].data_ptr():
        gradient[slab].copy_(total)
