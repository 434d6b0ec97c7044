"""The four paths: loops over tiles of the logits, vocabulary slab by slab.

The vocabulary is the outer loop, so a slab of the weight is cast once and a slab of its gradient
is written once, in the weight's own dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

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
    """

    logsumexps: Tensor
    stash: Tensor
    maxima: Tensor
    ticket: Tensor


def forward(head: HeadRows) -> tuple[Tensor, Kept]:
    """Log-probs of the labelled rows (n,), and what `backward` needs."""
    engine, (vocab, hidden_size) = head.build_engine(), head.weight.shape
    slices, hidden = head.row_slices(), head.hidden_rows()
    statistics = RowStatistics.empty(head.rows, head.math.accumulator, head.device)
    gradient, maxima, kept = head.new(0), head.new(0), head.new(0)
    ticket = torch.zeros(1, dtype=torch.int64)
    if head.path == "stash":
        gradient = head.new(head.rows, hidden_size).zero_()
    elif head.path == "local":
        kept, ticket = lease(head.kept_size, head.math.kept, head.device)
        maxima = head.new(_part(vocab - 1, engine) + 1, head.rows)
    for slab, weight, bias in head.slabs():
        for rows in slices:
            tile = Tile(hidden[rows], weight, bias, head.targets[rows] - slab.start)
            if head.path == "stash":
                weights = engine.fold_and_weigh(tile, statistics[rows], gradient[rows])
                product(weights, weight, gradient[rows], accumulate=True)
            elif head.path == "local":
                highest = engine.fold_and_keep(tile, statistics[rows], kept[rows, slab])
                maxima[_parts(slab, engine), rows] = highest
            else:
                engine.fold(tile, statistics[rows])
    if head.path == "stash":
        _finish_stash(head, gradient, statistics)
    return statistics.logps(), Kept(statistics.logsumexps(), gradient, maxima, ticket)


def _finish_stash(head: HeadRows, gradient: Tensor, statistics: RowStatistics) -> None:
    """Turn Σ_v exp(z_v − max) W_v into d logp / d hidden = W_y − Σ_v p_v W_v, in place."""
    for rows in head.row_slices():
        target = head.rounded(head.weight[head.targets[rows]]).to(gradient.dtype)
        if head.math.softcap is not None:
            target.mul_(head.math.cap_slope(statistics.target[rows]).unsqueeze(1))
        gradient[rows].div_(-statistics.sum[rows].unsqueeze(1)).add_(target).mul_(head.math.slope)


@dataclass(frozen=True)
class Gradients:
    """Gradients in their tensors' own dtypes: hidden (M, D), weight (V, D), bias (V,), or None."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def backward(
    head: HeadRows,
    kept: Kept,
    logps: Tensor,
    upstream: Tensor,
    padded_vocab: int,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients of ``(upstream * logps).sum()``.

    Args:
        kept: what `forward` has returned.
        logps: (n,) log-probs of the labelled rows.
        upstream: (n,) d loss / d logp.
        padded_vocab: rows of the weight with its padding.
        needs: whether hidden, weight and bias need a gradient.
    """
    if head.path == "stash":
        dhidden = kept.stash * upstream.unsqueeze(1) if needs[0] else None
        return Gradients(None if dhidden is None else _spread(dhidden, head), None, None)

    probabilities = None
    if head.path == "local":
        probabilities = find(kept.ticket, head.kept_size, head.math.kept)
        if probabilities is None:
            head = replace(head, path="recompute")
    dhidden = head.new(head.rows, head.weight.shape[1]) if needs[0] else None
    dweight = _padded_like(head.weight, padded_vocab, head.rows) if needs[1] else None
    dbias = _padded_like(head.bias, padded_vocab, head.rows) if needs[2] else None
    # Without labelled rows no slab would be written: the gradients are the zeros they start as.
    if head.rows:
        sums = _Sums(dhidden, dweight, dbias, *_unit_scale(head, upstream * -head.math.slope))
        _sum_gradients(head, kept, probabilities, logps, sums)
    give_back(kept.ticket)
    return Gradients(None if dhidden is None else _spread(dhidden, head), dweight, dbias)


@dataclass(frozen=True)
class _Sums:
    """Where the sums over tiles go: (n, D), (V, D), (V,) or None; the rows' scale (n,) and the
    unit in which it is given, None for 1."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor
    unit: Tensor | None


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
    engine, slices, hidden = head.build_engine(), head.row_slices(), head.hidden_rows()
    residuals = head.math.target_residual(logps, kept.logsumexps)
    numbers = RowGradients(kept.logsumexps, residuals, sums.scale)
    for slab, weight, bias in head.slabs():
        wants_bias = sums.bias is not None
        bias_sum = head.new(weight.shape[0]).zero_() if wants_bias else None
        weight_sum = None if sums.weight is None else _accumulator(head, sums.weight[slab])
        for rows in slices:
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
                later = rows.start > 0
                product(gradient.logits.t(), hidden[rows], weight_sum, accumulate=later)
            if sums.hidden is not None:
                later = slab.start > 0
                product(gradient.logits, weight, sums.hidden[rows], accumulate=later)
        _write(sums.weight, slab, weight_sum, sums.unit)
        _write(sums.bias, slab, bias_sum, sums.unit)
    if sums.hidden is not None and sums.unit is not None:
        sums.hidden.mul_(sums.unit)


def _accumulator(head: HeadRows, slab: Tensor) -> Tensor:
    """The slab of the gradient itself where nothing is rounded twice, else a buffer."""
    one_product = head.rows <= head.shape.rows and slab.dtype == head.operand
    if slab.dtype == head.math.accumulator or (one_product and slab.dtype == torch.bfloat16):
        return slab
    return head.new(*slab.shape)


def _write(gradient: Tensor | None, slab: slice, total: Tensor | None, unit: Tensor | None) -> None:
    if gradient is None or total is None:
        return
    if unit is not None:
        total = total.mul_(unit)
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


def _spread(rows: Tensor, head: HeadRows) -> Tensor:
    """(n, D) gradient of the labelled rows → (M, D), zero elsewhere, in hidden's dtype."""
    full = torch.zeros_like(head.hidden)
    full[head.index] = rows.to(full.dtype)
    return full
