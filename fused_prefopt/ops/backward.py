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
from fused_prefopt.ops.gradient_sums import Gradients, GradientSums, Needs, of_rows
from fused_prefopt.ops.head_rows import HeadRows
from fused_prefopt.ops.tile import EntropyGradients, RowGradients, Tile
from fused_prefopt.ops.workspace import find, give_back

# Rows whose gradient is smaller than the largest row's by this factor change nothing in any dtype,
# but their products with small probabilities are denormals, which a CPU multiplies 20x slower.
_NEGLIGIBLE = 1e-18


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
    scale, entropy, unit = _unit_scale(head, upstream)
    sums = GradientSums(head, padded_vocab, needs, unit, scattered=head.drop_mass > 0)
    if head.rows:
        _add_tiles(head, kept, probabilities, upstream.logps, scale, entropy, sums)
    give_back(kept.ticket)
    return sums.gradients()


def _unit_scale(
    head: HeadRows, upstream: Upstream
) -> tuple[Tensor, EntropyGradients | None, Tensor | None]:
    """Factors on the rows' gradients, and the unit that they are in, None for 1."""
    scales = [upstream.by_logps * -head.math.slope]
    if upstream.by_entropies is not None:
        scales.append(upstream.by_entropies * -head.math.slope)
    if not head.rows:
        return scales[0], None, None
    sizes = [scale.abs() for scale in scales]
    largest = torch.stack(sizes).amax()
    scales = [
        scale.masked_fill(size < _NEGLIGIBLE * largest, 0.0)
        for scale, size in zip(scales, sizes, strict=True)
    ]
    unit = None
    if head.operand == torch.float16:
        # fp16 holds nothing below 6e-8, which a row's probability times its gradient easily is.
        unit = largest.where(largest > 0, 1.0)
        scales = [scale / unit for scale in scales]
    if upstream.entropies is None or len(scales) == 1:
        return scales[0], None, unit
    return scales[0], EntropyGradients(upstream.entropies, scales[1]), unit


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
        parts, dropped = dropped_mass.choose_parts(kept.masses, logsumexps, head.targets, budget)
        # The exact gradient of the log-prob among what is kept: it still sums to zero.
        remaining = torch.log1p(-head.shard.add(dropped))
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
