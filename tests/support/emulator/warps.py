"""Instructions that the 32 threads of a warp execute together."""

from __future__ import annotations

import numpy as np

from .arithmetic import I8, U2, U4, Array
from .faults import Fault
from .instructions import Site
from .memory import SharedMemory
from .threads import WARP, Threads

_ALL = U4(0xFFFFFFFF)
_REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


class Warps:
    """Shuffles, reductions, votes, and matrices out of shared memory."""

    def __init__(self, threads: Threads, shared: SharedMemory) -> None:
        self.threads, self.shared = threads, shared

    def _all(self, site: Site, mask: Array | None, members: Array) -> None:
        """Every lane is there, and is asked for."""
        self.threads.whole_warps(site, mask)
        if (members if mask is None else members[mask]).min(initial=_ALL) != _ALL:
            raise NotImplementedError(f"a part of a warp: {site}")

    def meet(self, site: Site, mask: Array | None, members: Array) -> None:
        """bar.warp.sync: lanes are in step, so nothing is left to do."""
        self._all(site, mask, members)

    def shuffle(
        self,
        site: Site,
        mask: Array | None,
        values: Array,
        by: Array,
        clamp: Array,
        members: Array,
    ) -> tuple[Array, Array]:
        """Another lane's value, and whether that lane lies in range; its own where not."""
        self._all(site, mask, members)
        lane = self.threads.lane
        by, clamp = (by & U4(31)).astype(I8), clamp.astype(I8)
        segment = (clamp >> 8) & 0x1F
        low = lane & segment
        limit = low | (clamp & 0x1F & ~segment)
        if "up" in site.modifiers:
            source = lane - by
            valid = source >= limit
        else:
            if "down" in site.modifiers:
                source = lane + by
            elif "bfly" in site.modifiers:
                source = lane ^ by
            else:
                source = low | (by & ~segment)
            valid = source <= limit
        return values[self.threads.first_lane + np.where(valid, source, lane)], valid

    def reduce(self, site: Site, mask: Array | None, values: Array, members: Array) -> Array:
        """redux: one number for the warp, in every lane."""
        self._all(site, mask, members)
        function = _REDUCTIONS[site.opcode.split(".")[2]]
        found = function.reduce(values.reshape(-1, WARP), axis=1, dtype=values.dtype)
        return np.repeat(found, WARP)

    def vote(self, site: Site, mask: Array | None, values: Array, members: Array) -> Array:
        """Whether any, or all, lanes say yes."""
        self._all(site, mask, members)
        lanes = values.reshape(-1, WARP)
        return np.repeat(lanes.any(1) if "any" in site.modifiers else lanes.all(1), WARP)

    def ballot(self, site: Site, mask: Array | None, values: Array, members: Array) -> Array:
        """A bit a lane."""
        self._all(site, mask, members)
        bits = values.reshape(-1, WARP) * (U4(1) << np.arange(WARP, dtype=U4))
        return np.repeat(bits.sum(1, dtype=U4), WARP)

    def load_matrices(self, site: Site, mask: Array | None, addresses: Array) -> list[Array]:
        """ldmatrix: 8×8 matrices of 16-bit values, a row from each of their eight lanes."""
        threads, count = self.threads, site.count
        if f"x{count}" not in site.modifiers:
            raise Fault(f"{count} results: {site}")
        some = threads.whole_warps(site, mask)
        rows = addresses.reshape(-1, WARP)[:, : 8 * count]
        lanes = np.arange(threads.lanes).reshape(-1, WARP)[:, : 8 * count]
        if some is not None:
            rows, lanes = rows[some], lanes[some]
        found = self.shared.read(site, rows.ravel(), 2, 8, lanes.ravel())
        matrices = found.reshape(-1, count, 8, 8)
        if "trans" in site.modifiers:
            matrices = matrices.swapaxes(2, 3)
        words = np.ascontiguousarray(matrices, dtype=U2).view(U4).reshape(-1, count, WARP)
        out = np.zeros((count, threads.lanes // WARP, WARP), U4)
        out[:, slice(None) if some is None else some] = words.swapaxes(0, 1)
        return list(out.reshape(count, threads.lanes))

    def store_matrices(
        self, site: Site, mask: Array | None, addresses: Array, values: list[Array]
    ) -> None:
        """stmatrix: the reverse."""
        threads, count = self.threads, len(values)
        if f"x{count}" not in site.modifiers:
            raise Fault(f"{count} operands: {site}")
        some = threads.whole_warps(site, mask)
        chosen = slice(None) if some is None else some
        rows = addresses.reshape(-1, WARP)[chosen, : 8 * count]
        lanes = np.arange(threads.lanes).reshape(-1, WARP)[chosen, : 8 * count]
        words = np.stack(values).reshape(count, -1, WARP)[:, chosen].swapaxes(0, 1)
        matrices = np.ascontiguousarray(words).view(U2).reshape(-1, count, 8, 8)
        if "trans" in site.modifiers:
            matrices = matrices.swapaxes(2, 3)
        self.shared.write(site, rows.ravel(), matrices.reshape(-1, 8), lanes.ravel())

    def elect(self, site: Site, mask: Array | None, members: Array) -> tuple[Array, Array]:
        """elect.sync: a leader, here always lane 0, and whether a lane is it."""
        self._all(site, mask, members)
        return np.zeros(self.threads.lanes, U4), self.threads.lane == 0
