"""Matrix products: how fragments lie in registers, and how a tensor core adds."""

from __future__ import annotations

import numpy as np

from .arithmetic import F2, F4, F8, U2, U4, Array, bf16_to_f32
from .cut_off import CutOff
from .faults import Fault
from .instructions import Site
from .threads import WARP, Threads


def multiply(left: Array, right: Array, start: Array, cut_off: CutOff | None, bf16: bool) -> Array:
    """A product of 16-bit values in fp64, and an fp32 sum: rounded once, or cut off."""
    if cut_off is not None:
        return cut_off(left, right, start, 2.0 ** (-126 if bf16 else -14))
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
        if f"m16n8k{8 * eights}" not in site.modifiers or (len(a), len(c)) != (2 * eights, 4):
            raise Fault(f"mma of {len(a)}, {len(b)} and {len(c)} registers: {site}")
        if site.count != len(c):
            raise Fault(f"mma with {site.count} results, wanted {len(c)}: {site}")
        bf16 = "bf16" in site.modifiers

        def wide(words: list[Array]) -> Array:
            bits = np.stack(words).view(U2).reshape(len(words), warps, 8, 4, 2)
            values = bf16_to_f32(bits) if bf16 else bits.view(F2)
            return values.astype(F8)

        # Depth's eight, row's eight, warp, row, pair of the depth, one of it.
        left = wide(a).reshape(eights, 2, warps, 8, 4, 2)
        left = left.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, 8 * eights)
        right = wide(b).transpose(1, 0, 3, 4, 2).reshape(warps, 8 * eights, 8)
        start = np.stack(c).view(F4).reshape(2, 2, warps, 8, 4)
        start = start.transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
        total = multiply(left, right, start, self.cut_off, bf16)
        out = total.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)
        return list(np.ascontiguousarray(out).reshape(4, self.threads.lanes).view(U4))
