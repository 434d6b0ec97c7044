"""The four paths: loops over tiles of the logits, vocabulary slab by slab.

The vocabulary is the outer loop, so a slab of the weight is cast once and a slab of its gradient
is written once, in the weight's own dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_prefopt.ops.head_rows import HeadRows
from fused_prefopt.ops.torch_engine import RowStatistics
from fused_prefopt.ops.workspace import find, give_back, lease


@dataclass(frozen=True)
class Kept:
    """What a forward leaves for its backward.

    Attributes:
        logsumexps: (n,).
        stash: `stash`: (n, D) d logp / d hidden. Otherwise empty.
        maxima: `local`: (slabs, n) the running maxima that its probabilities refer to. Otherwise
            empty.
        ticket: `local`: (1,) finds the (n, V) tensor of exp(logit − running maximum) in the
            workspace. Otherwise 0.
    """

    logsumexps: Tensor
    stash: Tensor
    maxima: Tensor
    ticket: Tensor


def forward(head: HeadRows) -> tuple[Tensor, Kept]:
    """Log-probs of the labelled rows (n,), and what `backward` needs."""
    path, engine = head.path, head.parts
    vocab, hidden_size = head.weight.shape
    slices, hidden = head.row_slices(), head.hidden_rows()
    statistics = RowStatistics.empty(head.rows, head.math.accumulator, head.hidden.device)
    gradient = head.new(head.rows, hidden_size).zero_() if path == "stash" else head.new(0)
    kept, ticket = head.new(0), torch.zeros(1, dtype=torch.int64)
    if path == "local":
        kept, ticket = lease((head.rows, vocab), head.math.kept, head.hidden.device)
    # A tile that is kept in the dtype it is computed in needs no buffer of its own.
    in_place = path == "local" and head.math.kept == head.math.accumulator
    buffer = kept if in_place else head.new(head.shape.rows, head.shape.vocab)
    maxima = []
    for slab, weight, bias in head.slabs():
        for rows in slices:
            tile = kept[rows, slab] if in_place else _tile(buffer, rows, slab)
            engine.logits(hidden[rows], weight, bias, head.math, tile)
            bent = path == "stash" and head.math.softcap is not None
            slope = head.math.cap_slope(tile) if bent else None
            targets = head.targets[rows] - slab.start
            factor = engine.fold(tile, statistics[rows], targets, path in ("stash", "local"))
            if path == "stash":
                gradient[rows].mul_(factor.unsqueeze(1))
                weights = tile if slope is None else tile.mul_(slope)
                engine.product(weights.to(head.operand), weight, gradient[rows], accumulate=True)
            elif path == "local" and not in_place:
                kept[rows, slab] = tile
        if path == "local":
            maxima.append(statistics.maximum.clone())
    if path == "stash":
        _finish_stash(head, gradient, statistics)
    stacked = torch.stack(maxima) if maxima else head.new(0)
    return statistics.logps(), Kept(statistics.logsumexps(), gradient, stacked, ticket)


def _finish_stash(head: HeadRows, gradient: Tensor, statistics: RowStatistics) -> None:
    """Turn Σ_v exp(z_v − max) W_v into d logp / d hidden = W_y − Σ_v p_v W_v, in place."""
    for rows in head.row_slices():
        target = head._cast(head.weight[head.targets[rows]]).to(gradient.dtype)
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
        size = (head.rows, head.weight.shape[0])
        probabilities = find(kept.ticket, size, head.math.kept)
        if probabilities is None:
            head = replace(head, path="recompute")
    scale = upstream * -head.math.slope
    dhidden = head.new(head.rows, head.weight.shape[1]) if needs[0] else None
    dweight = _padded_like(head.weight, padded_vocab, head.rows) if needs[1] else None
    dbias = _padded_like(head.bias, padded_vocab, head.rows) if needs[2] else None
    # Without labelled rows no slab would be written: the gradients are the zeros they start as.
    if head.rows:
        _sum_gradients(head, kept, probabilities, logps, scale, dhidden, dweight, dbias)
    give_back(kept.ticket)
    if dhidden is not None:
        dhidden.mul_(scale.unsqueeze(1))
    return Gradients(None if dhidden is None else _spread(dhidden, head), dweight, dbias)


def _sum_gradients(
    head: HeadRows,
    kept: Kept,
    probabilities: Tensor | None,
    logps: Tensor,
    scale: Tensor,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """Write the sums over tiles: (n, D) without its row `scale` (n,), (V, D) and (V,) with it."""
    engine, slices = head.parts, head.row_slices()
    hidden = head.hidden_rows() if probabilities is None else None
    scaled = None if dweight is None else head.hidden_rows(scale)
    buffer = head.new(head.shape.rows, head.shape.vocab)
    for number, (slab, weight, bias) in enumerate(head.slabs()):
        weight_sum = None if dweight is None else _accumulator(head, dweight[slab])
        bias_sum = None if dbias is None else head.new(weight.shape[0]).zero_()
        for rows in slices:
            tile = _tile(buffer, rows, slab)
            targets = head.targets[rows] - slab.start
            if hidden is not None:
                engine.logits(hidden[rows], weight, bias, head.math, tile)
                engine.residual(tile, kept.logsumexps[rows], targets, logps[rows], head.math)
            elif probabilities is not None:
                engine.kept_residual(
                    probabilities[rows, slab],
                    kept.maxima[number, rows],
                    kept.logsumexps[rows],
                    targets,
                    logps[rows],
                    head.math,
                    tile,
                )
            if bias_sum is not None:
                bias_sum.addmv_(tile.t(), scale[rows])
            operand = tile.to(head.operand)
            if weight_sum is not None and scaled is not None:
                first = rows.start == 0
                engine.product(operand.t(), scaled[rows], weight_sum, accumulate=not first)
            if dhidden is not None:
                engine.product(operand, weight, dhidden[rows], accumulate=number > 0)
        if dweight is not None and weight_sum is not None:
            dweight[slab].copy_(weight_sum)
        if dbias is not None and bias_sum is not None:
            dbias[slab].copy_(bias_sum)


def _accumulator(head: HeadRows, slab: Tensor) -> Tensor:
    """The slab of the gradient itself where it is as wide as an accumulator, else a buffer."""
    return slab if slab.dtype == head.math.accumulator else head.new(*slab.shape)


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


def _tile(buffer: Tensor, rows: slice, slab: slice) -> Tensor:
    """A contiguous (rows, slab) view of the buffer's storage."""
    height, width = rows.stop - rows.start, slab.stop - slab.start
    return buffer.view(-1)[: height * width].view(height, width)
