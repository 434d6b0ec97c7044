"""Losses of pairs and their slopes, from reward and target margins."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_prefopt.kernels.forms import Link

LOGISTIC: tl.constexpr = tl.constexpr(int(Link.LOGISTIC))
SMOOTHED: tl.constexpr = tl.constexpr(int(Link.SMOOTHED))
TWO_SIDED: tl.constexpr = tl.constexpr(int(Link.TWO_SIDED))
HINGE: tl.constexpr = tl.constexpr(int(Link.HINGE))


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
    """(BLOCK,) losses, d loss / d m and d loss / d γ; `forms.Link` says what a and b are."""
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
