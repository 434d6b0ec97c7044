"""What the loss epilogues read of a batch, and sums over it, in float64."""

from __future__ import annotations

import triton
import triton.language as tl


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
    """What a sequence's value is divided by: its length, at least 1, or 1."""
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
