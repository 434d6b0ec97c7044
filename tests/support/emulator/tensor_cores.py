"""Matrix products: how fragments lie in registers, and how a tensor core adds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arithmetic import F2, F4, F8, U2, U4, Array, bf16_to_f32
from .instructions import Site
from .threads import WARP, Threads


@dataclass(frozen=True)
class CutOff:
    """Sums as tensor cores make them: aligned to the largest term, and cut off there.

    Attributes:
        products: how many are added at a time, together with the sum so far.
        bits: of the largest term's magnitude that are kept, of it and of the terms below.
    """

    products: int
    bits: int

    def multiply(self, left: Array, right: Array, start: Array) -> Array:
        """(…, M, K) @ (…, K, N) + (…, M, N): fp64 factors, fp32 sums."""
        total = start
        for begin in range(0, left.shape[-1], self.products):
            part = slice(begin, begin + self.products)
            columns = right[..., part, :].swapaxes(-1, -2)
            terms = left[..., :, None, part] * columns[..., None, :, :]
            total = self._add(np.concatenate([terms, total.astype(F8)[..., None]], -1))
        return total

    def _add(self, terms: Array) -> Array:
        most = np.abs(terms).max(-1, keepdims=True)
        quantum = np.ldexp(1.0, np.frexp(most)[1] - self.bits)
        exact = (np.trunc(terms / quantum) * quantum).sum(-1)
        near = exact.astype(F4)
        over = np.abs(near.astype(F8)) > np.abs(exact)
        cut = np.where(over, np.nextafter(near, F4(0)), near)
        return np.where(np.isfinite(most[..., 0]), cut, terms.sum(-1).astype(F4))


def multiply(left: Array, right: Array, start: Array, cut_off: CutOff | None) -> Array:
    """A product of 16-bit values in fp64, and an fp32 sum: rounded once, or cut off."""
    if cut_off is not None:
        return cut_off.multiply(left, right, start)
    return (left @ right + start).astype(F4)


class TensorCores:
    """`mma` of warps, in registers."""

    def __init__(self, threads: Threads, cut_off: CutOff | None) -> None:
        self.threads, self.cut_off = threads, cut_off

    def multiply(
        self, site: Site, mask: Array | None, a: list[Array], b: list[Array], c: list[Array]
    ) -> list[Array]:
        """m16n8k16 and m16n8k8: words of 16-bit pairs, 32-bit sums."""
        self.threads.whole_warps(site, mask)
        warps = self.threads.lanes // WARP
        eights = len(b)  # of the depth

        def wide(words: list[Array]) -> Array:
            bits = np.stack(words).view(U2).reshape(len(words), warps, 8, 4, 2)
            values = bf16_to_f32(bits) if "bf16" in site.modifiers else bits.view(F2)
            return values.astype(F8)

        # Depth's eight, row's eight, warp, row, pair of the depth, one of it.
        left = wide(a).reshape(eights, 2, warps, 8, 4, 2)
        left = left.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, 8 * eights)
        right = wide(b).transpose(1, 0, 3, 4, 2).reshape(warps, 8 * eights, 8)
        start = np.stack(c).view(F4).reshape(2, 2, warps, 8, 4)
        start = start.transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
        total = multiply(left, right, start, self.cut_off)
        out = total.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)
        return list(np.ascontiguousarray(out).reshape(4, self.threads.lanes).view(U4))
