"""How far a log-prob may be from float64, from how sums of products are rounded on a GPU."""

from __future__ import annotations

import math

import torch
from truth import Case

# Products whose sum a tensor core cuts off at once: 8 of 16 bits on an A100, 16 on an H100. The
# fewer, the more often it is cut.
BLOCK = 8
# Bits of a significand that an fp32 sum keeps; its last place is 2 ** −23 of the leading one.
_SINGLE = 2.0**-24
# Up to it the tight bounds have been kept by the compiled kernels on emulated tensor cores.
_SHALLOW = 48


def logp_bound(dtype: torch.dtype, depth: int, largest: float, tight: float = 1e-5) -> float:
    """Bound on the error of a log-prob in nats, by how its logits are summed.

    **bf16 and fp16** are multiplied by tensor cores, which do not round: `BLOCK` products and the
    sum so far are aligned to the largest of them, cut off a bit or two beyond fp32's last place,
    added, and the sum is cut off to fp32 (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of
    NVIDIA tensor cores", PeerJ Computer Science 7:e330, 2021). Every cut takes the sum towards
    zero, so the errors of k / `BLOCK` cuts add up: a bias, not a random walk. A cut takes between
    nothing and one last place, on average half of one; the last place of a sum s is between
    2⁻²⁴ |s| and 2⁻²³ |s|, on average over a binade 4/3 · 2⁻²⁴ |s|. A logit that ends at M, the
    largest one, is on average half as large on its way. So it loses

        k / BLOCK · ½ · 4/3 · 2⁻²⁴ · ½ M  =  ⅓ · k / BLOCK · 2⁻²⁴ · M.

    A log-prob is the difference of two logits' worth (the target and, in the log-sum-exp, the
    largest), which may have opposite signs: two thirds. What is left out here (partial sums that
    stray from the line from 0 to M, products of fp16 that are cut off as well, the spread of few
    cuts) takes less than as much again: the bound is **3/2 · k / BLOCK · 2⁻²⁴ · M**. Measured on
    emulated A100 tensor cores with M = 30: 3.3e-4 at k = 4096, where the bound is 1.4e-3, and
    1.2e-5 where sums are rounded to nearest.

    **fp32** is multiplied without tensor cores, and each of k additions rounds to nearest: by at
    most half a last place, 2⁻²⁴ |s|, evenly, with a standard deviation of 1/√3 of it, and
    independent signs. Over partial sums on a line to M, whose root mean square is M / √3, a logit
    gets σ = ⅓ √k · 2⁻²⁴ · M. The bound is 6 σ, four of a difference of logits, for the largest of
    thousands of errors: **2 √k · 2⁻²⁴ · M**.

    At small depths `tight` holds, which stands for all other roundings.

    Args:
        dtype: of the operands.
        depth: k, products in a logit: the hidden size.
        largest: M, the largest |logit|.
        tight: what the error may be whatever the depth, in nats.
    """
    if depth <= _SHALLOW:
        return tight
    steps = 2 * math.sqrt(depth) if dtype == torch.float32 else 1.5 * depth / BLOCK
    return max(tight, steps * _SINGLE * largest)


def bound_of(case: Case, tight: float = 1e-5) -> float:
    """`logp_bound` of a case: M is the largest product times the head's factors."""
    largest = (case.hidden.float() @ case.weight.float().t()).abs().max().item()
    factor = abs(case.options.get("logit_scale", 1.0)) / case.options.get("temperature", 1.0)
    return logp_bound(case.hidden.dtype, case.hidden.shape[-1], largest * factor, tight)


def gradient_bound(case: Case, tolerance: float) -> float:
    """Relative bound on a gradient: `tolerance`, and what depth adds to the log-probs.

    A probability is off by the factor exp(error of its log-prob), and a gradient is linear in them.
    """
    return tolerance + bound_of(case, 1e-5) - 1e-5
