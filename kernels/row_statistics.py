"""Fold a tile of logits into each row's running log-sum-exp, in one read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _fold_rows_kernel(
    tile,  # (c, v)
    targets,  # (c,)
    maximum,  # (c,)
    total,  # (c,)
    target_logit,  # (c,)
    factor,  # (c,)
    row_stride,
    width,
    KEEP: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile += row * row_stride
    # A finite floor instead of -inf: rows whose logits are all -inf then sum to zero, not NaN.
    running = tl.full((BLOCK,), -3.4028234663852886e38, DTYPE)
    sums = tl.zeros((BLOCK,), DTYPE)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = tl.load(tile + columns, mask=columns < width, other=-float("inf"))
        above = tl.maximum(running, logits)
        sums = sums * tl.exp(running - above) + tl.exp(logits - above)
        running = above

    old = tl.load(maximum + row)
    new = tl.maximum(old, tl.max(running, 0))
    shrink = tl.exp(old - new)
    tl.store(factor + row, shrink)
    tl.store(maximum + row, new)
    added = tl.sum(sums * tl.exp(running - new), 0)
    tl.store(total + row, tl.load(total + row) * shrink + added)

    target = tl.load(targets + row)
    inside = (target >= 0) & (target < width)
    found = tl.load(tile + target, mask=inside, other=0.0)
    tl.store(target_logit + row, found, mask=inside)

    if KEEP:
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            logits = tl.load(tile + columns, mask=columns < width, other=-float("inf"))
            tl.store(tile + columns, tl.exp(logits - new), mask=columns < width)


def fold_rows(
    tile: Tensor,
    targets: Tensor,
    maximum: Tensor,
    total: Tensor,
    target_logit: Tensor,
    *,
    keep: bool,
) -> Tensor:
    """Update running statistics by a tile of logits; no atomics, one program a row.

    Args:
        tile: (c, v) fp32 or float64 logits, last dimension contiguous; overwritten by
            exp(logit − new maximum) if `keep`.
        targets: (c,) int64 target index within the tile; outside [0, v) where it is elsewhere.
        maximum: (c,) running maxima, updated in place; start from the lowest finite number.
        total: (c,) running Σ exp(logit − maximum), updated in place.
        target_logit: (c,) updated in place where the target is inside.
        keep: whether the tile's exponentials are needed afterwards.

    Returns:
        (c,) exp(old maximum − new maximum).

    Raises:
        ValueError: the tile's rows are not contiguous.
    """
    rows, width = tile.shape
    if tile.stride(1) != 1 and width > 1:
        raise ValueError(f"tile: got strides {tile.stride()}, wanted contiguous rows")
    factor = torch.empty_like(maximum)
    if rows:
        _fold_rows_kernel[(rows,)](
            tile,
            targets,
            maximum,
            total,
            target_logit,
            factor,
            tile.stride(0),
            width,
            KEEP=keep,
            DTYPE=tl.float64 if tile.dtype == torch.float64 else tl.float32,
            BLOCK=min(4096, triton.next_power_of_2(width)),
            num_warps=8,
        )
    return factor
