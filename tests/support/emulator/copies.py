"""Copies that go on while the program does: `cp.async` and its groups.

A copy lands as late as the program allows: at the wait that says it must have. Its source is read
at once, which no program that is free of races can tell. A race of that kind, a source that is
written between a copy and its wait, is not noticed.
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
    data: Array  # (lanes, size) bytes
    group: Array


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
        data = np.zeros((len(lanes), size), U1)
        real = np.ones(len(lanes), bool) if filled is None else filled[lanes] == size
        if filled is not None and (filled[lanes][~real] != 0).any():
            raise NotImplementedError(f"cp.async of a part: {site}")
        if real.any():
            unit = min(size, 8)
            whole = np.zeros(self.threads.lanes, bool)
            whole[lanes[real]] = True
            found = self.tensors.read(site, whole, source, unit, size // unit)[:, lanes[real]]
            data[real] = np.ascontiguousarray(found.T).view(U1).reshape(-1, size)
        self.shared.begin_copy(site, place, size, lanes)
        self._pending.append(_Copy(site, lanes, place, data, self._groups[lanes]))
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
                self.shared.end_copy(
                    copy.site,
                    copy.place[done],
                    copy.data.shape[1],
                    copy.data[done],
                    copy.lanes[done],
                )
                rest = ~done
                copy = _Copy(
                    copy.site,
                    copy.lanes[rest],
                    copy.place[rest],
                    copy.data[rest],
                    copy.group[rest],
                )
            if len(copy.lanes):
                still.append(copy)
        self._pending = still

    def wait_for_all(self, site: Site, mask: Array | None) -> None:
        self.commit(site, mask)
        self.wait(site, mask, 0)

    def end(self, name: str) -> None:
        """All threads have ended."""
        if self._pending:
            late = sum(len(copy.lanes) for copy in self._pending)
            raise Fault(f"{name}: ended with {late} copies under way")
