"""Shared memory as the asynchronous proxy uses it: bulk copies, warpgroup products, their fences.

States are kept by pieces of 16 bytes, the unit of tensor maps and matrix descriptors. A place is a
byte in the shared memory of all programs behind each other.

Source: PTX ISA 8.7, "Async proxy" and "membar, fence" (`fence.proxy.async`), "Swizzling modes".
"""

from __future__ import annotations

import numpy as np

from .arithmetic import U4, Array
from .faults import Fault, Findings
from .threads import WARP, Threads

_EVERY = U4(0xFFFFFFFF)
PIECE = 16
WIDTHS = (0, 32, 64, 128)  # bytes of the swizzles, in the order in which a tensor map counts them


def swizzled(address: Array, width: int) -> Array:
    """Where the 16 bytes at an address lie under a swizzle of `width` bytes, 0 for none.

    The number of these 16 bytes, within `width`, is XORed with that of their 128 bytes.
    """
    mask = {0: 0, 32: 1, 64: 3, 128: 7}[width]
    return address ^ ((address >> 7 & mask) << 4)


class AsyncProxy:
    """What is under way in shared memory, and what the async proxy may not see yet.

    Attributes:
        landing: whether a bulk copy is under way to a piece.
        reading: how many products will still read a piece.
        unfenced: bits of the warps that have written a piece since their last proxy fence, and
            since the last barrier.
        stale: bits of the warps for which a write before the last barrier has no proxy fence.
        unseen: bits of the warps that have not waited for the copy that has landed.
        barriers: whether 8 bytes are an mbarrier.
    """

    def __init__(self, threads: Threads, stride: int, findings: Findings) -> None:
        """`stride`: bytes of shared memory from one program to the next."""
        if threads.warps > 32:
            raise NotImplementedError(f"programs of {threads.warps} warps, wanted at most 32")
        self.threads, self.findings = threads, findings
        self._pieces = stride // PIECE
        count = max(1, threads.programs * self._pieces)
        self.landing = np.zeros(count, bool)
        self.reading = np.zeros(count, np.int32)
        self.unfenced = np.zeros(count, U4)
        self.stale = np.zeros(count, U4)
        self.unseen = np.zeros(count, U4)
        self.barriers = np.zeros(2 * count, bool)

    # -- the generic proxy: loads, stores, cp.async

    def read(self, site: object, place: Array, size: int, warp: Array) -> None:
        """Threads of `warp` read `size` (<= 16) bytes at each place."""
        piece = self._piece(site, place, size)
        if self.landing[piece].any():
            raise Fault(f"shared bytes read while a bulk copy is under way: {site}")
        self._seen(site, piece, warp)

    def write(self, site: object, place: Array, size: int, warp: Array) -> None:
        """Threads of `warp` write `size` (<= 16) bytes at each place."""
        piece = self._piece(site, place, size)
        if self.landing[piece].any():
            raise Fault(f"shared bytes written while a bulk copy is under way: {site}")
        if self.reading[piece].any():
            raise Fault(f"shared bytes written while a wgmma may still read them: {site}")
        self._seen(site, piece, warp)
        np.bitwise_or.at(self.unfenced, piece, _bit(warp))

    def fence(self, site: object, mask: Array | None) -> None:
        """fence.proxy.async: what a warp has written, or has been told of by a barrier."""
        if mask is not None and (mask.reshape(-1, WARP).sum(1) % WARP).any():
            raise NotImplementedError(f"a proxy fence of a part of a warp: {site}")
        unfenced, stale = self._by_program(self.unfenced), self._by_program(self.stale)
        for number in warps_of(self.threads, site, mask):
            program, warp = divmod(int(number), self.threads.warps)
            unfenced[program] &= ~_bit(warp)
            stale[program] &= ~_bit(warp)

    def barrier(self, programs: Array) -> None:
        """All warps of these programs know what each of them has done."""
        unfenced, stale = self._by_program(self.unfenced), self._by_program(self.stale)
        # A fence that one warp has made is now before what the others do.
        known = np.where(stale[programs] == _EVERY, _EVERY, U4(0))
        stale[programs] = np.where(unfenced[programs] != 0, _EVERY, known)
        unfenced[programs] = 0
        self._by_program(self.unseen)[programs] = 0

    # -- the async proxy

    def promise_read(self, site: object, piece: Array, warp: Array) -> None:
        """Products of warps (n,) will read pieces (n, m), until they are `released`."""
        self._no_barrier(site, piece)
        if self.landing[piece].any():
            raise Fault(f"wgmma reads shared bytes while a bulk copy is under way: {site}")
        self._fenced(site, piece, warp[:, None])
        self._seen(site, piece, warp[:, None])
        np.add.at(self.reading, piece, np.int32(1))

    def released(self, piece: Array) -> None:
        """Products have read these pieces."""
        np.subtract.at(self.reading, piece, np.int32(1))

    def promise_write(self, site: object, piece: Array, warp: int) -> None:
        """A bulk copy that a thread of `warp` has started will write these pieces."""
        self._no_barrier(site, piece)
        if self.landing[piece].any():
            raise Fault(f"two bulk copies under way to the same shared bytes: {site}")
        if self.reading[piece].any():
            raise Fault(f"a bulk copy to bytes that a wgmma may still read: {site}")
        warps = np.full(len(piece), warp)
        self._fenced(site, piece, warps)
        self._seen(site, piece, warps)
        self.landing[piece] = True

    def landed(self, piece: Array) -> None:
        """A bulk copy has written these pieces; no warp knows yet."""
        self.landing[piece] = False
        self.unseen[piece] = _EVERY

    def waited(self, piece: Array, warps: Array) -> None:
        """These warps have waited for the copy that wrote these pieces."""
        self.unseen[piece] &= ~np.bitwise_or.reduce(_bit(warps))

    # -- checks

    def _piece(self, site: object, place: Array, size: int) -> Array:
        if self.barriers[place >> 3].any() or self.barriers[(place + size - 1) >> 3].any():
            raise Fault(f"an mbarrier's bytes used as plain memory: {site}")
        return place >> 4

    def _no_barrier(self, site: object, piece: Array) -> None:
        if self.barriers[2 * piece].any() or self.barriers[2 * piece + 1].any():
            raise Fault(f"an mbarrier's bytes used as plain memory: {site}")

    def _seen(self, site: object, piece: Array, warp: Array) -> None:
        if (self.unseen[piece] & _bit(warp)).any():
            self.findings.races.add(
                f"bytes of a bulk copy that the warp has not waited for: {site}"
            )

    def _fenced(self, site: object, piece: Array, warp: Array) -> None:
        if self.unfenced[piece].any() or (self.stale[piece] & _bit(warp)).any():
            raise Fault(f"bytes that ordinary stores wrote, no fence.proxy.async: {site}")

    def _by_program(self, states: Array) -> Array:
        programs = self.threads.programs
        return states[: programs * self._pieces].reshape(programs, self._pieces)


def warps_of(threads: Threads, site: object, mask: Array | None) -> Array:
    """Numbers of the warps, over all programs, that execute an instruction together."""
    some = threads.whole_warps(site, mask)
    return np.arange(threads.lanes // WARP) if some is None else np.flatnonzero(some)


def _bit(warp: Array | int) -> Array:
    return U4(1) << np.asarray(warp).astype(U4)
