"""Copies that go on while the program does: `cp.async` and its groups.

A copy lands as late as the program allows: at the wait that says it must have. Its source is read
when it starts and once more when it lands, since a GPU may read it at any time between.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arithmetic import I8, U1, Array
from .faults import Fault
from .instructions import Site
from .memory import SharedMemory, Tensors
from .threads import Threads


@dataclass
class _Copy:
    """Of one instruction: what its lanes have not waited for yet."""

    site: Site
    lanes: Array
    place: Array
    source: Array  # addresses
    real: Array  # lanes that copy; the others fill with zeros
    data: Array  # (lanes, size) bytes
    group: Array

    def of(self, some: Array) -> _Copy:
        """What some of the lanes have started."""
        own = (self.lanes, self.place, self.source, self.real, self.data, self.group)
        return _Copy(self.site, *(each[some] for each in own))


class Copies:
    """`cp.async` of some programs.

    Attributes:
        copied: bytes, so far.
    """

    def __init__(self, threads: Threads, shared: SharedMemory, tensors: Tensors) -> None:
        self.threads, self.shared, self.tensors = threads, shared, tensors
        self.copied = 0
        self._groups = np.zeros(threads.lanes, I8)
        self._pending: list[_Copy] = []

    def start(
        self,
        site: Site,
        mask: Array | None,
        target: Array,
        source: Array,
        size: int,
        filled: Array | None,
    ) -> None:
        """`size` bytes a lane, all of them from memory or, where `filled` is 0, all zeros."""
        lanes = np.arange(self.threads.lanes) if mask is None else np.nonzero(mask)[0]
        if not len(lanes):
            return
        if size not in (4, 8, 16) or ("cg" in site.modifiers and size != 16):
            raise Fault(f"cp.async of {size} bytes: {site}")
        place = self.shared.locate(site, target[lanes], size, lanes)
        real = np.ones(len(lanes), bool) if filled is None else filled[lanes] == size
        if filled is not None and (filled[lanes][~real] != 0).any():
            raise NotImplementedError(f"cp.async of a part: {site}")
        data = self._read(site, lanes, source[lanes], real, size)
        self.shared.begin_copy(site, place, size, lanes)
        groups = self._groups[lanes]
        self._pending.append(_Copy(site, lanes, place, source[lanes], real, data, groups))
        self.copied += len(lanes) * size

    def commit(self, site: Site, mask: Array | None) -> None:
        """What each lane has started is a group."""
        self._groups += 1 if mask is None else mask

    def wait(self, site: Site, mask: Array | None, newest: int) -> None:
        """All groups but the `newest` land now."""
        still = []
        for copy in self._pending:
            done = copy.group < self._groups[copy.lanes] - newest
            if mask is not None:
                done &= mask[copy.lanes]
            if done.any():
                self._land(copy.of(done))
                copy = copy.of(~done)
            if len(copy.lanes):
                still.append(copy)
        self._pending = still

    def wait_for_all(self, site: Site, mask: Array | None) -> None:
        self.commit(site, mask)
        self.wait(site, mask, 0)

    def _land(self, copy: _Copy) -> None:
        site, size = copy.site, copy.data.shape[1]
        if (self._read(site, copy.lanes, copy.source, copy.real, size) != copy.data).any():
            raise Fault(f"global bytes written while a copy of them is under way: {site}")
        self.shared.end_copy(site, copy.place, size, copy.data, copy.lanes)

    def _read(self, site: Site, lanes: Array, source: Array, real: Array, size: int) -> Array:
        """(lanes, size) bytes, zeros where a lane is not `real`."""
        data = np.zeros((len(lanes), size), U1)
        if real.any():
            unit = min(size, 8)
            whole = np.zeros(self.threads.lanes, bool)
            whole[lanes[real]] = True
            addresses = np.zeros(self.threads.lanes, source.dtype)
            addresses[lanes] = source
            found = self.tensors.read(site, whole, addresses, unit, size // unit)[:, lanes[real]]
            data[real] = np.ascontiguousarray(found.T).view(U1).reshape(-1, size)
        return data

    def end(self, name: str) -> None:
        """All threads have ended."""
        if self._pending:
            late = sum(len(copy.lanes) for copy in self._pending)
            raise Fault(f"{name}: ended with {late} copies under way")
