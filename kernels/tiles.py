"""Tiles of logits: which of them a program computes, its values in fp32, and operands' layout."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_prefopt.kernels.architectures import Block


@triton.jit
def tile_of(program, rows, vocab, ROWS: tl.constexpr, VOCAB: tl.constexpr, GROUP: tl.constexpr):
    """(row block, vocabulary block): GROUP row blocks share a weight slab in the L2 cache."""
    row_blocks = tl.cdiv(rows, ROWS)
    group_programs = GROUP * tl.cdiv(vocab, VOCAB)
    first = program // group_programs * GROUP
    size = min(row_blocks - first, GROUP)
    place = program % group_programs
    return first + place % size, place // size


@triton.jit
def tanh(x):
    """tanh to fp32 rounding: a continued fraction near 0, where the sigmoid's would cancel."""
    square = x * x
    small = x * (945 + square * (105 + square)) / (945 + square * (420 + 15 * square))
    return tl.where(square < 0.09, small, 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def bend(products, alpha, ceiling, HAS_CAP: tl.constexpr):
    """Logits of products: alpha · product, under the softcap's `ceiling` if there is one."""
    logits = products * alpha
    if HAS_CAP:
        logits = tanh(logits) * ceiling
    return logits


@triton.jit
def cap_slope(logits, ceiling):
    """1 − tanh² of the softcap, from the logits it has left."""
    bent = logits / ceiling
    return 1 - bent * bent


@triton.jit
def logits_tile(
    hidden,  # (rows, depth), pointer or descriptor
    weight,  # (vocab, depth), pointer or descriptor
    bias,  # (vocab,)
    first_row,
    first_column,
    rows,
    vocab,
    depth,
    hidden_stride,
    weight_stride,
    alpha,
    ceiling,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    VOCAB: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """(ROWS, VOCAB) logits; what lies outside of (rows, vocab) is finite and means nothing."""
    products = tl.zeros((ROWS, VOCAB), tl.float32)
    columns = first_column + tl.arange(0, VOCAB)
    if DESCRIPTORS:
        for start in range(0, depth, DEPTH):
            left = hidden.load([first_row, start])
            right = weight.load([first_column, start])
            products = tl.dot(left, right.T, products, input_precision="ieee")
    else:
        # Rows past the end wrap around: their loads need no mask, and nobody reads the result.
        wrapped = ((first_row + tl.arange(0, ROWS)) % rows).to(tl.int64)
        entries = tl.arange(0, DEPTH)
        left_tile = hidden + wrapped[:, None] * hidden_stride + entries[None, :]
        wrapped = (columns % vocab).to(tl.int64)
        right_tile = weight + wrapped[None, :] * weight_stride + entries[:, None]
        for start in range(0, depth, DEPTH):
            if EVEN_DEPTH:
                left = tl.load(left_tile)
                right = tl.load(right_tile)
            else:
                inside = start + entries < depth
                left = tl.load(left_tile, mask=inside[None, :], other=0.0)
                right = tl.load(right_tile, mask=inside[:, None], other=0.0)
            products = tl.dot(left, right, products, input_precision="ieee")
            left_tile += DEPTH
            right_tile += DEPTH
    if HAS_BIAS:
        added = tl.load(bias + columns, mask=columns < vocab, other=0.0)
        products += added.to(tl.float32)[None, :]
    return bend(products, alpha, ceiling, HAS_CAP)


def tile_operands(
    hidden: Tensor, weight: Tensor, block: Block, descriptors: bool
) -> tuple[object, object, bool]:
    """Hidden and weight as the kernels take them, and whether they are descriptors.

    Descriptors need addresses and row strides of whole 16 bytes; other operands go by pointer. So
    does fp32: without tensor cores its products need the registers that descriptors take.

    Args:
        hidden: (c, D), last dimension contiguous.
        weight: (v, D), last dimension contiguous, same dtype.
        block: shape of the tiles.
        descriptors: whether the architecture has them.

    Raises:
        ValueError: a shape, dtype or stride does not fit.
    """
    for name, value in (("hidden", hidden), ("weight", weight)):
        if value.dim() != 2 or (value.shape[1] > 1 and value.stride(1) != 1):
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)} with strides {value.stride()},"
                " wanted two dimensions, the last one contiguous"
            )
        if value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{name}: got dtype {value.dtype}, wanted float32, float16, bfloat16")
    if hidden.dtype != weight.dtype or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"weight: got {tuple(weight.shape)} of {weight.dtype}, wanted the depth and dtype of"
            f" hidden: {tuple(hidden.shape)} of {hidden.dtype}"
        )
    aligned = all(
        value.data_ptr() % 16 == 0 and value.stride(0) * value.itemsize % 16 == 0
        for value in (hidden, weight)
    )
    if not (descriptors and aligned and hidden.itemsize == 2):
        return hidden, weight, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor.from_tensor(hidden, [block.rows, block.depth]),
        TensorDescriptor.from_tensor(weight, [block.vocab, block.depth]),
        True,
    )


def blocks(size: int, block: int) -> int:
    """Programs that cover a size; `triton.cdiv` takes a hundred times as long on the host."""
    return -(-size // block)


def require_contiguous_rows(**named: Tensor | None) -> None:
    """Raise ValueError unless the rows of every matrix here are contiguous."""
    for name, value in named.items():
        if value is not None and value.stride(1) != 1 and value.shape[1] > 1:
            raise ValueError(f"{name}: got strides {value.stride()}, wanted contiguous rows")
