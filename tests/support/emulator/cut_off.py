"""Sums of products as NVIDIA's tensor cores are known to cut them off; no vendor documents them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Wide = NDArray[np.float64]
Single = NDArray[np.float32]

# Leading bits of float64: sign and exponent; and all but those behind fp32's last place.
_EXPONENT = np.int64(0x7FF0_0000_0000_0000)
_SINGLE = np.int64(-1 << 29)
_LEAST_SINGLE = 2.0**-126


@dataclass(frozen=True)
class CutOff:
    """A tensor core's sum of products of 16-bit operands onto an fp32 sum.

    One step takes the next `products` products, exact, and the sum so far. Their significands are
    aligned to the largest exponent among them and **cut off** (towards zero) `bits` bits below it,
    added without loss, and the sum is cut off to fp32's 24 bits. The order within a step cannot
    matter. Of a product the exponent is the sum of its factors' (its significand lies in [1, 4) and
    is not normalised), of a subnormal operand the least of its format; a zero has none. What is
    beyond fp32 becomes infinite; infinities and NaN act as in an exact sum.

    Args:
        products: taken at once.
        bits: kept below the largest exponent; fp32's own significand has 23.

    Sources, which agree on all numbers here:
        - Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ
          Computer Science 7:e330, 2021, tests on V100, T4 and A100: products are exact, sums start
          from the largest in magnitude, are cut off, are not normalised between additions, and an
          A100 takes 8 products of 16 bits and has a digit beyond fp32's.
        - Khattak, Mikaitis, "Accurate models of NVIDIA tensor cores", arXiv:2512.07004, 2025,
          models that equal the hardware bit for bit on 10⁵ random inputs each; parameters as
          published in their MATLAB-tensor-core, `models/A100TC.m` (fma 8, neab 1, rz) and
          `models/H100TC.m` (fma 16, neab 2, rz; H200 alike).
        - Xie, Wang, Yang, Yang, "MMA-Sim", arXiv:2511.10909, 2025, equal to the hardware bit for
          bit on a million tests; their `simulator/nv.py`: 24 fractional bits and halves of k = 16
          on Ampere, 25 and all 16 on Hopper, for `mma.sync` and `wgmma`.

    Not modelled: an H100 aligns to no exponent below −133 (Khattak and Mikaitis), which only sums
    below 2⁻¹⁰⁸ can show; payloads of NaN.
    """

    products: int
    bits: int

    def __call__(
        self, left: Wide, right: Wide, start: Single, smallest: float = _LEAST_SINGLE
    ) -> Single:
        """start + left @ right in fp32, the products taken by `products` from the first on.

        Args:
            left: (..., m, k), numbers of 16 bits.
            right: (..., k, n).
            start: (..., m, n).
            smallest: the least normal number of the operands' format: 2⁻¹²⁶ of bf16, 2⁻¹⁴ of fp16.
        """
        total = np.asarray(start, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for begin in range(0, left.shape[-1], self.products):
                step = slice(begin, begin + self.products)
                total = self._step(left[..., step], right[..., step, :], total, smallest)
        return total

    def _step(self, left: Wide, right: Wide, start: Single, smallest: float) -> Single:
        places = range(left.shape[-1])
        rows, columns = _powers(left, smallest), _powers(right, smallest)
        total = start.astype(np.float64)
        largest = _powers(total, _LEAST_SINGLE)
        for place in places:
            largest = np.maximum(largest, rows[..., place, None] * columns[..., place, None, :])
        known = np.isfinite(largest)
        # Nothing but zeros, or no number at all.
        scale = 2.0**self.bits / np.where(known & (largest > 0), largest, 1.0)
        added = np.trunc(total * scale)
        for place in places:
            added += np.trunc(left[..., place, None] * right[..., place, None, :] * scale)
        # A sum that vanishes is +0.
        found = _single(added / scale + 0.0)
        if known.all():
            return found
        for place in places:
            total = total + left[..., place, None] * right[..., place, None, :]
        return np.where(known, found, total.astype(np.float32))


def _powers(values: Wide, smallest: float) -> Wide:
    """2 to the exponents of numbers, no less than `smallest`; 0 of zeros, infinity of NaN."""
    found = (values.view(np.int64) & _EXPONENT).view(np.float64)
    return np.where(values == 0, 0.0, np.maximum(found, smallest))


def _single(values: Wide) -> Single:
    """Numbers cut off to fp32."""
    found = (values.view(np.int64) & _SINGLE).view(np.float64)
    below = np.abs(values) < _LEAST_SINGLE
    if below.any():
        found = np.where(below, np.trunc(values * 2.0**149) * 2.0**-149, found)
    return found.astype(np.float32)


A100 = CutOff(products=8, bits=24)
H100 = CutOff(products=16, bits=25)
