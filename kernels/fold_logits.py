"""The fused forward: logits tile by tile, folded to partial log-sum-exps, never in memory."""

from __future__ import annotations

from dataclasses import dataclass

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
