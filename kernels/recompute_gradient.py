"""The fused backward: logits tile by tile once more, their gradient as the matmul's epilogue."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_prefopt.kernels.architectures import Block
from fused_prefopt.kernels.logits_gradient import tile_gradient
from fused_prefopt.kernels.tiles import blocks, logits_tile, tile_of, tile_operands


@triton.jit
def _recompute_gradient_kernel(
    hidden,  # (rows, depth), pointer or descriptor
    weight,  # (vocab, depth), pointer or descriptor
    bias,  # (vocab,)
    targets,  # (rows,)
    logsumexps,  # (rows,)
    residuals,  # (rows,)
    scale,  # (rows,)
    out,  # (rows, vocab)
    column_sums,  # (row blocks, vocab)
    first,
    rows,
    vocab,
    depth,
    hidden_stride,
    weight_stride,
    out_stride,
    alpha,
    ceiling,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SUMS: tl.constexpr,
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
    logsumexp = tl.load(logsumexps + row, mask=inside, other=0.0)
    gradient = tile_gradient(
        tl.exp(logits - logsumexp[:, None]),
        logits,
        row,
        columns,
        targets,
        residuals,
        scale,
        first,
        rows,
        ceiling,
        HAS_CAP,
        True,
    )
    entry = row.to(tl.int64)[:, None] * out_stride + columns[None, :]
    stored = gradient.to(out.dtype.element_ty)
    tl.store(out + entry, stored, mask=inside[:, None] & real[None, :])
    if HAS_SUMS:
        sums = tl.sum(tl.where(inside[:, None], gradient, 0.0), 0)
        tl.store(column_sums + row_block.to(tl.int64) * vocab + columns, sums, mask=real)


def recompute_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logsumexps: Tensor,
    targets: Tensor,
    residuals: Tensor,
    scale: Tensor,
    out: Tensor,
    *,
    alpha: float,
    ceiling: float | None,
    block: Block,
    descriptors: bool,
    first: int = 0,
    sums: bool = False,
) -> Tensor | None:
    """``scale · (softmax − one-hot) · slope`` of a slab, straight from hidden and weight.

    The logits are those of `fold_logits`, to the bit.

    Args:
        hidden: (c, D) fp32, fp16 or bf16, last dimension contiguous.
        weight: (v, D), same dtype, last dimension contiguous.
        bias: (v,) or None.
        logsumexps: (c,) fp32 of the whole rows.
        targets: (c,) int64 vocabulary index of the targets, anywhere.
        residuals: (c,) fp32 (p − 1) · slope of the targets, from their fp32 log-probs.
        scale: (c,) fp32 factor on the whole row.
        out: (c, v) fp32, fp16 or bf16, contiguous rows.
        alpha: factor on the products.
        ceiling: bound of the logits, or None.
        block: shape of the tiles.
        descriptors: load tiles through tensor descriptors where they are aligned.
        first: vocabulary index at which the slab starts.
        sums: whether the gradient's sums over rows are wanted.

    Returns:
        (v,) fp32 sums over the rows, before rounding to the dtype of `out`; or None.

    Raises:
        ValueError: an operand's shape, dtype or stride does not fit.
    """
    (rows, depth), vocab = hidden.shape, weight.shape[0]
    left, right, descriptors = tile_operands(hidden, weight, block, descriptors)
    if out.shape != (rows, vocab) or (vocab > 1 and out.stride(1) != 1):
        raise ValueError(
            f"out: got shape {tuple(out.shape)} with strides {out.stride()}, wanted"
            f" ({rows}, {vocab}) with contiguous rows"
        )
    row_blocks = blocks(rows, block.rows)
    column_sums = None
    if sums:
        column_sums = torch.empty(row_blocks, vocab, dtype=torch.float32, device=hidden.device)
    if rows:
        _recompute_gradient_kernel[(row_blocks * blocks(vocab, block.vocab),)](
            left,
            right,
            bias,
            targets,
            logsumexps,
            residuals,
            scale,
            out,
            column_sums,
            first,
            rows,
            vocab,
            depth,
            hidden.stride(0),
            weight.stride(0),
            out.stride(0),
            alpha,
            0.0 if ceiling is None else ceiling,
            HAS_BIAS=bias is not None,
            HAS_CAP=ceiling is not None,
            HAS_SUMS=sums,
            DESCRIPTORS=descriptors,
            EVEN_DEPTH=depth % block.depth == 0,
            ROWS=block.rows,
            VOCAB=block.vocab,
            DEPTH=block.depth,
            GROUP=block.group,
            num_warps=block.warps,
            num_stages=block.stages,
            # As in the forward, whose log-sum-exps these logits meet.
            enable_fp_fusion=False,
        )
    return None if column_sums is None else column_sums.sum(0)
