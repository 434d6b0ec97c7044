"""Mbarriers, and the bulk tensor copies that complete their phases.

A copy lands as late as a program allows: when a thread waits for the phase that counts its bytes.

Source: PTX ISA 8.7, "mbarrier" and "cp.async.bulk.tensor"; CUDA driver API,
`cuTensorMapEncodeTiled`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from .arithmetic import I4, I8, U1, Array
from .async_proxy import PIECE, WIDTHS, AsyncProxy, swizzled
from .faults import Fault, Findings
from .instructions import Site
from .memory import SharedMemory, Tensors
from .threads import Threads

_MOST = 1 << 20  # arrivals, and bytes, of a phase stay below


@dataclass(frozen=True)
class TensorMap:
    """A matrix in global memory, read by boxes; what lies outside of it is read as zeros.

    Attributes:
        address: of its first element.
        shape: (rows, columns).
        pitch: bytes from one row to the next.
        itemsize: bytes.
        box: (rows, columns).
        swizzle: bytes of the swizzle, 0, 32, 64 or 128.
    """

    address: int
    shape: tuple[int, int]
    pitch: int
    itemsize: int
    box: tuple[int, int]
    swizzle: int

    def __post_init__(self) -> None:
        for wrong, why in (
            (self.address % 16, f"address: got {self.address:#x}, wanted whole 16 bytes"),
            (self.pitch % 16, f"pitch: got {self.pitch}, wanted whole 16 bytes"),
            (min(self.shape) < 1, f"shape: got {self.shape}, wanted at least 1"),
            (not all(1 <= n <= 256 for n in self.box), f"box: got {self.box}, wanted 1 to 256"),
            (self.width % PIECE, f"box: got rows of {self.width} bytes, wanted whole {PIECE}"),
            (self.swizzle not in WIDTHS, f"swizzle: got {self.swizzle}, wanted one of {WIDTHS}"),
            (
                0 < self.swizzle < self.width,
                f"box: got rows of {self.width} bytes, wanted at most the swizzle's {self.swizzle}",
            ),
        ):
            if wrong:
                raise Fault(f"tensor map: {why}")
        if self.swizzle > self.width:
            raise NotImplementedError(
                f"tensor map: rows of {self.width} bytes under a swizzle of {self.swizzle}"
            )

    @property
    def width(self) -> int:
        """Bytes of a box's row."""
        return self.box[1] * self.itemsize

    @property
    def nbytes(self) -> int:
        """Of a box: what it counts on its mbarrier, the zeros included."""
        return self.box[0] * self.width

    @property
    def alignment(self) -> int:
        """Of a box in shared memory: what a copy needs, and where the swizzle starts again."""
        return max(128, 8 * self.swizzle)

    def places(self, start: int) -> Array:
        """Where the pieces of a box at `start` lie, row by row."""
        return swizzled(start + PIECE * np.arange(self.nbytes // PIECE, dtype=I8), self.swizzle)

    def inside(self, corner: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of the matrix that a box at `corner` (row, column) holds."""
        rows, columns = (
            slice(min(max(first, 0), size), min(max(first + count, 0), size))
            for first, count, size in zip(corner, self.box, self.shape, strict=True)
        )
        return rows, columns

    def read(self, corner: tuple[int, int], rows_of: Callable[[Array, int], Array]) -> Array:
        """The pieces (n, 16) of a box; `rows_of` gives (n, bytes) of addresses (n,) and bytes."""
        rows, columns = self.inside(corner)
        found = np.zeros((self.box[0], self.width), U1)
        wide = (columns.stop - columns.start) * self.itemsize
        if rows.stop > rows.start and wide > 0:
            addresses = self.address + np.arange(rows.start, rows.stop, dtype=I8) * self.pitch
            first = (columns.start - corner[1]) * self.itemsize
            below = slice(rows.start - corner[0], rows.stop - corner[0])
            begin = addresses + columns.start * self.itemsize
            found[below, first : first + wide] = rows_of(begin, wide)
        return found.reshape(-1, PIECE)


@dataclass(frozen=True)
class BulkCopy:
    """A copy under way.

    Attributes:
        pieces: of shared memory, in the box's order.
        source: what is copied.
        corner: (row, column) of the box.
        site: the instruction.
        lane: that has started it.
    """

    pieces: Array
    source: TensorMap
    corner: tuple[int, int]
    site: Site
    lane: int


@dataclass
class Barrier:
    """An mbarrier.

    Attributes:
        count: arrivals of a phase.
        pending: arrivals that this phase still lacks.
        maker: warp and epoch of its init.
        expected: bytes of this phase.
        phase: how many phases are complete.
        copies: of this phase.
        landed: pieces that the last phase's copies have written.
        users: warp → epoch of its last use.
    """

    count: int
    pending: int
    maker: tuple[int, int]
    expected: int = 0
    phase: int = 0
    copies: list[BulkCopy] = field(default_factory=list)
    landed: list[Array] = field(default_factory=list)
    users: dict[int, int] = field(default_factory=dict)

    @property
    def brought(self) -> int:
        """Bytes of this phase's copies."""
        return sum(copy.source.nbytes for copy in self.copies)

    def __str__(self) -> str:
        return (
            f"phase {self.phase} lacks {self.pending} of {self.count} arrivals, and copies bring"
            f" {self.brought} of {self.expected} bytes"
        )


class Barriers:
    """The mbarriers of all programs, and bulk copies.

    Attributes:
        spinning: the lanes that have asked for a phase that is not complete.
        copied: bytes by bulk copies.
    """

    def __init__(
        self,
        threads: Threads,
        proxy: AsyncProxy,
        shared: SharedMemory,
        tensors: Tensors,
        findings: Findings,
        maps: dict[int, TensorMap],
    ) -> None:
        """`maps`: tensor maps by their address."""
        self.threads, self.proxy, self.findings, self.maps = threads, proxy, findings, maps
        self.shared, self.tensors = shared, tensors
        self._barriers: dict[tuple[int, int], Barrier] = {}
        self.spinning = np.zeros(threads.lanes, bool)
        self._asked: dict[int, tuple[int, object]] = {}
        self.copied = 0

    def init(self, site: Site, mask: Array | None, addresses: Array, counts: Array) -> None:
        """mbarrier.init: the count of arrivals that complete a phase."""
        for lane, program, warp, epoch in self._each(mask):
            address, count = int(addresses[lane]), int(counts[lane])
            if address % 8 or address + 8 > self.shared.size:
                raise Fault(
                    f"mbarrier at {address}, wanted whole 8 of {self.shared.size} bytes: {site}"
                )
            if (program, address) in self._barriers:
                raise Fault(f"mbarrier.init of one that is in use: {site}")
            if not 1 <= count < _MOST:
                raise Fault(f"mbarrier of {count} arrivals, wanted 1 to 2^20 - 1: {site}")
            unit = (program * self.shared.stride + address) // 8
            if self.proxy.landing[unit // 2] or self.proxy.reading[unit // 2]:
                raise Fault(f"mbarrier in bytes that an asynchronous operation uses: {site}")
            self.proxy.barriers[unit] = True
            self._barriers[program, address] = Barrier(count, count, (warp, epoch))

    def invalidate(self, site: Site, mask: Array | None, addresses: Array) -> None:
        """mbarrier.inval: its bytes are plain memory again."""
        for lane, program, warp, epoch in self._each(mask):
            address = int(addresses[lane])
            barrier = self._find(site, program, address)
            if barrier.copies:
                raise Fault(f"mbarrier.inval while copies are under way: {barrier}: {site}")
            if any(w != warp and e == epoch for w, e in barrier.users.items()):
                self.findings.races.add(
                    f"mbarrier.inval of one that another warp may still use: {site}"
                )
            self._use(site, barrier, [warp], epoch)
            self.proxy.barriers[(program * self.shared.stride + address) // 8] = False
            del self._barriers[program, address]

    def arrive(self, site: Site, mask: Array | None, addresses: Array, nbytes: Array) -> None:
        """mbarrier.arrive.expect_tx: so many bytes more are expected, then a thread arrives."""
        for lane, program, warp, epoch in self._each(mask):
            barrier = self._find(site, program, int(addresses[lane]))
            self._use(site, barrier, [warp], epoch)
            if not barrier.pending:
                raise Fault(f"arrival at a phase nobody has waited for: {barrier}: {site}")
            if barrier.expected + int(nbytes[lane]) >= _MOST:
                raise Fault(f"mbarrier of {nbytes[lane]} bytes, wanted less than 2^20: {site}")
            barrier.expected += int(nbytes[lane])
            barrier.pending -= 1
            self.spinning[self.threads.program == program] = False

    def copy(
        self,
        site: Site,
        mask: Array | None,
        starts: Array,
        maps: Array,
        columns: Array,
        rows: Array,
        addresses: Array,
    ) -> None:
        """cp.async.bulk.tensor.2d: a box at (row, column) of a map to `starts`."""
        threads = self.threads
        for lane, program, warp, epoch in self._each(mask):
            source, start = self.maps.get(int(maps[lane])), int(starts[lane])
            if source is None:
                raise Fault(f"no tensor map at {int(maps[lane])}: {site}")
            barrier = self._find(site, program, int(addresses[lane]))
            self._use(site, barrier, [warp], epoch)
            if start % source.alignment:
                raise Fault(f"a box at {start}, wanted whole {source.alignment} bytes: {site}")
            if start + source.nbytes > self.shared.size:
                raise Fault(
                    f"a box of {source.nbytes} bytes at {start} of {self.shared.size}: {site}"
                )
            corner = (
                int(rows[lane : lane + 1].view(I4)[0]),
                int(columns[lane : lane + 1].view(I4)[0]),
            )
            places = program * self.shared.stride + source.places(start)
            self.proxy.promise_write(site, places // PIECE, warp)
            self.shared.check_unused(site, places, PIECE, np.full(len(places), lane))
            barrier.copies.append(BulkCopy(places // PIECE, source, corner, site, lane))
            self.copied += source.nbytes
            self.spinning[threads.program == program] = False

    def wait(self, site: Site, mask: Array | None, addresses: Array, parity: Array) -> Array:
        """mbarrier.try_wait.parity: whether the phase of this parity is complete.

        What completes it lands now.
        """
        threads = self.threads
        lanes = np.arange(threads.lanes) if mask is None else np.flatnonzero(mask)
        done = np.zeros(threads.lanes, bool)
        asked = np.stack([threads.program[lanes], addresses[lanes], parity[lanes]]).astype(I8)
        for program, address, odd in np.unique(asked, axis=1).T.tolist():
            same = lanes[(asked.T == (program, address, odd)).all(1)]
            if odd not in (0, 1):
                raise Fault(f"parity {odd}, wanted 0 or 1: {site}")
            barrier = self._find(site, program, address)
            warps = np.unique(threads.warp[same])
            self._use(site, barrier, warps.tolist(), int(threads.epoch[program]))
            done[same] = self._complete(site, program, barrier, odd, warps)
            self._asked[program] = address, site
        self.spinning[lanes] = ~done[lanes]
        return done

    def stuck(self) -> str:
        """For what threads wait for ever."""
        program = int(self.threads.program[self.spinning][0])
        address, site = self._asked[program]
        barrier = self._barriers[program, address]
        return f"waits for ever for the mbarrier at {address}: {barrier}: {site}"

    def end(self) -> None:
        """The programs have ended.

        Raises:
            Fault: copies are under way.
        """
        for barrier in self._barriers.values():
            for copy in barrier.copies:
                raise Fault(f"ended while a bulk copy is under way: {barrier}: {copy.site}")

    def _complete(self, site: Site, program: int, barrier: Barrier, odd: int, warps: Array) -> bool:
        if barrier.phase % 2 == odd:
            if barrier.pending or barrier.brought < barrier.expected:
                return False
            if barrier.brought > barrier.expected:
                raise Fault(f"more bytes than the mbarrier expects: {barrier}: {site}")
            for copy in barrier.copies:
                rows = partial(self.tensors.rows, copy.site, copy.lane)
                self.shared.fill(copy.pieces * PIECE, copy.source.read(copy.corner, rows))
                self.proxy.landed(copy.pieces)
            barrier.landed = [copy.pieces for copy in barrier.copies]
            barrier.copies, barrier.expected = [], 0
            barrier.pending, barrier.phase = barrier.count, barrier.phase + 1
            self.spinning[self.threads.program == program] = False
        for pieces in barrier.landed:
            self.proxy.waited(pieces, warps)
        return True

    def _each(self, mask: Array | None) -> Iterator[tuple[int, int, int, int]]:
        """(lane, program, warp, epoch) of the threads that execute an instruction."""
        threads = self.threads
        for lane in range(threads.lanes) if mask is None else np.flatnonzero(mask).tolist():
            program = int(threads.program[lane])
            yield lane, program, int(threads.warp[lane]), int(threads.epoch[program])

    def _find(self, site: Site, program: int, address: int) -> Barrier:
        found = self._barriers.get((program, address))
        if found is None:
            raise Fault(f"no mbarrier at {address}: it was not initialised: {site}")
        return found

    def _use(self, site: Site, barrier: Barrier, warps: list[int], epoch: int) -> None:
        maker, made = barrier.maker
        barrier.users |= dict.fromkeys(warps, epoch)
        if made == epoch and any(warp != maker for warp in warps):
            self.findings.races.add(
                f"an mbarrier used before its init is visible, no barrier between: {site}"
            )
