"""Global and shared memory: what may be touched, what was written, and who races whom.

Races are found by barriers alone: two warps of a program touch a byte between the same two
barriers, one of them writing; or two programs of a launch touch a byte, one of them writing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from .arithmetic import I8, U1, U4, U8, UNSIGNED, Array
from .faults import Fault, Findings
from .instructions import Site
from .threads import Threads

SHIFT = 40  # of a storage's number in an address of global memory
_TRACKED = 1 << 26  # bytes of the largest storage in which races are looked for


class View:
    """The bytes of a tensor within its storage: `offset`s in bytes from the storage's start."""

    def __init__(
        self, start: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int
    ) -> None:
        dims = [(n, s * itemsize) for n, s in zip(shape, strides, strict=True) if n != 1 and s]
        dims.sort(key=lambda pair: -pair[1])
        self.empty = any(n == 0 for n in shape)
        self.start, self.width = start, itemsize
        # What is contiguous from the right is one row.
        while dims and dims[-1][1] == self.width:
            self.width *= dims.pop()[0]
        self.dims = dims
        self.label = f"shape {tuple(shape)} strides {tuple(strides)} itemsize {itemsize}"

    def holds(self, offset: Array, size: int) -> Array:
        """Whether each access of `size` bytes lies in one row of the tensor."""
        rest = offset - self.start
        good = rest >= 0
        if self.empty:
            return np.zeros_like(good)
        for count, stride in self.dims:
            place = rest // stride
            good &= place < count
            rest = rest - place * stride
        return good & (rest + size <= self.width)


class Storage:
    """A tensor's memory under an address of this machine's own."""

    def __init__(self, pointer: int, nbytes: int, number: int) -> None:
        self.base = (number << SHIFT) + (pointer & 0xFFF)
        self.nbytes = nbytes
        low, high = pointer & ~0xF, (pointer + nbytes + 15) & ~0xF
        self.shift = pointer - low
        raw = np.ctypeslib.as_array((ctypes.c_ubyte * (high - low)).from_address(low))
        self.views = {size: raw.view(kind) for size, kind in UNSIGNED.items()}
        self.allowed: list[View] = []
        self.tracked = 0 < nbytes <= _TRACKED
        if self.tracked:
            # Of two bytes each: who was last, as a program's number and its epoch, and its warps.
            places = nbytes // 2 + 16
            self.write_key = np.full(places, -1, I8)
            self.read_key = np.full(places, -1, I8)
            self.write_mask = np.zeros(places, U4)
            self.read_mask = np.zeros(places, U4)
            self.shared_read = np.zeros(places, bool)


class Storages:
    """The tensors of one launch, by address."""

    def __init__(self) -> None:
        self.by_number: dict[int, Storage] = {}
        self._by_pointer: dict[int, Storage] = {}

    def add(self, tensor: Any) -> int:
        """The address of a tensor's first element; 0 for an empty one, as on a GPU."""
        if not tensor.numel():
            return 0
        storage = tensor.untyped_storage()
        pointer, nbytes = storage.data_ptr(), storage.nbytes()
        found = self._by_pointer.get(pointer)
        if found is None:
            number = len(self.by_number) + 1
            found = Storage(pointer, nbytes, number)
            self._by_pointer[pointer] = self.by_number[number] = found
        start = tensor.data_ptr() - pointer
        found.allowed.append(
            View(start, tuple(tensor.shape), tensor.stride(), tensor.element_size())
        )
        return found.base + start


