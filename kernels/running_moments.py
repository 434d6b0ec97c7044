"""Mean and standard deviation of a batch's values and of those seen before."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_prefopt.kernels.batch_values import is_finite
from fused_prefopt.kernels.forms import Moments
from fused_prefopt.kernels.margin_pool import count_nonfinite

GIVEN: tl.constexpr = tl.constexpr(int(Moments.GIVEN))
BATCH: tl.constexpr = tl.constexpr(int(Moments.BATCH))
UNCORRECTED: tl.constexpr = tl.constexpr(int(Moments.UNCORRECTED))


@triton.jit
def moments_of(mean, mean_square):
    """Mean and population standard deviation from E[x] and E[x²]."""
    return mean, tl.sqrt(tl.maximum(mean_square - mean * mean, 0.0))


@triton.jit
def moments(
    values,  # (BLOCK,) float64
    inside,  # (BLOCK,)
    average,  # (2,) float64 running averages, updated in place; or () the mean, if GIVEN
    weight,  # () float64 their weight, updated in place; or the standard deviation, if GIVEN
    nonfinite,  # () int64 values skipped so far, updated in place
    momentum,
    MOMENTS: tl.constexpr,
    UPDATE: tl.constexpr,
):
    """Mean and standard deviation, at least 1e-6, that standardise the values: float64 scalars."""
    finite = inside & is_finite(values)
    count = tl.sum(finite.to(tl.float64), 0)
    skipped = tl.sum((inside & (finite == 0)).to(tl.int64), 0)
    if MOMENTS == GIVEN:
        mean, std = tl.load(average), tl.load(weight)
    else:
        values = tl.where(finite, values, 0.0)
        some = tl.maximum(count, 1.0)
        batch_mean = tl.sum(values, 0) / some
        squares = tl.sum(values * values, 0)
        mean, std = moments_of(batch_mean, squares / some)
        if MOMENTS != BATCH:
            first, second = tl.load(average), tl.load(average + 1)
            seen = tl.load(weight)
            if UPDATE:
                if MOMENTS == UNCORRECTED:
                    spread = tl.maximum(squares - count * batch_mean * batch_mean, 0.0)
                    feature = tl.sqrt(spread / tl.maximum(count - 1, 1.0))
                    enough = count >= 2
                else:
                    feature = squares / some
                    enough = count >= 1
                first = tl.where(enough, batch_mean + momentum * (first - batch_mean), first)
                second = tl.where(enough, feature + momentum * (second - feature), second)
                seen = tl.where(enough, 1 - momentum * (1 - seen), seen)
                # Every thread has read the state before one writes it.
                tl.debug_barrier()
                tl.store(average, first)
                tl.store(average + 1, second)
                tl.store(weight, seen)
            if MOMENTS == UNCORRECTED:
                past_mean, past_std = first, second
            else:
                scale = tl.where(seen > 0, seen, 1.0)
                past_mean, past_std = moments_of(first / scale, second / scale)
            # With nothing seen yet, the batch's own.
            mean = tl.where(seen > 0, past_mean, mean)
            std = tl.where(seen > 0, past_std, std)
    if UPDATE:
        count_nonfinite(nonfinite, skipped)
    return mean, tl.maximum(std, 1e-6)
