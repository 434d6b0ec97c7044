"""The backward pass of every path: a loop over tiles, vocabulary slab by slab.

The vocabulary is the outer loop, so a slab of the weight's gradient is written once, in the
weight's own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_prefopt.ops import dropped_mass
from fused_prefopt.ops.forward import Kept
from fused_prefopt.ops.gradient_sums import Gradients, GradientSums, Needs, of_rows, row_factors
from fused_prefopt.ops.head_rows import HeadRows
from fused_prefopt.ops.tile import EntropyGradients, RowGradients, Tile
from fused_prefopt.ops.workspace import find, give_back


@dataclass(frozen=True)
class Upstream:
    """What a forward has returned for each labelled row, and the loss's gradient by it, all (n,).

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


def backward(
    head: HeadRows, kept: Kept, upstream: Upstream, padded_vocab: int, needs: Needs
) -> Gradients:
    """Gradients of ``(by_logps * logps + by_entropies * entropies).sum()``.

    Args:
        kept: what `forward` has returned.
        upstream: of the labelled rows.
        padded_vocab: rows of the weight with its padding.
        needs: which gradients are wanted.
    """
    if head.path == "stash":
        return of_rows(head, kept.stash * upstream.by_logps.unsqueeze(1), needs)
    probabilities = None
    if head.path == "local":
        probabilities = find(kept.ticket, head.kept_size, head.math.kept)
        if probabilities is None:
            head = replace(head, path="recompute")
    factors = [upstream.by_logps * -head.math.slope]
    if upstream.by_entropies is not None:
        factors.append(upstream.by_entropies * -head.math.slope)
    scales, unit = row_factors(factors, head.operand)
    sums = GradientSums(head, padded_vocab, needs, unit, scattered=head.drop_mass > 0)
    if head.rows:
        entropy = None
        if upstream.entropies is not None and len(scales) == 2:
            entropy = EntropyGradients(upstream.entropies, scales[1])
        _add_tiles(head, kept, probabilities, upstream.logps, scales[0], entropy, sums)
    give_back(kept.ticket)
    return sums.gradients()


def _add_tiles(
    head: HeadRows,
    kept: Kept,
    probabilities: Tensor | None,
    logps: Tensor,
    scale: Tensor,
    entropy: EntropyGradients | None,
    sums: GradientSums,
) -> None:
    engine, hidden = head.build_engine(), head.hidden_rows()
    parts, logsumexps = None, kept.logsumexps
    if head.drop_mass:
        budget = head.drop_mass / head.shard.size
        parts = dropped_mass.choose_parts(kept.masses, logsumexps, head.targets, budget)
        left, out = head.shard.add(parts.kept_mass), head.shard.add(parts.dropped_mass)
        # The exact gradient of the log-prob among what is kept: it still sums to zero.
        remaining = torch.where(out < 0.5, torch.log1p(-out), left.log())
        logps, logsumexps = logps - remaining, logsumexps + remaining
    residuals = head.math.target_residual(logps, logsumexps)
    numbers = RowGradients(logsumexps, residuals, scale, entropy)
    for slab, weight, bias in head.slabs():
        sums.begin(slab)
        slices: Sequence[slice | Tensor] = head.row_slices()
        if parts is not None:
            slices = parts.rows(slab, head.shape.rows)
        for rows in slices:
            targets, tile_hidden = head.targets[rows] - slab.start, hidden[rows]
            if probabilities is None:
                tile = Tile(tile_hidden, weight, bias, targets)
                gradient = engine.gradient(tile, numbers[rows], sums.wants_bias)
            else:
                gradient = engine.kept_gradient(
                    probabilities[rows, slab],
                    kept.maxima[engine.parts(slab), rows],
                    targets,
                    numbers[rows],
                    sums.wants_bias,
                )
            sums.add(gradient, rows, tile_hidden, weight)
        sums.finish()
