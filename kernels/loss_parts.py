"""Parts of the loss kernels: values of a batch, links, moments, and the queue of past margins.

Everything per pair is float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_prefopt.kernels.loss_form import Link, Moments

LOGISTIC: tl.constexpr = tl.constexpr(int(Link.LOGISTIC))
SMOOTHED: tl.constexpr = tl.constexpr(int(Link.SMOOTHED))
TWO_SIDED: tl.constexpr = tl.constexpr(int(Link.TWO_SIDED))
HINGE: tl.constexpr = tl.constexpr(int(Link.HINGE))
GIVEN: tl.constexpr = tl.constexpr(int(Moments.GIVEN))
BATCH: tl.constexpr = tl.constexpr(int(Moments.BATCH))
UNCORRECTED: tl.constexpr = tl.constexpr(int(Moments.UNCORRECTED))


@triton.jit
def is_finite(values):
    """Whether float64 values are neither NaN nor infinite."""
    return tl.abs(values) < float("inf")


@triton.jit
def load_double(pointer, at, inside):
    """Values of any floating dtype as float64, 0 outside."""
    # By way of float32: bf16 does not convert to float64 everywhere.
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32).to(tl.float64)


@triton.jit
def mean_of(values, inside, count):
    """Mean of the values inside, a float64 scalar."""
    return tl.sum(tl.where(inside, values, 0.0), 0) / count


@triton.jit
def spread_of(values, mean, inside, count):
    """Population standard deviation of the values inside, a float64 scalar."""
    return tl.sqrt(mean_of((values - mean) * (values - mean), inside, count))


@triton.jit
def tokens_of(lengths, at, inside, PER_TOKEN: tl.constexpr):
    """Divisor of a sequence's value: its length, at least 1, or 1."""
    if PER_TOKEN:
        return tl.maximum(tl.load(lengths + at, mask=inside, other=1), 1).to(tl.float64)
    else:
        return tl.where(inside, 1.0, 1.0).to(tl.float64)


@triton.jit
def values_of(
    policy,
    reference,
    lengths,
    at,
    inside,
    POLICY: tl.constexpr,
    REFERENCE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    """(policy·L + reference·L_ref) / tokens of the sequences `at`, float64."""
    values = tl.zeros_like(at).to(tl.float64)
    if POLICY != 0:
        values += POLICY * load_double(policy, at, inside)
    if REFERENCE != 0:
        values += REFERENCE * load_double(reference, at, inside)
    return values / tokens_of(lengths, at, inside, PER_TOKEN)


@triton.jit
def negative_log_sigmoid(x):
    """−log σ(x) and −d log σ(x) / dx = −σ(−x), of float64 x."""
    decay = tl.exp(-tl.abs(x))
    # 1 + decay drops the digits of a small decay; the series' next term is below 1e-10 of it.
    log1p = tl.where(decay < 1e-5, decay - 0.5 * decay * decay, tl.log(1 + decay))
    return log1p - tl.minimum(x, 0.0), -tl.where(x > 0, decay, 1.0) / (1 + decay)


@triton.jit
def link_losses(
    margins,  # (BLOCK,) m
    targets,  # (BLOCK,) γ
    a,
    b,
    LINK: tl.constexpr,
):
    """(BLOCK,) losses, d loss / d m and d loss / d γ; `loss_form.Link` says what a and b are."""
    x = margins - targets
    if LINK == HINGE:
        # Comparisons instead of a maximum, which may drop a NaN.
        losses = tl.where(x >= a, 0.0, a - x)
        slopes = tl.where(x >= a, 0.0, x * 0.0 - 1.0)
    elif LINK == LOGISTIC or LINK == SMOOTHED or LINK == TWO_SIDED:
        losses, slopes = negative_log_sigmoid(x)
        if LINK == SMOOTHED:
            losses += a * x
            slopes += a
    else:
        losses = x * x
        slopes = 2 * x
    target_slopes = -slopes
    if LINK == TWO_SIDED:
        flipped, flipped_slopes = negative_log_sigmoid(-margins - targets)
        losses = a * losses + b * flipped
        target_slopes = -(a * slopes + b * flipped_slopes)
        slopes = a * slopes - b * flipped_slopes
    return losses, slopes, target_slopes


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
