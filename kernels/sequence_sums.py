"""Sums and counts over the rows of each sequence, ragged, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _lower_bound(ids, rows, wanted, steps):
    """The first row whose id is not below `wanted`, by bisection."""
    low, high = tl.full((), 0, tl.int32), rows
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(ids + middle, mask=middle < rows, other=wanted) < wanted
        open_ = low < high
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & (below == 0), middle, high)
    return low


@triton.jit
def _sequence_sums_kernel(
    values,  # (n,)
    ids,  # (n,)
    sums,  # (S,)
    lengths,  # (S,)
    rows,
    steps,
    SORTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    first, last = 0, rows
    if SORTED:
        first = _lower_bound(ids, rows, sequence, steps)
        last = _lower_bound(ids, rows, sequence + 1, steps)
    total = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.int64)
    for start in range(first, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mine = tl.load(ids + row, mask=row < last, other=-1) == sequence
        total += tl.load(values + row, mask=mine, other=0.0).to(tl.float64)
        count += mine.to(tl.int64)
    tl.store(sums + sequence, tl.sum(total, 0).to(tl.float32))
    tl.store(lengths + sequence, tl.sum(count, 0))


def sequence_sums(
    values: Tensor, ids: Tensor, num_sequences: int, sorted_ids: bool
) -> tuple[Tensor, Tensor]:
    """Sum the values of each sequence in float64, round once, and count them; no atomics.

    Args:
        values: (n,) fp32.
        ids: (n,) int64 in [0, S).
        num_sequences: S.
        sorted_ids: the ids never fall; otherwise every sequence reads all of them.

    Returns:
        (S,) fp32 sums and (S,) int64 counts; 0 for a sequence without values.
    """
    sums = torch.empty(num_sequences, dtype=torch.float32, device=values.device)
    lengths = torch.empty(num_sequences, dtype=torch.int64, device=values.device)
    rows = values.shape[0]
    if num_sequences:
        _sequence_sums_kernel[(num_sequences,)](
            values,
            ids,
            sums,
            lengths,
            rows,
            (rows + 1).bit_length(),
            SORTED=sorted_ids,
            BLOCK=1024,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return sums, lengths