class Tensors:
    """Global memory, as some programs see it."""

    def __init__(
        self, threads: Threads, storages: Storages, findings: Findings, races: bool
    ) -> None:
        self.threads, self.storages, self.findings, self.races = threads, storages, findings, races

    def load(self, site: Site, mask: Array | None, addresses: Array) -> Array:
        """(count, lanes) of unsigned numbers; 0 where a lane does not load."""
        return self.read(site, mask, addresses, site.size, site.count)

    def read(
        self, site: Site, mask: Array | None, addresses: Array, size: int, count: int
    ) -> Array:
        chosen = None if mask is None else np.nonzero(mask)[0]
        out = np.zeros((count, self.threads.lanes), UNSIGNED[size])
        if chosen is not None:
            if not len(chosen):
                return out
            addresses = addresses[chosen]
        for storage, lanes, offset in self._regions(site, addresses, size * count):
            own = chosen if lanes is None else (lanes if chosen is None else chosen[lanes])
            self._track(site, storage, offset, size * count, own, write=False)
            found = storage.views[size][_places((offset + storage.shift) // size, count)].T
            if own is None:
                return np.ascontiguousarray(found)
            out[:, own] = found
        return out

    def rows(self, site: Site, lane: int, addresses: Array, nbytes: int) -> Array:
        """(addresses, bytes) that a lane's bulk copy reads from each of the addresses on."""
        size = 8 if nbytes % 8 == 0 and not (addresses % 8).any() else 2
        count = nbytes // size
        whole = _places(addresses, 1) + size * np.arange(count)
        out = np.zeros(whole.size, UNSIGNED[size])
        for storage, some, offset in self._regions(site, whole.ravel().astype(U8), size):
            self._track(site, storage, offset, size, np.full(len(offset), lane), write=False)
            out[slice(None) if some is None else some] = storage.views[size][
                (offset + storage.shift) // size
            ]
        return out.view(U1).reshape(len(addresses), nbytes)

    def store(self, site: Site, mask: Array | None, addresses: Array, values: list[Array]) -> None:
        chosen = None if mask is None else np.nonzero(mask)[0]
        size, count = site.size, len(values)
        if chosen is not None:
            if not len(chosen):
                return
            addresses, values = addresses[chosen], [value[chosen] for value in values]
        new = np.stack(values, 1)
        for storage, lanes, offset in self._regions(site, addresses, size * count):
            own = chosen if lanes is None else (lanes if chosen is None else chosen[lanes])
            index = _places((offset + storage.shift) // size, count)
            part = new if lanes is None else new[lanes]
            self._track(site, storage, offset, size * count, own, write=True)
            storage.views[size][index] = part
            if (storage.views[size][index] != part).any():
                raise Fault(f"lanes write different values to one global address: {site}")

    def _regions(
        self, site: Site, addresses: Array, size: int
    ) -> Iterator[tuple[Storage, Array | None, Array]]:
        """(storage, lanes of `addresses` or None for all, byte offsets), checked."""
        if (addresses & U8(size - 1)).any():
            bad = addresses[(addresses & U8(size - 1)) != 0][0]
            raise Fault(f"misaligned global access of {size} bytes at {int(bad):#x}: {site}")
        numbers = (addresses >> U8(SHIFT)).astype(I8)
        first = int(numbers[0])
        alone = bool((numbers == first).all())
        for number in [first] if alone else np.unique(numbers).tolist():
            lanes = None if alone else np.nonzero(numbers == number)[0]
            part = addresses if lanes is None else addresses[lanes]
            storage = self.storages.by_number.get(number)
            if storage is None:
                raise Fault(
                    f"out of bounds: {size} bytes at {int(part[0]):#x}, which is no tensor: {site}"
                )
            offset = part.astype(I8) - storage.base
            good = np.zeros(len(part), bool)
            for view in storage.allowed:
                good |= view.holds(offset, size)
                if good.all():
                    break
            else:
                bad = int(np.nonzero(~good)[0][0])
                views = "; ".join(f"from {v.start}: {v.label}" for v in storage.allowed)
                raise Fault(
                    f"out of bounds: {size} bytes at offset {offset[bad]} of storage of"
                    f" {storage.nbytes} bytes ({views}); {int((~good).sum())} lanes: {site}"
                )
            yield storage, lanes, offset

    def _track(
        self,
        site: Site,
        storage: Storage,
        offset: Array,
        size: int,
        lanes: Array | None,
        write: bool,
    ) -> None:
        """Who touches what, by two bytes: neighbours of one byte look like one place."""
        if not self.races or not storage.tracked:
            return
        threads, race = self.threads, self.findings.races.add
        place = _places(offset // 2, max(1, size // 2))
        program = threads.program if lanes is None else threads.program[lanes]
        warp = threads.warp if lanes is None else threads.warp[lanes]
        number = threads.number[program].astype(I8)
        key = ((number << 24) | threads.epoch[program])[:, None]
        bits = (U4(1) << warp.astype(U4))[:, None]
        wrote, read = storage.write_key[place], storage.read_key[place]
        if ((wrote >= 0) & (wrote >> 24 != key >> 24)).any():
            verb = "writes" if write else "reads"
            race(f"a program {verb} what another program of the launch wrote: {site}")
        if ((wrote == key) & ((storage.write_mask[place] & ~bits) != 0)).any():
            race(f"global bytes another warp has written, no barrier: {site}")
        foreign = (read >= 0) & (read >> 24 != key >> 24)
        if write:
            if (storage.shared_read[place] | foreign).any():
                race(f"a program writes what another program reads: {site}")
            if ((read == key) & ((storage.read_mask[place] & ~bits) != 0)).any():
                race(f"global bytes another warp may still read: {site}")
            mask, keys, before = storage.write_mask, storage.write_key, wrote
        else:
            storage.shared_read[place] |= foreign
            mask, keys, before = storage.read_mask, storage.read_key, read
        mask[place] = np.where(before == key, mask[place], U4(0))
        np.bitwise_or.at(mask, place, np.broadcast_to(bits, place.shape))
        keys[place] = np.broadcast_to(key, place.shape)
        # Of several programs in this very instruction, one is noted.
        several = keys[place] != key
        if several.any():
            if write:
                race(f"a program writes what another program of the launch wrote: {site}")
            else:
                storage.shared_read[place[several]] = True


class Watcher(Protocol):
    """Is told of accesses of `size` (<= 16) bytes to shared memory, by threads of `warp`."""

    def read(self, site: object, place: Array, size: int, warp: Array) -> None: ...

    def write(self, site: object, place: Array, size: int, warp: Array) -> None: ...


class SharedMemory:
    """Shared memory of some programs, behind each other; it starts as NaN.

    Attributes:
        stride: bytes from a program to the next.
        views: of all bytes, by size of the unit.
        watcher: the async proxy, of programs that use it.
    """

    watcher: Watcher | None = None

    def __init__(self, threads: Threads, size: int, findings: Findings, races: bool) -> None:
        self.threads, self.size, self.findings, self.races = threads, size, findings, races
        self.stride = (size + 15) // 16 * 16
        total = max(16, self.stride * threads.programs)
        self.views = _views(np.full(total, 0xFF, U1))
        self._base = threads.program.astype(I8) * self.stride
        # A byte for each byte: whether it was written; whether a copy to it is under way; and, a
        # plane for eight warps, which of them have read and written it since the last barrier.
        self._written = _views(np.zeros(total, U1))
        self._pending = _views(np.zeros(total, U1))
        planes = range((threads.warps + 7) // 8)
        self._readers = [_views(np.zeros(total, U1)) for _ in planes]
        self._writers = [_views(np.zeros(total, U1)) for _ in planes]
        self._flags = {unit: [self._flag(plane, unit) for plane in planes] for unit in UNSIGNED}

    def load(self, site: Site, mask: Array | None, addresses: Array) -> Array:
        """(count, lanes) of unsigned numbers; 0 where a lane does not load."""
        if mask is None:
            found = self.read(site, addresses, site.size, site.count, None)
            return np.ascontiguousarray(found.T)
        lanes = np.nonzero(mask)[0]
        out = np.zeros((site.count, self.threads.lanes), UNSIGNED[site.size])
        if len(lanes):
            out[:, lanes] = self.read(site, addresses[lanes], site.size, site.count, lanes).T
        return out

    def read(
        self, site: Site, addresses: Array, size: int, count: int, lanes: Array | None
    ) -> Array:
        """(addresses, count) of numbers of `size` bytes, checked; `lanes`: of each address."""
        place = self.locate(site, addresses, size * count, lanes)
        self.mark_read(site, place, size * count, lanes)
        found: Array = self.views[size][_places(place // size, count)]
        return found

    def store(self, site: Site, mask: Array | None, addresses: Array, values: list[Array]) -> None:
        lanes = None if mask is None else np.nonzero(mask)[0]
        if lanes is not None:
            if not len(lanes):
                return
            addresses, values = addresses[lanes], [value[lanes] for value in values]
        self.write(site, addresses, np.stack(values, 1), lanes)

    def write(self, site: Site, addresses: Array, new: Array, lanes: Array | None) -> None:
        """`new`: (addresses, count) of unsigned numbers; `lanes` are those of addresses."""
        size, count = new.dtype.itemsize, new.shape[1]
        place = self.locate(site, addresses, size * count, lanes)
        index, view = _places(place // size, count), self.views[size]
        before = view[index]
        view[index] = new
        # Of several lanes on one byte one wins, which is right where they agree.
        if (view[index] != new).any():
            raise Fault(f"lanes write different values to one shared address: {site}")
        self.mark_written(site, place, size * count, lanes, (before == new).all(1))

    def locate(self, site: Site, addresses: Array, size: int, lanes: Array | None) -> Array:
        """Places of accesses of `size` bytes in the views, checked."""
        address = addresses.astype(I8)
        if (address & (size - 1)).any():
            bad = address[(address & (size - 1)) != 0][0]
            raise Fault(f"misaligned shared access of {size} bytes at {bad}: {site}")
        outside = (address + size > self.size) | (address < 0)
        if outside.any():
            bad = address[outside][0]
            raise Fault(f"out of bounds: {size} shared bytes at {bad} of {self.size}: {site}")
        base = self._base if lanes is None else self._base[lanes]
        return address + base

    def pass_barrier(self, programs: Array | slice) -> None:
        """What these programs did before is ordered before what they do next."""
        if self.stride:
            for flags in (*self._readers, *self._writers):
                used = flags[1][: self.threads.programs * self.stride]
                used.reshape(-1, self.stride)[programs] = 0

    # -- copies under way

    def begin_copy(self, site: Site, place: Array, size: int, lanes: Array | None) -> None:
        """Bytes that nobody may touch until the copy has landed."""
        if self.watcher:
            self.watcher.write(site, place, size, self._warp(lanes))
        self.check_unused(site, place, size, lanes)
        view, index = _wide(self._pending, place, size)
        view[index] = np.iinfo(view.dtype).max

    def check_unused(self, site: Site, place: Array, size: int, lanes: Array | None) -> None:
        """No other warp has used what a copy will write, since the last barrier."""
        view, index = _wide(self._pending, place, size)
        if view[index].any():
            raise Fault(f"two copies under way to the same shared bytes: {site}")
        if self.races:
            for plane, bits in enumerate(self._bits(lanes, size)):
                for flags in (self._readers[plane], self._writers[plane]):
                    used, index = _wide(flags, place, size)
                    if (used[index] & ~bits).any():
                        self.findings.races.add(f"a copy to bytes another warp uses: {site}")

    def fill(self, place: Array, data: Array) -> None:
        """A bulk copy lands: (places, 16) bytes."""
        index = _places(place // 8, 2)
        self.views[8][index] = np.ascontiguousarray(data).view(U8)
        self._written[8][index] = np.iinfo(U8).max

    def end_copy(
        self, site: Site, place: Array, size: int, data: Array, lanes: Array | None
    ) -> None:
        """A copy lands: `data` is (places, size) bytes."""
        view, index = _wide(self._pending, place, size)
        view[index] = 0
        target, index = _wide(self.views, place, size)
        target[index] = np.ascontiguousarray(data).view(target.dtype).reshape(index.shape)
        self.mark_written(site, place, size, lanes)

    # -- who touches what

    def _flag(self, plane: int, unit: int) -> Array:
        """Of each lane: its warp's bit in every byte of a unit; 0 in other planes."""
        kind, warp = UNSIGNED[unit], self.threads.warp
        mine = np.where(warp // 8 == plane, 1 << (warp % 8), 0).astype(kind)
        return (mine * kind(int("01" * unit, 16)))[:, None]

    def _bits(self, lanes: Array | None, size: int) -> list[Array]:
        flags = self._flags[min(size, 8)]
        return flags if lanes is None else [flag[lanes] for flag in flags]

    def _warp(self, lanes: Array | None) -> Array:
        return self.threads.warp if lanes is None else self.threads.warp[lanes]

    def mark_read(self, site: Site, place: Array, size: int, lanes: Array | None) -> None:
        """Accesses at places, checked already for their bounds."""
        if self.watcher:
            self.watcher.read(site, place, size, self._warp(lanes))
        view, index = _wide(self._pending, place, size)
        if view[index].any():
            raise Fault(f"shared bytes read while a copy to them is under way: {site}")
        view, _ = _wide(self._written, place, size)
        if (view[index] != np.iinfo(view.dtype).max).any():
            # Poison, then: harmless where nothing comes of it.
            self.findings.unwritten.add(str(site))
        if not self.races:
            return
        for plane, bits in enumerate(self._bits(lanes, size)):
            view, _ = _wide(self._writers[plane], place, size)
            if (view[index] & ~bits).any():
                race = f"shared bytes that another warp has just written: {site}"
                self.findings.races.add(race)
            view, _ = _wide(self._readers[plane], place, size)
            np.bitwise_or.at(view, index, np.broadcast_to(bits, index.shape))

    def mark_written(
        self,
        site: Site,
        place: Array,
        size: int,
        lanes: Array | None,
        same: Array | None = None,
    ) -> None:
        """`same`: whether each access left what was there."""
        if self.watcher:
            self.watcher.write(site, place, size, self._warp(lanes))
        view, index = _wide(self._pending, place, size)
        if view[index].any():
            raise Fault(f"shared bytes written while a copy to them is under way: {site}")
        view, _ = _wide(self._written, place, size)
        view[index] = np.iinfo(view.dtype).max
        if not self.races:
            return
        for plane, bits in enumerate(self._bits(lanes, size)):
            view, _ = _wide(self._readers[plane], place, size)
            if (view[index] & ~bits).any():
                self.findings.races.add(f"shared bytes that another warp may still read: {site}")
            view, _ = _wide(self._writers[plane], place, size)
            clash = (view[index] & ~bits) != 0
            if clash.any() and (same is None or not same[clash.any(1)].all()):
                self.findings.races.add(f"shared bytes that another warp writes too: {site}")
            np.bitwise_or.at(view, index, np.broadcast_to(bits, index.shape))


def _views(raw: Array) -> dict[int, Array]:
    return {size: raw.view(kind) for size, kind in UNSIGNED.items()}


def _places(first: Array, count: int) -> Array:
    """(accesses, count): units behind each other."""
    return first[:, None] + np.arange(count)


def _wide(views: dict[int, Array], place: Array, size: int) -> tuple[Array, Array]:
    """A view for accesses of `size` bytes, and their (accesses, units) places in it."""
    unit = min(size, 8)
    return views[unit], _places(place // unit, size // unit)
