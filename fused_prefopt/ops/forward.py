"""The forward pass of every path: a loop over tiles of the logits, vocabulary slab by slab.

The vocabulary is the outer loop, so a slab of the weight is cast once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_prefopt.ops import dropped_mass
from fused_prefopt.ops.head_rows import HeadRows
from fused_prefopt.ops.tile import Details, RowStatistics, Tile
from fused_prefopt.ops.torch_engine import product
from fused_prefopt.ops.workspace import lease


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


def forward(head: HeadRows) -> tuple[Tensor, Tensor, Kept]:
    """Log-probs of the labelled rows (n,), entropies (n,) or (0,), and what `backward` needs."""
    engine, slices, hidden = head.build_engine(), head.row_slices(), head.hidden_rows()
    statistics = RowStatistics.empty(head.rows, head.math.accumulator, head.device)
    gradient, maxima, kept, masses = head.new(0), head.new(0), head.new(0), head.new(0)
    ticket = torch.zeros(1, dtype=torch.int64)
    if head.path == "stash":
        gradient = head.new(head.rows, head.hidden_size).zero_()
    elif head.path == "local":
        kept, ticket = lease(head.kept_size, head.math.kept, head.device)
        maxima = head.new(engine.parts(slice(0, head.vocab)).stop, head.rows)
    if head.drop_mass:
        masses = dropped_mass.no_mass(head.vocab, statistics)
    details = None
    if head.entropy:
        details = Details.empty(head.rows, head.math.accumulator, head.device)
    for slab, weight, bias in head.slabs():
        for rows in slices:
            tile = Tile(hidden[rows], weight, bias, head.targets[rows] - slab.start)
            own = dropped_mass.fresh(statistics[rows]) if head.drop_mass else statistics[rows]
            if head.path == "stash":
                weights = engine.fold_and_weigh(tile, own, gradient[rows])
                product(weights, weight, gradient[rows], accumulate=True)
            elif head.path == "local":
                maxima[engine.parts(slab), rows] = engine.fold_and_keep(tile, own, kept[rows, slab])
            elif details is not None:
                engine.fold_details(tile, own, details[rows], slab.start)
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
    entropies = head.new(0) if details is None else details.entropies(merged)
    return merged.logps(), entropies, Kept(merged.logsumexps(), gradient, maxima, ticket, masses)


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
