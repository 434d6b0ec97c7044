"""Past reward margins: drawing some of them, and letting a batch enter their queue."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def draw_margins(
    queue,  # (places,) float64, NaN where a place is empty
    order,  # (places,) a random permutation
    drawn,  # (draws,) float64, written
    places,
    draws,
    BLOCK: tl.constexpr,
):
    """Copy the first `draws` filled places in random order; returns how many there were."""
    lanes = tl.arange(0, BLOCK)
    found = tl.zeros((), tl.int32)
    for begin in range(0, places, BLOCK):
        inside = begin + lanes < places
        place = tl.load(order + begin + lanes, mask=inside, other=0)
        value = tl.load(queue + place, mask=inside, other=float("nan"))
        filled = (value == value).to(tl.int32)
        rank = found + tl.cumsum(filled, 0) - 1
        tl.store(drawn + rank, value, mask=(filled == 1) & (rank < draws))
        found += tl.sum(filled, 0)
    # Other threads read what these have written.
    tl.debug_barrier()
    return tl.minimum(found, draws)


@triton.jit
def enqueue_margins(
    queue,  # (places,) float64, updated in place
    margins,  # (LANES,) float64
    entering,  # (LANES,) which of them enter
    places,
    BLOCK: tl.constexpr,
):
    """Append the entering margins to a queue that is oldest first, behind its empty places."""
    entering = entering.to(tl.int32)
    count = tl.sum(entering, 0)
    lanes = tl.arange(0, BLOCK)
    for begin in range(0, places, BLOCK):
        at = begin + lanes
        stays = at + count < places
        value = tl.load(queue + at + count, mask=stays, other=0.0)
        # Every thread has read before one writes; later blocks lie behind what is written here.
        tl.debug_barrier()
        tl.store(queue + at, value, mask=stays)
    tl.debug_barrier()
    at = places - count + tl.cumsum(entering, 0) - 1
    tl.store(queue + at, margins, mask=(entering == 1) & (at >= 0))


@triton.jit
def count_nonfinite(
    nonfinite,  # () int64, updated in place
    skipped,
):
    """Add the number of skipped values to their count."""
    tl.store(nonfinite, tl.load(nonfinite) + skipped)
