"""Forward and backward passes of every path: loops over tiles, vocabulary slab by slab.

The vocabulary is the outer loop: a slab of the weight is cast once, and a slab of its gradient is
written once, in the weight's own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fused_prefopt.ops import dropped_mass
from fused_prefopt.ops.gradients import Gradients, GradientSums, Wanted, row_factors, spread
from fused_prefopt.ops.head_rows import HeadRows
from fused_prefopt.ops.kept_buffer import find, give_back, lease
from fused_prefopt.ops.tile import (
    Details,
    EntropyGradients,
    KeptTile,
    RowGradients,
    RowStatistics,
    Tile,
    WeighedRows,
)
from fused_prefopt.ops.vocab_shard import VocabShard


@dataclass(frozen=True)
class Kept:
    """Tensors that a forward leaves for its backward.

    Attributes:
        logsumexps: (n,).
        stash: `stash`: (n, D) Σ_v exp(logit − reference) · slope · W_v, without the target's.
            Otherwise empty.
        maxima: (parts, k) the maxima that kept probabilities refer to; `stash`: (1, n) its
            references. Otherwise empty.
        ticket: (1,) finds the (k, V) tensor of exp(logit − maximum), 0 where nothing is kept.
        masses: with `drop_mass`: (parts, n) logsumexps of each part of the vocabulary. Otherwise
            empty.
    """

    logsumexps: Tensor
    stash: Tensor
    maxima: Tensor
    ticket: Tensor
    masses: Tensor


@dataclass(frozen=True)
class Upstream:
    """Results of a forward for each labelled row, and the loss's gradient by them, all (n,).

    Attributes:
        logps: log-probs.
        by_logps: d loss / d logp.
        entropies: or None where they are not wanted.
        by_entropies: d loss / d entropy, or None.
    """

    logps: Tensor
    by_logps: Tensor
    entropies: Tensor | None = None
    by_entropies: Tensor | None = None


@dataclass(frozen=True)
class Folded:
    """Statistics of the logits of this rank's rows of a head, and what is kept of them.

    Attributes:
        statistics: of the labelled rows.
        details: more of them, or None where the entropies are not wanted.
        stash, maxima, ticket, masses: as in `Kept`, or None where they are not.
    """

    statistics: RowStatistics
    details: Details | None = None
    stash: Tensor | None = None
    maxima: Tensor | None = None
    ticket: Tensor | None = None
    masses: Tensor | None = None

    def finished(self, shard: VocabShard) -> tuple[Tensor, Tensor, Kept]:
        """Log-probs (n,) and entropies (n,) or (0,) of whole rows, and what `backward` needs."""
        merged, details = shard.merge(self.statistics, self.details)
        entropies = None if details is None else details.entropies(merged)
        logps, logsumexps = merged.finish()

        def given(value: Tensor | None, dimensions: int = 1) -> Tensor:
            # As many as a compiler was told: of a batch without labels nothing is kept.
            return logps.new_empty((0,) * dimensions) if value is None else value

        ticket = torch.zeros(1, dtype=torch.int64) if self.ticket is None else self.ticket
        stash, maxima, masses = given(self.stash), given(self.maxima, 2), given(self.masses)
        return logps, given(entropies), Kept(logsumexps, stash, maxima, ticket, masses)


def forward_of(head: HeadRows) -> Callable[[HeadRows], Folded]:
    """The forward pass that a path takes."""
    if head.spec.entropy:
        return fold_details
    return weigh if head.path == "stash" else fold


def fold(head: HeadRows) -> Folded:
    """All logits, folded into the statistics of their rows; those of the first k are kept."""
    statistics = RowStatistics.empty(head.rows, head.math.accumulator, head.device)
    masses = kept = maxima = ticket = None
    if head.spec.drop_mass:
        masses = dropped_mass.no_mass(head.vocab, statistics)
    if head.kept:
        kept, ticket = lease(head.kept_size, head.math.kept, head.device)
        maxima = head.new(-(-head.vocab // head.kept_width), head.kept)
    hidden = head.hidden_rows()
    folder = head.build_engine("fold" if head.kept < head.rows or kept is None else "keep")
    keeper = folder if kept is None else head.build_engine("keep")
    together = keeper is folder and folder.keeps_some
    for rows, slab, weight, bias in head.pieces(head.row_slices(kept_apart=not together)):
        own = statistics[rows] if masses is None else dropped_mass.fresh(statistics[rows])
        tile = partial(Tile, weight=weight, bias=bias, targets=head.targets[rows], first=slab.start)
        if kept is not None and maxima is not None and rows.start < head.kept:
            here = slice(rows.start, min(rows.stop, head.kept))
            keeper.fold_and_keep(tile(hidden[rows]), own, kept[here], maxima[:, here])
        else:
            folder.fold(tile(hidden[rows]), own)
        if masses is not None:
            dropped_mass.add_mass(masses[slab.start // dropped_mass.PART, rows], own)
            statistics[rows].merge(own)
    return Folded(statistics, maxima=maxima, ticket=ticket, masses=masses)


def fold_details(head: HeadRows) -> Folded:
    """All logits, folded into the statistics of their rows and more of them."""
    statistics = RowStatistics.empty(head.rows, head.math.accumulator, head.device)
    details = Details.empty(head.rows, head.math.accumulator, head.device)
    engine, hidden = head.build_engine("details"), head.hidden_rows()
    for rows, slab, weight, bias in head.pieces(head.row_slices()):
        tile = partial(Tile, weight=weight, bias=bias, targets=head.targets[rows], first=slab.start)
        engine.fold_details(tile(hidden[rows]), statistics[rows], details[rows])
    return Folded(statistics, details)


def weigh(head: HeadRows) -> Folded:
    """All logits, folded, and the sums of the weight's rows weighed by their exponentials."""
    statistics = RowStatistics.empty(head.rows, head.math.accumulator, head.device)
    engine, hidden = head.build_engine("weigh"), head.hidden_rows()
    sums = head.new(head.rows, head.hidden_size)
    lowest = torch.finfo(head.math.accumulator).min
    references = head.new(1, head.rows).fill_(lowest)
    buffer = head.slab_buffer()
    for rows, slab, weight, bias in head.pieces(head.row_slices()):
        weights = buffer[: rows.stop - rows.start, : slab.stop - slab.start]
        before = sums[rows] if slab.start else None
        targets, own = head.targets[rows], statistics[rows]
        for part in head.parts(slab.stop - slab.start):
            own_bias = None if bias is None else bias[part]
            tile = partial(Tile, weight=weight[part], bias=own_bias, targets=targets)
            weighed = WeighedRows(references[0, rows], weights, part.start, before)
            first = slab.start + part.start
            engine.fold_and_weigh(tile(hidden[rows], first=first), own, weighed, part)
        head.add_product(weights, weight, sums[rows], accumulate=slab.start > 0)
    return Folded(statistics, stash=sums, maxima=references)


