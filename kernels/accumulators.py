"""Accumulators of rows' gradients: rescaled where a maximum rises, then spread over the batch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_prefopt.kernels.tiles import blocks, require_contiguous_rows


@triton.jit
def _rescale_rows_kernel(
    values,  # (c, D)
    factor,  # (c,)
    row_stride,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(factor + row)
    # After the first slabs hardly any maximum still rises: then this row is not even read.
    if scale != 1.0:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        entry = values + row * row_stride + columns
        scaled = tl.load(entry, mask=columns < width, other=0.0) * scale
        tl.store(entry, scaled, mask=columns < width)


def rescale_rows(values: Tensor, factor: Tensor) -> None:
    """Multiply each row by its factor, in place.

    Args:
        values: (c, D) fp32, last dimension contiguous.
        factor: (c,) fp32.

    Raises:
        ValueError: rows of `values` are not contiguous.
    """
    rows, width = values.shape
    require_contiguous_rows(values=values)
    if rows:
        block = min(1024, triton.next_power_of_2(width))
        _rescale_rows_kernel[(rows, blocks(width, block))](
            values, factor, values.stride(0), width, BLOCK=block, num_warps=4, enable_fp_fusion=True
        )


@triton.jit
def _spread_rows_kernel(
    values,  # (c, D)
    index,  # (c,)
    out,  # (M, D)
    factor,  # (c,)
    scale,  # (c,)
    added,  # (c, D)
    own,  # (c,)
    values_stride,
    out_stride,
    added_stride,
    width,
    HAS_FACTOR: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    found = tl.load(values + row * values_stride + columns, mask=inside, other=0.0)
    if HAS_ADDED:
        others = tl.load(added + row * added_stride + columns, mask=inside, other=0.0)
        found = found * tl.load(scale + row) + tl.load(own + row) * others.to(tl.float32)
    if HAS_FACTOR:
        found *= tl.load(factor + row)
    there = tl.load(index + row) * out_stride + columns
    tl.store(out + there, found.to(out.dtype.element_ty), mask=inside)


def spread_rows(
    values: Tensor,
    index: Tensor,
    out: Tensor,
    factor: Tensor | None = None,
    scale: Tensor | None = None,
    added: Tensor | None = None,
    own: Tensor | None = None,
) -> None:
    """``out[index] = factor · values``, or ``factor · (scale · values + own · added)``; in place.

    Args:
        values: (c, D) fp32, last dimension contiguous.
        index: (c,) int64 rows of `out`, each once.
        out: (M, D) of any floating dtype, last dimension contiguous.
        factor: (c,) fp32, or None for 1.
        scale: (c,) fp32, given with `added`, or None.
        added: (c, D) of any floating dtype, last dimension contiguous, or None.
        own: (c,) fp32, given with it.

    Raises:
        ValueError: rows of `values`, `out` or `added` are not contiguous.
    """
    rows, width = values.shape
    require_contiguous_rows(values=values, out=out, added=added)
    if rows:
        block = min(1024, triton.next_power_of_2(width))
        _spread_rows_kernel[(rows, blocks(width, block))](
            values,
            index,
            out,
            factor,
            scale,
            added,
            own,
            values.stride(0),
            out.stride(0),
            0 if added is None else added.stride(0),
            width,
            HAS_FACTOR=factor is not None,
            HAS_ADDED=added is not None,
            BLOCK=block,
            num_warps=4,
            # Where a row's probability is 1, its two terms cancel exactly.
            enable_fp_fusion=False,
        )
