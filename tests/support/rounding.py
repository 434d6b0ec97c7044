"""How far a log-prob may be from float64, from how sums of products are rounded on a GPU."""

from __future__ import annotations

import math

import torch
from emulator.cut_off import A100, H100, CutOff
from truth import Case

# Bits of a significand that an fp32 sum keeps behind the leading one, and half of its last place.
_BITS = 23
_HALF_PLACE = 2.0**-24
# Mean over a binade of (2 ** exponent / value) ** 2: what a last place is in squares.
_SQUARED = 0.5
# Up to it the tight bounds are kept by the compiled kernels on emulated tensor cores.
_SHALLOW = 48


def cores_of_this_gpu() -> CutOff:
    """What the tensor cores of the current CUDA device do; of a later kind as of an H100's."""
    return H100 if torch.cuda.get_device_capability()[0] >= 9 else A100


def logp_bound(cores: CutOff | None, depth: int, largest: float, tight: float = 1e-5) -> float:
    """Bound on the error of a log-prob in nats, by how its logits are summed: bias + 6 σ.

    In units of 2⁻²⁴ M, half a last place of the largest logit M, with k the depth.

    **Cut off**, as by tensor cores (`CutOff`, P products to `bits` bits): k / P sums are cut off to
    23 bits, each towards zero, which adds up: a bias, not a random walk. A sum that was aligned to
    `bits` bits loses one of 0, 1, … in units of 2^(23 − bits) of a last place, on average
    ½ (1 − 2^(23 − bits)) of it. A last place is at most 2⁻²³ of the partial sum, and that at most
    M; a log-prob is the difference of two logits' worth (its own, and the largest's in the
    log-sum-exp), which may have opposite signs:

        bias = 2 (1 − 2^(23 − bits)) k / P, which is k / 8 on an A100 and 3/2 · k / 16 on an H100.

    The *expected* one is a third of it: partial sums grow to M, ½ M on average, and a last place is
    ⅔ of its most on average over a binade. Each of the k products is cut off, too, to 2^−bits of
    the partial sum or less, evenly, but with its own sign, as random as the products': a variance
    of a third of that squared. A partial sum on a line to M has a mean square of M² / 3, and a last
    place ½ of its most in squares on average. With the variance of what is cut off the sums,
    (1 − 4^(23 − bits)) / 12 of a last place squared:

        σ² = k / 6 · [4^(24 − bits) / 3 + (1 − 4^(23 − bits)) / (3 P)]

    6 σ are four of a difference of two logits, for the largest of thousands of errors.

    **Rounded to nearest**, as fp32 is multiplied (without tensor cores): each of k additions is off
    by at most half a last place, evenly, with a variance of a third of that squared. Over partial
    sums on a line to M, and a last place as above:

        σ² = k / 18, and the bound is 6 σ = √(2 k).

    At small depths `tight` holds, which stands for all other roundings. What emulated kernels
    measure beside the bound is in `tests/emulator/test_cut_off.py`.

    Args:
        cores: that multiply; None for sums rounded to nearest after each product.
        depth: k, products in a logit: the hidden size.
        largest: M, the largest |logit|.
        tight: what the error may be whatever the depth, in nats.
    """
    if depth <= _SHALLOW:
        return tight
    if cores is None:
        steps = 6 * math.sqrt(depth * _SQUARED / 9)
    else:
        coarse = 2.0 ** (_BITS - cores.bits)
        bias = 2 * (1 - coarse) * depth / cores.products
        aligned, cut = 4 * coarse**2 / 3, (1 - coarse**2) / (3 * cores.products)
        steps = bias + 6 * math.sqrt(depth * _SQUARED / 3 * (aligned + cut))
    return max(tight, steps * _HALF_PLACE * largest)


def bound_of(case: Case, tight: float = 1e-5, cores: CutOff | None = A100) -> float:
    """`logp_bound` of a case: M is the largest product times the head's factors.

    Args:
        case: with operands in the dtype that is multiplied; fp32 is rounded to nearest.
        tight: of `logp_bound`.
        cores: that multiply 16 bits; None: rounded to nearest, too.
    """
    largest = (case.hidden.float() @ case.weight.float().t()).abs().max().item()
    factor = abs(case.options.get("logit_scale", 1.0)) / case.options.get("temperature", 1.0)
    if case.hidden.dtype == torch.float32:
        cores = None
    return logp_bound(cores, case.hidden.shape[-1], largest * factor, tight)


def gradient_bound(case: Case, tolerance: float, cores: CutOff | None = A100) -> float:
    """Relative bound on a gradient: `tolerance`, and what depth adds to the log-probs.

    A probability is off by the factor exp(error of its log-prob), and a gradient is linear in them.
    """
    return tolerance + bound_of(case, 1e-5, cores) - 1e-5