def backward(
    head: HeadRows, kept: Kept, upstream: Upstream, padded_vocab: int, wanted: Wanted
) -> Gradients:
    """Gradients of ``(by_logps * logps + by_entropies * entropies).sum()``.

    Args:
        kept: of `Folded.finished`.
        upstream: of the labelled rows.
        padded_vocab: rows of the weight with its padding.
        wanted: the gradients to form.
    """
    if head.path == "stash":
        return _unstash(head, kept, upstream, wanted)
    probabilities = None
    if head.kept:
        probabilities = find(kept.ticket, head.kept_size, head.math.kept)
        if probabilities is None:
            head = replace(head, spec=replace(head.spec, path="recompute", kept_rows=0))
    factors = [upstream.by_logps * -head.math.slope]
    if upstream.by_entropies is not None:
        factors.append(upstream.by_entropies * -head.math.slope)
    scales, unit = row_factors(factors, head.operand)
    sums = GradientSums(head, padded_vocab, wanted, unit, scattered=head.spec.drop_mass > 0)
    if head.rows:
        entropy = None
        if upstream.entropies is not None and len(scales) == 2:
            entropy = EntropyGradients(upstream.entropies, scales[1])
        _add_tiles(head, kept, probabilities, upstream.logps, scales[0], entropy, sums)
    del probabilities
    give_back(kept.ticket)
    return sums.gradients()


def _unstash(head: HeadRows, kept: Kept, upstream: Upstream, wanted: Wanted) -> Gradients:
    """``by_logps · ((1 − p_y) W_y − Σ_v p_v W_v)`` of each row, the sum without the target y."""
    shares = (kept.maxima[0] - kept.logsumexps).exp_().neg_()
    inside = (head.targets >= 0) & (head.targets < head.vocab)
    own = head.math.target_residual(upstream.logps, kept.logsumexps).neg().where(inside, 0.0)
    return spread(head, kept.stash, wanted, upstream.by_logps * head.math.slope, (shares, own))


