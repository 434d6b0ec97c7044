"""Merge statistics over parts of the vocabulary into each row's running ones."""

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_prefopt.kernels.fold_logits import Partials
from fused_prefopt.kernels.tiles import blocks


@triton.jit
def _merge_partials_kernel(
    part_maximum,  # (parts, rows)
    part_total,  # (parts, rows)
    part_weighted,  # (parts, rows)
    part_squares,  # (parts, rows)
    part_logit_sum,  # (parts, rows)
    part_best,  # (parts, rows)
    maximum,  # (rows,)
    total,  # (rows,)
    weighted,  # (rows,)
    squares,  # (rows,)
    logit_sum,  # (rows,)
    best,  # (rows,)
    reference,  # (rows,)
    factor,  # (rows,)
    parts,
    rows,
    offset,
    slack,
    HAS_DETAILS: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    highest = tl.load(maximum + row, mask=inside, other=0.0)
    sums = tl.load(total + row, mask=inside, other=0.0)
    if HAS_DETAILS:
        terms = tl.load(weighted + row, mask=inside, other=0.0)
        squared = tl.load(squares + row, mask=inside, other=0.0)
        logits = tl.load(logit_sum + row, mask=inside, other=0.0)
        winner = tl.load(best + row, mask=inside, other=0)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        entry = part.to(tl.int64)[:, None] * rows + row[None, :]
        there = (part < parts)[:, None] & inside[None, :]
        theirs = tl.load(part_maximum + entry, mask=there, other=-3.4028234663852886e38)
        above = tl.maximum(highest, tl.max(theirs, 0))
        shrink, shares = tl.exp(highest - above), tl.exp(theirs - above[None, :])
        added = tl.load(part_total + entry, mask=there, other=0.0)
        if HAS_DETAILS:
            # Where nothing is left of a part its shift may be infinite: 0 · inf would be NaN.
            moved = tl.where(shrink > 0, shrink * (terms + (highest - above) * sums), 0.0)
            new = tl.load(part_weighted + entry, mask=there, other=0.0)
            new = tl.where(shares > 0, shares * (new + (theirs - above[None, :]) * added), 0.0)
            terms = moved + tl.sum(new, 0)
            new = tl.load(part_squares + entry, mask=there, other=0.0)
            squared = squared * shrink * shrink + tl.sum(new * shares * shares, 0)
            logits += tl.sum(tl.load(part_logit_sum + entry, mask=there, other=0.0), 0)
            place = tl.argmax(theirs, 0)
            first = tl.load(part_best + entry, mask=there, other=0)
            chosen = tl.sum(tl.where(part[:, None] == start + place[None, :], first, 0), 0)
            winner = tl.where(above > highest, chosen + offset, winner)
        sums = sums * shrink + tl.sum(added * shares, 0)
        highest = above
    if HAS_REFERENCE:
        before = tl.load(reference + row, mask=inside, other=0.0)
        moved = tl.where(highest - before > slack, highest, before)
        tl.store(reference + row, moved, mask=inside)
        tl.store(factor + row, tl.exp(before - moved), mask=inside)
    tl.store(maximum + row, highest, mask=inside)
    tl.store(total + row, sums, mask=inside)
    if HAS_DETAILS:
        tl.store(weighted + row, terms, mask=inside)
        tl.store(squares + row, squared, mask=inside)
        tl.store(logit_sum + row, logits, mask=inside)
        tl.store(best + row, winner, mask=inside)


class Details(Protocol):
    """Running statistics beyond the log-sum-exp, all (c,): see `Partials`; `best` is int32."""

    @property
    def weighted(self) -> Tensor: ...
    @property
    def squares(self) -> Tensor: ...
    @property
    def logit_sum(self) -> Tensor: ...
    @property
    def best(self) -> Tensor: ...


def merge_partials(
    partials: Partials,
    maximum: Tensor,
    total: Tensor,
    details: Details | None = None,
    offset: int = 0,
    reference: Tensor | None = None,
    slack: float = 0.0,
) -> Tensor:
    """Fold partial statistics into running ones, part by part in a fixed order.

    Args:
        partials: of (parts, c).
        maximum: (c,) fp32 running maxima, updated in place; start from the lowest finite number.
        total: (c,) fp32 running Σ exp(logit − maximum), updated in place.
        details: the same for the optional statistics; `partials` must have them.
        offset: vocabulary index at which these parts start.
        reference: (c,) fp32 that follows the maximum where that exceeds it by more than `slack`,
            updated in place; or None.

    Returns:
        (c,) exp(old reference − new reference); without one it means nothing.
    """
    parts, rows = partials.maximum.shape
    factor = torch.empty_like(maximum)
    if rows:
        block = 32
        _merge_partials_kernel[(blocks(rows, block),)](
            partials.maximum,
            partials.total,
            partials.weighted,
            partials.squares,
            partials.logit_sum,
            partials.best,
            maximum,
            total,
            None if details is None else details.weighted,
            None if details is None else details.squares,
            None if details is None else details.logit_sum,
            None if details is None else details.best,
            reference,
            factor,
            parts,
            rows,
            offset,
            slack,
            HAS_DETAILS=details is not None,
            HAS_REFERENCE=reference is not None,
            PARTS=32,
            ROWS=block,
            num_warps=4,
            # A row's largest part must get the weight exp(0) = 1 exactly.
            enable_fp_fusion=False,
        )
    return factor
