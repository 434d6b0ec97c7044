"""The four paths: loops over tiles of the logits, vocabulary slab by slab.

The vocabulary is the outer loop, so a slab of the weight is cast once and a slab of its gradient
is written once, in the weight's own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fused_prefopt.ops import dropped_mass
from fused_prefopt.ops.head_rows import HeadRows
from fused_prefopt.ops.tile import RowGradients, RowStatistics, Tile
from fused_prefopt.ops.torch_engine import TorchEngine, product
from fused_prefopt.ops.workspace import find, give_back, lease

# Rows whose gradient is smaller than the largest row's by this factor change nothing in any dtype,
# but their products with small probabilities are denormals, which a CPU multiplies 20x slower.
_NEGLIGIBLE = 1e-18


@dataclass(frozen=True)
class Kept:
    """What a forward leaves for its backward.

    Attributes:
        logsumexps: (n,).
        stash: `stash`: (n, D) d logp / d hidden. Otherwise empty.
        maxima: `local`: (parts, n) the maxima that its probabilities refer to. Otherwise empty.
        ticket: `local`: (1,) finds the (n, V) tensor of exp(logit − maximum) in the workspace.
            Otherwise 0.
        masses: with `drop_mass`: (parts, n) logsumexps of each part of the vocabulary. Otherwise
            empty.
    """

    logsumexps: Tensor
    stash: Tensor
    maxima: Tensor
    ticket: Tensor
    masses: Tensor


def forward(head: HeadRows) -> tuple[Tensor, Kept]:
    """Log-probs of the labelled rows (n,), and what `backward` needs."""
    engine, slices, hidden = head.build_engine(), head.row_slices(), head.hidden_rows()
    statistics = RowStatistics.empty(head.rows, head.math.accumulator, head.device)
    gradient, maxima, kept, masses = head.new(0), head.new(0), head.new(0), head.new(0)
    ticket = torch.zeros(1, dtype=torch.int64)
    if head.path == "stash":
        gradient = head.new(head.rows, head.hidden_size).zero_()
    elif head.path == "local":
        kept, ticket = lease(head.kept_size, head.math.kept, head.device)
        maxima = head.new(_part(head.vocab - 1, engine) + 1, head.rows)
    if head.drop_mass:
        masses = dropped_mass.no_mass(head.vocab, statistics)
    for slab, weight, bias in head.slabs():
        for rows in slices:
            tile = Tile(hidden[rows], weight, bias, head.targets[rows] - slab.start)
            own = dropped_mass.fresh(statistics[rows]) if head.drop_mass else statistics[rows]
            if head.path == "stash":
                weights = engine.fold_and_weigh(tile, own, gradient[rows])
                product(weights, weight, gradient[rows], accumulate=True)
            elif head.path == "local":
                maxima[_parts(slab, engine), rows] = engine.fold_and_keep(
                    tile, own, kept[rows, slab]
                )
            else:
                engine.fold(tile, own)
            if head.drop_mass:
                dropped_mass.add_mass(masses[slab.start // dropped_mass.PART, rows], own)
                statistics[rows].merge(own)
    merged = head.shard.merge(statistics)
    if head.path == "stash":
        shares = (statistics.maximum - merged.maximum).exp_() / merged.sum
        _finish_stash(head, gradient, shares, merged.target)
        head.shard.add(gradient)
    return merged.logps(), Kept(merged.logsumexps(), gradient, maxima, ticket, masses)


def _finish_stash(head: HeadRows, gradient: Tensor, shares: Tensor, target_logits: Tensor) -> None:
    """Turn Σ_v exp(z_v − max) W_v into d logp / d hidden = W_y − Σ_v p_v W_v, in place.

    Args:
        gradient: (n, D + r).
        shares: (n,) exp(max − logsumexp).
        target_logits: (n,).
    """
    for rows in head.row_slices():
        targets = head.targets[rows]
        factor = ((targets >= 0) & (targets < head.vocab)).to(gradient.dtype)
        target = head.weight_rows(targets.clamp(0, head.vocab - 1)).to(gradient.dtype)
        if head.math.softcap is not None:
            factor.mul_(head.math.cap_slope(target_logits[rows]))
        target.mul_(factor.unsqueeze(1))
        gradient[rows].mul_(-shares[rows].unsqueeze(1)).add_(target).mul_(head.math.slope)


class Gradients(NamedTuple):
    """Gradients of `HeadTensors`, each in its tensor's shape and dtype, or None."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    low_hidden: Tensor | None = None
    low_weight: Tensor | None = None


