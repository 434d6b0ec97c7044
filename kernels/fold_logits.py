"""Fused forward: logits tile by tile, folded to partial statistics; these merged into their rows'.

The logits are never in memory. `fold_logits` leaves statistics of each row over parts of the
vocabulary (`Partials`), `merge_partials` folds them into its running ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_prefopt.kernels.architectures import Block
from fused_prefopt.kernels.tiles import blocks, logits_tile, tile_of, tile_operands


@triton.jit
def _fold_logits_kernel(
    hidden,  # (rows, depth), pointer or descriptor
    weight,  # (vocab, depth), pointer or descriptor
    bias,  # (vocab,)
    targets,  # (rows,)
    maximum,  # (parts, rows)
    total,  # (parts, rows)
    target_logit,  # (rows,)
    kept,  # (rows, vocab)
    weighted,  # (parts, rows)
    squares,  # (parts, rows)
    logit_sum,  # (parts, rows)
    best,  # (parts, rows)
    first,
    rows,
    vocab,
    depth,
    hidden_stride,
    weight_stride,
    kept_stride,
    alpha,
    ceiling,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    HAS_DETAILS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    VOCAB: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_block, part = tile_of(tl.program_id(0), rows, vocab, ROWS, VOCAB, GROUP)
    first_row, first_column = row_block * ROWS, part * VOCAB
    logits = logits_tile(
        hidden,
        weight,
        bias,
        first_row,
        first_column,
        rows,
        vocab,
        depth,
        hidden_stride,
        weight_stride,
        alpha,
        ceiling,
        HAS_BIAS,
        HAS_CAP,
        DESCRIPTORS,
        EVEN_DEPTH,
        ROWS,
        VOCAB,
        DEPTH,
    )
    row = first_row + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, VOCAB)
    inside, real = row < rows, columns < vocab

    # The target's logit is the very number that enters the sum below.
    # In 32 bits: as 64 the comparisons of a wide tile would take registers that it lacks.
    target = (tl.load(targets + row, mask=inside, other=-1) - first).to(tl.int32)
    found = tl.sum(tl.where(columns[None, :] == target[:, None], logits, 0.0), 1)
    here = (target >= first_column) & (target < tl.minimum(first_column + VOCAB, vocab))
    tl.store(target_logit + row, found, mask=inside & here)

    partial = part.to(tl.int64) * rows + row
    if HAS_DETAILS:
        summed = tl.sum(tl.where(real[None, :], logits, 0.0), 1)
        tl.store(logit_sum + partial, summed, mask=inside)

    logits = tl.where(real[None, :], logits, -float("inf"))
    if HAS_DETAILS:
        tl.store(best + partial, first_column + tl.argmax(logits, 1), mask=inside)
    # A finite floor instead of -inf: rows whose logits are all -inf then sum to zero, not NaN.
    # NaN itself must reach the sum, where it makes the row's log-prob NaN.
    highest = tl.maximum(tl.max(logits, 1), -3.4028234663852886e38)
    tl.store(maximum + partial, highest, mask=inside)
    below = logits - highest[:, None]
    exponentials = tl.exp(below)
    tl.store(total + partial, tl.sum(exponentials, 1), mask=inside)
    if HAS_KEPT:
        entry = row.to(tl.int64)[:, None] * kept_stride + columns[None, :]
        stored = exponentials.to(kept.dtype.element_ty)
        tl.store(kept + entry, stored, mask=inside[:, None] & real[None, :])
    if HAS_DETAILS:
        # Where the exponential is 0 its logarithm may be -inf, and their product NaN.
        terms = tl.where(exponentials > 0, below * exponentials, 0.0)
        tl.store(weighted + partial, tl.sum(terms, 1), mask=inside)
        tl.store(squares + partial, tl.sum(exponentials * exponentials, 1), mask=inside)


@dataclass(frozen=True)
class Partials:
    """Statistics of each row over parts of the vocabulary, `width` entries a part.

    Attributes:
        maximum: (parts, c) fp32 largest logit.
        total: (parts, c) fp32 Σ exp(logit − maximum).
        width: entries of a part; the last may be cut.
        weighted: (parts, c) fp32 Σ (logit − maximum) exp(logit − maximum), or None.
        squares: (parts, c) fp32 Σ exp(logit − maximum)², or None.
        logit_sum: (parts, c) fp32 Σ logit, or None.
        best: (parts, c) int32 index of the largest logit, the first of several, or None.
    """

    maximum: Tensor
    total: Tensor
    width: int
    weighted: Tensor | None = None
    squares: Tensor | None = None
    logit_sum: Tensor | None = None
    best: Tensor | None = None


def fold_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    target_logit: Tensor,
    *,
    alpha: float,
    ceiling: float | None,
    block: Block,
    descriptors: bool,
    first: int = 0,
    kept: Tensor | None = None,
    maximum: Tensor | None = None,
    details: bool = False,
) -> Partials:
    """Fold ``logits = alpha (hidden @ weight.T + bias)`` over parts of the vocabulary.

    With a `ceiling` the logits are ``ceiling · tanh`` of that. One program a tile, fp32 from the
    accumulator on, no atomics.

    Args:
        hidden: (c, D) fp32, fp16 or bf16, last dimension contiguous.
        weight: (v, D), same dtype, last dimension contiguous.
        bias: (v,) or None.
        targets: (c,) int64 vocabulary index of the targets, within 2^31 of `first`.
        target_logit: (c,) fp32, updated in place where the target is inside.
        alpha: factor on the products.
        ceiling: bound of the logits, or None.
        block: shape of the tiles.
        descriptors: load tiles through tensor descriptors where they are aligned.
        first: vocabulary index at which the slab starts.
        kept: (c, v) becomes exp(logit − the part's maximum), or None.
        maximum: (parts, c) fp32, contiguous, where the parts' maxima go; or None.
        details: fill the optional fields of `Partials`.

    Raises:
        ValueError: an operand's shape, dtype or stride does not fit.
    """
    (rows, depth), vocab = hidden.shape, weight.shape[0]
    left, right, descriptors = tile_operands(hidden, weight, block, descriptors)
    if kept is not None and (kept.shape != (rows, vocab) or (vocab > 1 and kept.stride(1) != 1)):
        raise ValueError(
            f"kept: got shape {tuple(kept.shape)} with strides {kept.stride()}, wanted"
            f" ({rows}, {vocab}) with contiguous rows"
        )
    parts = blocks(vocab, block.vocab)

    def empty(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(parts, rows, dtype=dtype, device=hidden.device)

    partials = Partials(empty() if maximum is None else maximum, empty(), block.vocab)
    if details:
        sums = empty(), empty(), empty()
        best = empty(torch.int32)
        partials = Partials(partials.maximum, partials.total, block.vocab, *sums, best)
    if rows:
        _fold_logits_kernel[(blocks(rows, block.rows) * parts,)](
            left,
            right,
            bias,
            targets,
            partials.maximum,
            partials.total,
            target_logit,
            kept,
            partials.weighted,
            partials.squares,
            partials.logit_sum,
            partials.best,
            first,
            rows,
            vocab,
            depth,
            hidden.stride(0),
            weight.stride(0),
            0 if kept is None else kept.stride(0),
            alpha,
            0.0 if ceiling is None else ceiling,
            HAS_BIAS=bias is not None,
            HAS_CAP=ceiling is not None,
            HAS_KEPT=kept is not None,
            HAS_DETAILS=details,
            DESCRIPTORS=descriptors,
            EVEN_DEPTH=depth % block.depth == 0,
            ROWS=block.rows,
            VOCAB=block.vocab,
            DEPTH=block.depth,
            GROUP=block.group,
            num_warps=block.warps,
            num_stages=block.stages,
            # logit − maximum must be exactly 0 at the maximum: no log-prob may be positive.
            enable_fp_fusion=False,
        )
    return partials


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
