"""wgmma: products of four warps, of matrices in shared memory.

Memory is read when a `wait_group` completes the product, and guarded until then; accumulators are
poison until then.

Source: PTX ISA 8.7, "Asynchronous warpgroup level matrix instructions"; the canonical layouts that
CUTLASS states at `make_gmma_desc`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .arithmetic import F2, F4, F8, I8, U2, U4, Array, bf16_to_f32
from .async_proxy import PIECE, AsyncProxy, swizzled, warps_of
from .cut_off import CutOff
from .faults import Fault
from .instructions import Site
from .memory import SharedMemory
from .tensor_cores import multiply
from .threads import WARP, Threads

_SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}  # the descriptor's bits 62 and 63 → bytes
_USED = 0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62
_POISON = U4(0xFFFFFFFF)
_TOGETHER = 4  # warps of a warpgroup, 16 rows each


@dataclass(frozen=True)
class Matrix:
    """What a descriptor says of a matrix in shared memory.

    Attributes:
        start: byte address.
        leading: bytes, of the leading dimension.
        stride: bytes, of the stride dimension.
        swizzle: bytes, 0 for none.
    """

    start: int
    leading: int
    stride: int
    swizzle: int

    @classmethod
    def of(cls, bits: int, site: object) -> Matrix:
        """Read a descriptor.

        Raises:
            Fault: it has bits that mean nothing, or starts within a swizzle's rows.
        """
        if bits & ~_USED:
            raise Fault(f"matrix descriptor {bits:#x} has bits that mean nothing: {site}")
        start, leading, stride = ((bits >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        swizzle = _SWIZZLES[bits >> 62]
        if bits >> 49 & 7:
            raise NotImplementedError(f"matrix descriptor {bits:#x} with a base offset: {site}")
        if swizzle and start & (8 * swizzle - 1) >= 128:
            raise Fault(f"matrix descriptor: {start:#x} is not the first row of a swizzle: {site}")
        return cls(start, leading, stride, swizzle)

    def places(self, outer: int, transposed: bool) -> Array:
        """Byte addresses of the pieces of 8 values of an (outer, 16) matrix, 16 along the depth.

        Returns:
            (outer, 2), along the depth; transposed: (outer / 8, 16), along the outer dimension.
        """
        width = self.swizzle or PIECE
        if transposed:
            eight, depth = np.arange(outer // 8)[:, None], np.arange(16)[None, :]
            row = depth % 8 * width
            if self.swizzle:
                wide = width // PIECE
                offset = eight % wide * PIECE + eight // wide * self.leading
                offset = offset + row + depth // 8 * self.stride
            else:
                offset = eight * self.stride + row + depth // 8 * self.leading
        else:
            row, piece = np.arange(outer)[:, None], np.arange(2)[None, :]
            along = PIECE if self.swizzle else self.leading
            offset = row % 8 * width + row // 8 * self.stride + piece * along
        return swizzled((self.start + offset).astype(I8), self.swizzle)


class _Chain:
    """Products into the same registers.

    Attributes:
        places: of the registers.
        values: (warps of the machine, 16, N) fp32.
        pending: (warps of the machine,) how many are under way.
    """

    def __init__(self, places: tuple[int, ...], warps: int) -> None:
        self.places = places
        self.values = np.zeros((warps, 16, 2 * len(places)), F4)
        self.pending = np.zeros(warps, np.int32)


@dataclass
class _Product:
    """One instruction, and the warps that have not waited for it yet.

    Attributes:
        chain: of its accumulators.
        warps: (n,) of the machine.
        groups: (n,) commit group of each.
        left: (n, 32) pieces of shared memory, each warp's 16 rows.
        right: (n, 2 N) pieces.
        keep: (n,) whether the accumulators are added to.
        signs, transposed: of left and right.
        site: the instruction.
    """

    chain: _Chain
    warps: Array
    groups: Array
    left: Array
    right: Array
    keep: Array
    signs: tuple[int, int]
    transposed: tuple[bool, bool]
    site: Site

    def only(self, some: Array) -> _Product:
        return _Product(
            self.chain,
            self.warps[some],
            self.groups[some],
            self.left[some],
            self.right[some],
            self.keep[some],
            self.signs,
            self.transposed,
            self.site,
        )


class Warpgroups:
    """The wgmma instructions of some programs."""

    def __init__(
        self,
        threads: Threads,
        shared: SharedMemory,
        proxy: AsyncProxy,
        registers: list[Array],
        cut_off: CutOff | None,
    ) -> None:
        self.threads, self.shared, self.proxy = threads, shared, proxy
        self._registers, self._cut_off = registers, cut_off
        self._count = threads.lanes // WARP
        self._poison = np.full(threads.lanes, _POISON, U4)
        self._groups = np.zeros(self._count, I8)
        self._queue: list[_Product] = []
        self._chains: dict[tuple[int, ...], _Chain] = {}
        # What the registers were when a warp last fenced them.
        self._fenced: list[list[Array] | None] = [None] * self._count
        # A warpgroup's warps issue the same products, each when it gets there.
        self._issued = np.zeros(self._count, I8)
        self._agreed: dict[tuple[int, int], tuple[int, int]] = {}

    def fence(self, site: Site, mask: Array | None) -> None:
        """wgmma.fence: what was written to registers is before the products that follow."""
        now = list(self._registers)
        for warp in warps_of(self.threads, site, mask):
            self._fenced[warp] = now

    def commit(self, site: Site, mask: Array | None) -> None:
        """wgmma.commit_group: the products so far are a group."""
        self._groups[warps_of(self.threads, site, mask)] += 1

    def multiply(
        self,
        site: Site,
        mask: Array | None,
        places: tuple[int, ...],
        left: Array,
        right: Array,
        keep: Array,
        *immediate: int,
    ) -> None:
        """wgmma.mma_async.m64nNk16: `places` of the accumulators, descriptors, scale-d.

        `immediate`: signs of left and right, whether they are transposed.
        """
        shape = re.search(r"\.m64n(\d+)k16\.", site.opcode)
        if shape is None or int(shape[1]) != 2 * len(places):
            raise Fault(f"wgmma with {len(places)} accumulators: {site}")
        if not {*immediate[:2]} <= {-1, 1} or not {*immediate[2:]} <= {0, 1}:
            raise Fault(f"wgmma: signs and transpositions {immediate}: {site}")
        warps = warps_of(self.threads, site, mask)
        left, right, keep = (self._uniform(site, x, warps) for x in (left, right, keep))
        self._agree(site, left, right, warps)
        across = bool(immediate[2]), bool(immediate[3])
        rank = warps % self.threads.warps
        rows = self._pieces(site, left, 64, across[0], warps)
        # Each warp multiplies 16 of the 64 rows.
        rows = rows.reshape(len(warps), _TOGETHER, -1)[np.arange(len(warps)), rank % _TOGETHER]
        columns = self._pieces(site, right, 2 * len(places), across[1], warps)
        for part in (rows, columns):
            self.proxy.promise_read(site, part, rank)
            self._mark(site, part, warps)
        chain = self._start(site, places, warps)
        signs = immediate[0], immediate[1]
        groups = self._groups[warps]
        product = _Product(chain, warps, groups, rows, columns, keep, signs, across, site)
        self._queue.append(product)
        chain.pending[warps] += 1

    def wait(self, site: Site, mask: Array | None, newest: int) -> None:
        """wgmma.wait_group: all groups but the newest are complete."""
        waits = np.zeros(self._count, bool)
        waits[warps_of(self.threads, site, mask)] = True
        still, chains = [], {}
        for product in self._queue:
            done = waits[product.warps]
            done &= product.groups < self._groups[product.warps] - newest
            if done.any():
                self._complete(product.only(done))
                chains[product.chain.places] = product.chain
                product = product.only(~done)
            if len(product.warps):
                still.append(product)
        self._queue = still
        for chain in chains.values():
            ready = np.flatnonzero(waits & (chain.pending == 0))
            if len(ready):
                self._finish(site, chain, ready)

    def end(self) -> None:
        """The programs have ended.

        Raises:
            Fault: a product is under way.
        """
        for product in self._queue:
            raise Fault(f"ended while a wgmma is under way: {product.site}")

    # -- starting

    def _uniform(self, site: Site, values: Array, warps: Array) -> Array:
        found = values.reshape(-1, WARP)[warps]
        if (found != found[:, :1]).any():
            raise Fault(f"wgmma: the threads of a warp give different operands: {site}")
        return found[:, 0]

    def _agree(self, site: Site, left: Array, right: Array, warps: Array) -> None:
        given = zip(left.tolist(), right.tolist(), strict=True)
        for warp, pair in zip(warps.tolist(), given, strict=True):
            number = int(self._issued[warp])
            if self._agreed.setdefault((warp // _TOGETHER, number), pair) != pair:
                raise Fault(f"wgmma: the warps of a group give different descriptors: {site}")
        self._issued[warps] += 1

    def _pieces(self, site: Site, bits: Array, outer: int, across: bool, warps: Array) -> Array:
        """(warps, pieces) of the matrices that descriptors (warps,) describe."""
        found = {}
        for one in np.unique(bits).tolist():
            places = Matrix.of(one, site).places(outer, across)
            if places.max() + PIECE > self.shared.size:
                raise Fault(f"wgmma reads {places.max() + PIECE} of {self.shared.size}: {site}")
            found[one] = places.ravel() // PIECE
        first = warps // self.threads.warps * (self.shared.stride // PIECE)
        return np.stack([found[one] for one in bits.tolist()]) + first[:, None]

    def _mark(self, site: Site, pieces: Array, warps: Array) -> None:
        lanes = np.repeat(warps * WARP, pieces.shape[1])
        self.shared.mark_read(site, pieces.ravel() * PIECE, PIECE, lanes)

    def _start(self, site: Site, places: tuple[int, ...], warps: Array) -> _Chain:
        """The chain of these accumulators, with what the registers of new warps hold."""
        chain = self._chains.get(places)
        if chain is None:
            for other in self._chains.values():
                if set(other.places) & set(places) and other.pending.any():
                    raise Fault(f"wgmma: accumulators of another shape are under way: {site}")
            chain = self._chains[places] = _Chain(places, self._count)
        fresh = warps[chain.pending[warps] == 0]
        self._untouched(site, chain, warps[chain.pending[warps] > 0])
        if len(fresh):
            for warp in fresh.tolist():
                self._check_fence(site, places, warp)
            words = np.stack([self._registers[place] for place in places]).view(F4)
            chain.values[fresh] = gathered(words, fresh)
            for place in places:
                self._set(place, self._poison, fresh)
        return chain

    def _check_fence(self, site: Site, places: tuple[int, ...], warp: int) -> None:
        fenced, lanes = self._fenced[warp], slice(WARP * warp, WARP * warp + WARP)
        if fenced is None:
            raise Fault(f"wgmma without a wgmma.fence before: {site}")
        changed = [
            now[lanes]
            for place in places
            if (now := self._registers[place]) is not fenced[place]
            and (now[lanes] != fenced[place][lanes]).any()
        ]
        # LLVM puts copies of registers behind the fence; ptxas mends these (its warning C7515).
        known = {register[lanes].tobytes() for register in fenced} if changed else set()
        if any(now.tobytes() not in known for now in changed):
            raise Fault(f"wgmma: an accumulator was written after wgmma.fence: {site}")

    def _untouched(self, site: Site, chain: _Chain, warps: Array) -> None:
        """Accumulators under way are as poisoned as they were left."""
        lanes = _lanes(warps)
        for place in chain.places:
            now = self._registers[place]
            if now is not self._poison and (now[lanes] != _POISON).any():
                raise Fault(f"an accumulator was written while a wgmma is under way: {site}")

    # -- completing

    def _complete(self, product: _Product) -> None:
        chain, warps, left, right = product.chain, product.warps, product.left, product.right
        for part in (left, right):
            self.proxy.released(part)
            self._mark(product.site, part, warps)
        chain.pending[warps] -= 1
        outer = chain.values.shape[2]
        start = np.where(product.keep[:, None, None], chain.values[warps], F4(0))
        # Warps with the same right matrix multiply it together.
        first = np.flatnonzero(np.r_[True, (right[1:] != right[:-1]).any(1)])
        together = len(warps) // len(first)
        if not np.array_equal(first, np.arange(0, len(warps), together)):
            first, together = np.arange(len(warps)), 1
        a = self._values(product, left, 16, product.transposed[0]) * product.signs[0]
        b = self._values(product, right[first], outer, product.transposed[1])
        b = (b * product.signs[1]).swapaxes(1, 2)
        shape = len(first), 16 * together
        a, start = a.reshape(*shape, 16), start.reshape(*shape, outer)
        bf16 = "bf16" in product.site.modifiers
        total = multiply(a, b, start, self._cut_off, bf16)
        chain.values[warps] = total.reshape(len(warps), 16, outer)

    def _values(self, product: _Product, pieces: Array, outer: int, across: bool) -> Array:
        """(n, outer, 16) fp64 of pieces."""
        bits = self.shared.views[2].reshape(-1, 8)[pieces]
        if across:
            bits = bits.reshape(len(pieces), outer // 8, 16, 8).swapaxes(2, 3)
        bits = np.ascontiguousarray(bits, dtype=U2).reshape(len(pieces), outer, 16)
        bf16 = "bf16" in product.site.modifiers
        return (bf16_to_f32(bits) if bf16 else bits.view(F2)).astype(F8)

    def _finish(self, site: Site, chain: _Chain, warps: Array) -> None:
        """The registers of `warps` hold their sums."""
        self._untouched(site, chain, warps)
        words = np.zeros((len(chain.places), self.threads.lanes), U4)
        words[:, _lanes(warps)] = scattered(chain.values[warps]).view(U4)
        snapshots = {id(seen): seen for warp in warps if (seen := self._fenced[warp])}
        for place, word in zip(chain.places, words, strict=True):
            self._set(place, word, warps)
            # Its own results need no fence.
            for seen in snapshots.values():
                seen[place] = self._registers[place]

    def _set(self, place: int, values: Array, warps: Array) -> None:
        if len(warps) < self._count:
            lanes, chosen = _lanes(warps), values
            values = self._registers[place].copy()
            values[lanes] = chosen[lanes]
        self._registers[place] = values


def gathered(words: Array, warps: Array) -> Array:
    """(n, 16, N) of accumulators (N / 2, lanes), as `warps` (n,) hold them."""
    # Columns' eight, rows' half, one of a pair, warp, row, pair.
    found = words.reshape(len(words) // 4, 2, 2, -1, 8, 4)[:, :, :, warps]
    found = found.transpose(3, 1, 4, 0, 5, 2)
    return np.ascontiguousarray(found).reshape(len(warps), 16, 2 * len(words))


def scattered(values: Array) -> Array:
    """(N / 2, 32 n) accumulators of (n, 16, N): the reverse of `gathered`."""
    warps, _, outer = values.shape
    found = values.reshape(warps, 2, 8, outer // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return np.ascontiguousarray(found).reshape(outer // 2, WARP * warps)


def _lanes(warps: Array) -> Array:
    return (WARP * warps[:, None] + np.arange(WARP)).ravel()
