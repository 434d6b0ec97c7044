"""Rescale the rows of an accumulator whose running maximum has risen, and leave the others."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_prefopt.kernels.tiles import blocks


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
    if values.stride(1) != 1 and width > 1:
        raise ValueError(f"values: got strides {values.stride()}, wanted contiguous rows")
    if rows:
        block = min(1024, triton.next_power_of_2(width))
        _rescale_rows_kernel[(rows, blocks(width, block))](
            values, factor, values.stride(0), width, BLOCK=block, num_warps=4, enable_fp_fusion=True
        )
