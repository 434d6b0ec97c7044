"""Programs of a launch, executed: in lock step, or one warp after the other.

Threads that stand at different blocks are kept apart by masks, the lowest block first. Programs,
and warps, may go different ways. The threads of one warp do so in one place of this project's
kernels: the fp64 logarithm of the loss kernels has a side for special values. That is executed too,
but only where nothing on the way to the block where they meet again (the immediate post-dominator)
is executed by a warp as a whole: no shuffle, product, vote or barrier. There, what a lane does
cannot depend on how the hardware orders the sides. Any other branch at which a warp parts is a
fault, and so is every one that the program calls `.uni`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .arithmetic import F4, I4, UNSIGNED, Array
from .async_proxy import AsyncProxy
from .copies import Copies
from .cut_off import CutOff
from .faults import Fault, Findings
from .instructions import Site
from .mbarriers import Barriers, TensorMap
from .memory import SharedMemory, Storages, Tensors
from .ptx import Branch
from .tensor_cores import TensorCores
from .threads import WARP, Threads
from .translation import Code
from .warpgroups import Warpgroups
from .warps import Warps

ORDERS = (None, "up", "down", "random")


@dataclass(frozen=True)
class Options:
    """How programs are executed.

    Attributes:
        order: of the warps between two barriers: None for lock step, "up", "down" or "random".
        cut_off: how tensor cores add; None for exact sums, rounded once.
        approximate: approximations are off by as much as the ISA allows, at random.
        races: look for them.
        seed: of everything that is drawn.
    """

    order: str | None = None
    cut_off: CutOff | None = None
    approximate: bool = False
    races: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order: got {self.order!r}, wanted one of {ORDERS}")


@dataclass(frozen=True)
class Dispatch:
    """What a launch gives to all of its programs."""

    storages: Storages
    values: dict[str, Any]  # parameter → unsigned number
    grid: tuple[int, int, int]
    warps: int
    shared: int
    maps: dict[int, TensorMap] = field(default_factory=dict)  # by address in the parameters
    findings: Findings = field(default_factory=Findings)


class Machine:
    """Some programs of a launch, and what their instructions act on."""

    def __init__(self, code: Code, dispatch: Dispatch, places: Array, options: Options) -> None:
        """`places`: (programs, 3), where each stands in the grid."""
        self.code, self.program, self.options = code, code.program, options
        self.executed = 0
        self._values = dispatch.values
        self._random = np.random.default_rng(options.seed)
        findings, races = dispatch.findings, options.races
        self.threads = Threads(places, dispatch.grid, dispatch.warps)
        self.tensors = Tensors(self.threads, dispatch.storages, findings, races)
        self.shared = SharedMemory(self.threads, dispatch.shared, findings, races)
        self.copies = Copies(self.threads, self.shared, self.tensors)
        self.warps = Warps(self.threads, self.shared)
        self.cores = TensorCores(self.threads, options.cut_off)
        lanes = self.threads.lanes
        poison: dict[int, Array] = {0: np.zeros(lanes, bool)}
        poison |= {n: np.full(lanes, np.iinfo(kind).max, kind) for n, kind in UNSIGNED.items()}
        self.registers = [poison[register.size] for register in self.program.registers]
        self.proxy = AsyncProxy(self.threads, self.shared.stride, findings)
        self.mbarriers = Barriers(
            self.threads, self.proxy, self.shared, self.tensors, findings, dispatch.maps
        )
        self.warpgroups = Warpgroups(
            self.threads, self.shared, self.proxy, self.registers, options.cut_off
        )
        if code.asynchronous:
            self.shared.watcher = self.proxy
        self._constants = code.constants(lanes)
        self._end = len(self.program.blocks)
        # Of each block, and of the end.
        self._waits = np.array([block.waits for block in self.program.blocks] + [True])

    # -- instructions of no part

    def parameter(self, site: Site, mask: Array | None, name: str, offset: int) -> Array:
        """ld.param."""
        value = self._values.get(name)
        if value is None:
            raise Fault(f"no argument was given for {name}: {site}")
        if offset or value.dtype.itemsize != site.size:
            raise NotImplementedError(f"a part of a parameter: {site}")
        return np.full(self.threads.lanes, value)

    def barrier(self, site: Site, mask: Array | None, number: int) -> None:
        """bar.sync of all threads."""
        if number:
            raise NotImplementedError(f"a barrier other than 0: {site}")
        threads = self.threads
        here = np.ones(threads.lanes, bool) if mask is None else mask
        here = here.reshape(threads.programs, -1)
        chosen: Array = np.any(here, axis=1)
        # Those that have ended never come.
        if not here[chosen].all():
            raise Fault(f"barrier that not all threads reach together: {site}")
        threads.epoch[chosen] += 1
        self.shared.pass_barrier(chosen)
        if self.shared.watcher:
            self.proxy.barrier(chosen)

    def blur(self, values: Array, ulps: int) -> Array:
        """An approximation as the ISA allows it; exact where it is 0 or 1."""
        if not self.options.approximate:
            return values
        off = self._random.integers(-ulps, ulps, len(values), endpoint=True).astype(I4)
        moved = (values.view(I4) + off).view(F4)
        plain = np.isfinite(values) & (np.abs(values) > 1e-37) & np.isfinite(moved)
        return np.where(plain & (np.abs(values) != 1), moved, values)

    # -- running

    def run(self) -> None:
        """Until all threads have ended."""
        at = np.zeros(self.threads.lanes, np.int32)
        if self.options.order is None:
            self._in_lock_step(at)
        else:
            self._warp_by_warp(at)
        self.copies.end(self.program.name)
        self.mbarriers.end()
        self.warpgroups.end()

    def _in_lock_step(self, at: Array) -> None:
        together: int | None = 0  # the block of all threads
        while True:
            mask = None
            if together is None:
                ready = self._ready(at)
                if not ready.any():
                    return
                current = int(at[ready].min())
                if self._waits[current]:
                    # Other warps of these programs may come to the barrier from a later block.
                    programs = self.threads.program[ready & (at == current)]
                    late = ready & ~self._waits[at] & np.isin(self.threads.program, programs)
                    current = int(at[late].min()) if late.any() else current
                mask = ready & (at == current)
                mask = None if mask.all() else mask
            elif together >= self._end:
                return
            else:
                current = together
            following = self._step(current, mask)
            together = None
            if mask is not None:
                at = np.where(mask, following, at).astype(np.int32)
            elif not isinstance(following, int):
                at = following
            elif self.mbarriers.spinning.any():
                at = np.full_like(at, following)
            else:
                together = following
            if together is None:
                self.threads.live = at < self._end

    def _ready(self, at: Array) -> Array:
        """Threads that have not ended, nor wait for an mbarrier as things stand."""
        live = at < self._end
        ready = live & ~self.mbarriers.spinning
        if live.any() and not ready.any():
            raise Fault(f"{self.program.name}: {self.mbarriers.stuck()}")
        return ready

    def _warp_by_warp(self, at: Array) -> None:
        """From barrier to barrier one warp after the other, in an order drawn each time."""
        warps = self.threads.warps
        waits = self._waits
        while True:
            order = np.arange(warps)
            if self.options.order == "random":
                order = self._random.permutation(warps)
            elif self.options.order == "down":
                order = order[::-1]
            for warp in order:
                mine = self.threads.warp == warp
                while True:
                    runs = mine & ~waits[at] & ~self.mbarriers.spinning
                    if not runs.any():
                        break
                    current = int(at[runs].min())
                    mask = runs & (at == current)
                    at = np.where(mask, self._step(current, mask), at).astype(np.int32)
                    self.threads.live = at < self._end
            if not self.threads.live.any():
                return
            stands = waits[at]
            if (~stands & ~self.mbarriers.spinning).any():
                continue
            if not stands.all():
                raise Fault(f"{self.program.name}: {self.mbarriers.stuck()}")
            # Every program is at a barrier, or has ended.
            for current in np.unique(at[self.threads.live]).tolist():
                mask = at == current
                at = np.where(mask, self._step(current, mask), at).astype(np.int32)

    def _step(self, current: int, mask: Array | None) -> Any:
        """Run a block; where its threads go next: one place, or one for each lane."""
        block = self.program.blocks[current]
        count = self.threads.lanes if mask is None else int(mask.sum())
        self.executed += len(block.instructions) * count
        try:
            function = self.code.function(current, mask is not None)
            function(self, self.registers, self._constants, mask)
        except Fault as fault:
            raise Fault(f"{self.program.name}: {fault}") from None
        if block.branch is None:
            return current + 1
        return self._branch(block.branch, current, mask)

    def _branch(self, branch: Branch, current: int, mask: Array | None) -> Any:
        if branch.guard is None:
            return branch.target
        taken = self.registers[branch.guard.register.place]
        taken = ~taken if branch.guard.negated else taken
        if mask is None and (taken.all() or not taken.any()):
            return branch.target if taken[0] else current + 1
        # 1: all go; −1: all stay; in between, or 0 for those that are not here: see below.
        sides = np.where(taken, 1, -1)
        sides = (sides if mask is None else np.where(mask, sides, 0)).reshape(-1, WARP)
        parted = (sides.max(1) == 1) & (sides.min(1) == -1)
        if parted.any() and (branch.uniform or not self.code.may_part(current)):
            raise Fault(
                f"{self.program.name}: a branch at which the threads of a warp part: {branch.text}"
            )
        return np.where(taken, branch.target, current + 1).astype(np.int32)


def places_of(grid: tuple[int, int, int], seed: int) -> Array:
    """(programs, 3): every program of a grid, in random order."""
    numbers = np.random.default_rng(seed).permutation(grid[0] * grid[1] * grid[2])
    axes = [numbers % grid[0], numbers // grid[0] % grid[1], numbers // grid[0] // grid[1]]
    return np.stack(axes, 1)
