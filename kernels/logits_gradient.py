"""Overwrite a tile of logits by softmax − one-hot, in place and in one read."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _residual_rows_kernel(
    tile,  # (c, v)
    targets,  # (c,)
    logsumexps,  # (c,)
    target_residuals,  # (c,)
    row_stride,
    width,
    inverse_cap,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tile += row * row_stride
    logits = tl.load(tile + columns, mask=columns < width, other=0.0)
    residual = tl.exp(logits - tl.load(logsumexps + row))
    if HAS_CAP:
        tanh = logits * inverse_cap
        residual *= 1 - tanh * tanh
    at_target = columns == tl.load(targets + row)
    residual = tl.where(at_target, tl.load(target_residuals + row), residual)
    tl.store(tile + columns, residual, mask=columns < width)


def residual_rows(
    tile: Tensor,
    targets: Tensor,
    logsumexps: Tensor,
    target_residuals: Tensor,
    inverse_cap: float | None,
) -> None:
    """Turn a tile of logits into (softmax − one-hot) · (1 − (logit · inverse_cap)²), in place.

    The targets' entries are given: they come from the fp32 log-probs.

    Args:
        tile: (c, v) fp32 or float64 logits, last dimension contiguous.
        targets: (c,) int64 target index within the tile; outside [0, v) where it is elsewhere.
        logsumexps: (c,) of the whole rows.
        target_residuals: (c,) what becomes of the targets' logits.
        inverse_cap: temperature / softcap of the head, or None without a softcap.

    Raises:
        ValueError: the tile's rows are not contiguous.
    """
    rows, width = tile.shape
    if tile.stride(1) != 1 and width > 1:
        raise ValueError(f"tile: got strides {tile.stride()}, wanted contiguous rows")
    if rows == 0:
        return
    block = min(2048, triton.next_power_of_2(width))
    _residual_rows_kernel[(rows, triton.cdiv(width, block))](
        tile,
        targets,
        logsumexps,
        target_residuals,
        tile.stride(0),
        width,
        0.0 if inverse_cap is None else inverse_cap,
        HAS_CAP=inverse_cap is not None,
        BLOCK=block,
        num_warps=4,
    )