def _add_tiles(
    head: HeadRows,
    kept: Kept,
    probabilities: Tensor | None,
    logps: Tensor,
    scale: Tensor,
    entropy: EntropyGradients | None,
    sums: GradientSums,
) -> None:
    parts, logsumexps = None, kept.logsumexps
    if head.spec.drop_mass:
        budget = head.spec.drop_mass / head.shard.size
        parts = dropped_mass.choose_parts(kept.masses, logsumexps, head.targets, budget)
        left, out = head.shard.add(parts.kept_mass), head.shard.add(parts.dropped_mass)
        # The exact gradient of the log-prob among what is kept: it still sums to zero.
        remaining = torch.where(out < 0.5, torch.log1p(-out), left.log())
        logps, logsumexps = logps - remaining, logsumexps + remaining
    residuals = head.math.target_residual(logps, logsumexps)
    numbers = RowGradients(logsumexps, residuals, scale, entropy)
    finished = head.keeps_gradients and not head.spec.drop_mass and not sums.wants_bias
    filler = SlabGradients(head, numbers, probabilities, kept.maxima, finished)
    sums.factor = filler.factor
    for slab, weight, bias in head.slabs():
        sums.begin(slab)
        slices: Sequence[slice | Tensor] = head.row_slices()
        if parts is not None:
            slices = parts.rows(slab, head.tiles.rows)
        for rows in slices:
            gradient = filler.fill(slab, rows, weight, bias, sums)
            sums.add(gradient, rows, filler.hidden[rows], weight)
        sums.finish()


class SlabGradients:
    """Fills slabs of the gradient of the logits: from what was kept, and by building logits again.

    Args:
        head: the rows.
        numbers: what their gradients are made of.
        kept: (k, V) probabilities of the first rows, or None.
        maxima: (parts, k) that they refer to.
        finished: the kept ones are the gradient, but for a factor and the targets' entries.

    Attributes:
        factor: (n,) that is missing in each row of the gradients, or None.
        hidden: the rows that the weight's gradient sums, with that factor.
    """

    def __init__(
        self,
        head: HeadRows,
        numbers: RowGradients,
        kept: Tensor | None,
        maxima: Tensor,
        finished: bool,
    ) -> None:
        self._head, self._numbers, self._kept, self._maxima = head, numbers, kept, maxima
        self.factor = None
        if finished and kept is not None:
            engine = head.build_engine("kept")
            whole = KeptTile(kept[:, : head.vocab], maxima, head.kept_width, head.targets)
            self.factor = engine.finish_kept(whole, numbers)
        self.hidden = head.hidden_rows(self.factor)
        self._in_place = kept is not None and head.in_place and not head.spec.drop_mass
        self._buffer = None if self._in_place else head.slab_buffer()

    def fill(
        self,
        slab: slice,
        rows: slice | Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sums: GradientSums,
    ) -> Tensor:
        """The gradient (c, v) of a tile's logits, valid until the next; its bias sums are added."""
        if isinstance(rows, Tensor):
            # Scattered rows have all been kept, or none.
            size, kept = rows.shape[0], None if self._kept is None else slice(0, rows.shape[0])
        else:
            size = rows.stop - rows.start
            kept = slice(0, min(size, max(0, self._head.kept - rows.start)))
        width = slab.stop - slab.start
        if self._in_place:
            assert self._kept is not None
            out = self._kept[rows, slab]
        else:
            assert self._buffer is not None
            out = self._buffer[:size, :width]
        found = 0 if kept is None else kept.stop
        if found and self.factor is None:
            self._from_kept(slab, _first(rows, found), out[:found], sums)
        if found < size:
            rest = _beyond(rows, found)
            hidden = self.hidden[rows][found:]
            self._rebuild(slab.start, rest, hidden, weight, bias, out[found:], sums)
        return out

    def _from_kept(
        self, slab: slice, rows: slice | Tensor, out: Tensor, sums: GradientSums
    ) -> None:
        assert self._kept is not None
        head, maxima = self._head, self._maxima[:, rows]
        where = maxima, head.kept_width, head.targets[rows], slab.start
        tile, numbers = KeptTile(self._kept[rows, slab], *where), self._numbers[rows]
        found = head.build_engine("kept").kept_gradient(tile, numbers, out, sums.wants_bias)
        sums.add_bias(found, slice(0, slab.stop - slab.start))

    def _rebuild(
        self,
        start: int,
        rows: slice | Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        sums: GradientSums,
    ) -> None:
        numbers, targets = self._numbers[rows], self._head.targets[rows]
        engine = self._head.build_engine("rebuild" if numbers.entropy is None else "entropy")
        for part in self._head.parts(out.shape[1]):
            own_bias = None if bias is None else bias[part]
            tile = Tile(hidden, weight[part], own_bias, targets, start + part.start)
            sums.add_bias(engine.gradient(tile, numbers, out[:, part], sums.wants_bias), part)


def _first(rows: slice | Tensor, count: int) -> slice | Tensor:
    return slice(rows.start, rows.start + count) if isinstance(rows, slice) else rows[:count]


def _beyond(rows: slice | Tensor, count: int) -> slice | Tensor:
    return slice(rows.start + count, rows.stop) if isinstance(rows, slice) else rows[count:]