class Needs(NamedTuple):
    """Which of `HeadTensors` need a gradient."""

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


def backward(
    head: HeadRows, kept: Kept, logps: Tensor, upstream: Tensor, padded_vocab: int, needs: Needs
) -> Gradients:
    """Gradients of ``(upstream * logps).sum()``.

    Args:
        kept: what `forward` has returned.
        logps: (n,) log-probs of the labelled rows.
        upstream: (n,) d loss / d logp.
        padded_vocab: rows of the weight with its padding.
        needs: which gradients are wanted.
    """
    if head.path == "stash":
        dhidden = kept.stash * upstream.unsqueeze(1) if needs.rows else None
        return _spread(dhidden, head, needs)

    probabilities = None
    if head.path == "local":
        probabilities = find(kept.ticket, head.kept_size, head.math.kept)
        if probabilities is None:
            head = replace(head, path="recompute")
    tensors = head.tensors
    dhidden = head.new(head.rows, head.hidden_size) if needs.rows else None
    dweight = _padded_like(tensors.weight, padded_vocab, head.rows) if needs.weight else None
    dbias = _padded_like(tensors.bias, padded_vocab, head.rows) if needs.bias else None
    dlow = _padded_like(tensors.low_weight, padded_vocab, head.rows) if needs.low_weight else None
    # Without labelled rows no slab would be written: the gradients are the zeros they start as.
    if head.rows:
        columns = needs.columns(tensors.weight.shape[1])
        scale = _unit_scale(head, upstream * -head.math.slope)
        sums = _Sums(dhidden, columns, dweight, dlow, dbias, *scale)
        _sum_gradients(head, kept, probabilities, logps, sums)
        if dhidden is not None:
            head.shard.add(dhidden)
    give_back(kept.ticket)
    return _spread(dhidden, head, needs)._replace(weight=dweight, bias=dbias, low_weight=dlow)


@dataclass(frozen=True)
class _Sums:
    """Where the sums over tiles go.

    Attributes:
        hidden: (n, D + r) or None.
        columns: of hidden, those whose weights are wanted.
        weight, low_weight, bias: (V, D), (V, r), (V,) or None.
        scale: (n,) of the rows.
        unit: in which `scale` is given, None for 1.
    """

    hidden: Tensor | None
    columns: slice
    weight: Tensor | None
    low_weight: Tensor | None
    bias: Tensor | None
    scale: Tensor
    unit: Tensor | None

    def buffer(self, head: HeadRows, slab: slice) -> Tensor | None:
        """Where a slab of the weights' gradients is summed: in the gradient itself where nothing
        is rounded twice, else (v, columns) beside it."""
        if self.weight is None and self.low_weight is None:
            return None
        only = self.weight if self.low_weight is None else None
        if only is not None:
            one_product = head.rows <= head.shape.rows and only.dtype == head.operand
            if only.dtype == head.math.accumulator or (
                one_product and only.dtype == torch.bfloat16
            ):
                return only[slab]
        return head.new(slab.stop - slab.start, len(range(head.hidden_size)[self.columns]))

    def write(self, slab: slice, weights: Tensor | None, bias: Tensor | None) -> None:
        """Put a slab's finished sums, (v, columns) and (v,), where they belong."""
        for total in (weights, bias):
            if total is not None and self.unit is not None:
                total.mul_(self.unit)
        if weights is not None:
            width = 0 if self.weight is None else self.weight.shape[1]
            _write(self.weight, slab, weights[:, :width])
            _write(self.low_weight, slab, weights[:, width:])
        _write(self.bias, slab, bias)


def _unit_scale(head: HeadRows, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    largest = scale.abs().amax()
    scale = scale.masked_fill(scale.abs() < _NEGLIGIBLE * largest, 0.0)
    if head.operand != torch.float16:
        return scale, None
    # fp16 holds nothing below 6e-8, which a row's probability times its gradient easily is.
    unit = largest.where(largest > 0, 1.0)
    return scale / unit, unit


def _sum_gradients(
    head: HeadRows, kept: Kept, probabilities: Tensor | None, logps: Tensor, sums: _Sums
) -> None:
    engine, hidden = head.build_engine(), head.hidden_rows()
    parts, logsumexps = None, kept.logsumexps
    if head.drop_mass:
        budget = head.drop_mass / head.shard.size
        parts, dropped = dropped_mass.choose_parts(kept.masses, logsumexps, head.targets, budget)
        # The exact gradient of the log-prob among what is kept: it still sums to zero.
        remaining = torch.log1p(-head.shard.add(dropped))
        logps, logsumexps = logps - remaining, logsumexps + remaining
        if sums.hidden is not None:
            sums.hidden.zero_()
    residuals = head.math.target_residual(logps, logsumexps)
    numbers = RowGradients(logsumexps, residuals, sums.scale)
    for slab, weight, bias in head.slabs():
        wants_bias = sums.bias is not None
        bias_sum = head.new(weight.shape[0]).zero_() if wants_bias else None
        weight_sum = sums.buffer(head, slab)
        slices: Sequence[slice | Tensor] = head.row_slices()
        if parts is not None:
            slices = parts.rows(slab, head.shape.rows)
        if weight_sum is not None and not slices:
            weight_sum.zero_()
        for number, rows in enumerate(slices):
            targets = head.targets[rows] - slab.start
            if probabilities is None:
                tile = Tile(hidden[rows], weight, bias, targets)
                gradient = engine.gradient(tile, numbers[rows], wants_bias)
            else:
                gradient = engine.kept_gradient(
                    probabilities[rows, slab],
                    kept.maxima[_parts(slab, engine), rows],
                    targets,
                    numbers[rows],
                    wants_bias,
                )
            if bias_sum is not None and gradient.bias is not None:
                bias_sum += gradient.bias
            if weight_sum is not None:
                columns = hidden[rows][:, sums.columns]
                product(gradient.logits.t(), columns, weight_sum, accumulate=number > 0)
            if sums.hidden is not None:
                later = parts is not None or slab.start > 0
                total = product(gradient.logits, weight, sums.hidden[rows], accumulate=later)
                if parts is not None:
                    sums.hidden[rows] = total
        sums.write(slab, weight_sum, bias_sum)
    if sums.hidden is not None and sums.unit is not None:
        sums.hidden.mul_(sums.unit)


def _write(gradient: Tensor | None, slab: slice, total: Tensor | None) -> None:
    if gradient is None or total is None:
        return
    if total.data_ptr() != gradient[slab].data_ptr():
        gradient[slab].copy_(total)


def _part(entry: int, engine: TorchEngine) -> int:
    return entry // engine.part_width


def _parts(slab: slice, engine: TorchEngine) -> slice:
    """The parts of the maxima that belong to a vocabulary slab."""
    return slice(_part(slab.start, engine), _part(slab.stop - 1, engine) + 1)


def _padded_like(value: Tensor | None, vocab: int, rows: int) -> Tensor:
    """A gradient of `vocab` rows, zero where nothing will be written: in the vocabulary padding,
    and everywhere if there are no labelled rows."""
    assert value is not None
    gradient = value.new_empty(vocab, *value.shape[1:])
    gradient[value.shape[0] if rows else 0 :].zero_()
    return gradient


def _spread(rows: Tensor | None, head: HeadRows, needs: Needs) -> Gradients:
    """(n, D + r) gradient of the labelled rows → (M, D) and (M, r), zero elsewhere."""

    def spread(whole: Tensor, part: Tensor) -> Tensor:
        full = torch.zeros_like(whole)
        full[head.index] = part.to(full.dtype)
        return full

    if rows is None:
        return Gradients()
    hidden, low = head.tensors.hidden, head.tensors.low_hidden
    return Gradients(
        hidden=spread(hidden, rows[:, : hidden.shape[1]]) if needs.hidden else None,
        low_hidden=(
            spread(low, rows[:, hidden.shape[1] :])
            if needs.low_hidden and low is not None
            else None
        ),
    )
