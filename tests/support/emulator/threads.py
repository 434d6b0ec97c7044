"""The threads of some programs of a launch, one numpy lane each."""

from __future__ import annotations

import numpy as np

from .arithmetic import I8, U4, Array
from .faults import Fault

WARP = 32
AXES = "xyz"
# Registers that the hardware fills; 32 bits each.
SPECIAL = frozenset(
    {"%laneid"}
    | {f"%{kind}.{axis}" for kind in ("tid", "ntid", "ctaid", "nctaid") for axis in AXES}
)


class Threads:
    """Who is who.

    Attributes:
        programs: how many there are here.
        warps: of a program.
        lanes: threads, in all.
        warp: of each lane, within its program.
        lane: of each within its warp.
        program: of each lane, counted here.
        number: of each program, counted over the launch.
        epoch: barriers that each program has passed.
        live: the lanes that have not ended.
        special: the registers that the hardware fills.
    """

    def __init__(self, places: Array, grid: tuple[int, int, int], warps: int) -> None:
        """`places`: (programs, 3), where each stands in the grid."""
        self.programs, self.warps = len(places), warps
        per_program = WARP * warps
        self.lanes = lanes = self.programs * per_program
        thread = np.tile(np.arange(per_program, dtype=U4), self.programs)
        self.warp = (thread // U4(WARP)).astype(I8)
        self.lane = np.arange(lanes) % WARP
        self.first_lane = np.arange(lanes) // WARP * WARP
        self.program = np.repeat(np.arange(self.programs), per_program)
        self.number = places[:, 0] + grid[0] * (places[:, 1] + grid[1] * places[:, 2])
        self.epoch = np.zeros(self.programs, I8)
        self.live = np.ones(lanes, bool)
        self.special = {
            "%tid.x": thread,
            "%tid.y": np.zeros(lanes, U4),
            "%tid.z": np.zeros(lanes, U4),
            "%laneid": thread % U4(WARP),
            "%ntid.x": np.full(lanes, per_program, U4),
            "%ntid.y": np.ones(lanes, U4),
            "%ntid.z": np.ones(lanes, U4),
        }
        for axis, letter in enumerate(AXES):
            self.special[f"%ctaid.{letter}"] = np.repeat(places[:, axis].astype(U4), per_program)
            self.special[f"%nctaid.{letter}"] = np.full(lanes, grid[axis], U4)

    def whole_warps(self, site: object, mask: Array | None) -> Array | None:
        """Which warps execute an instruction that all of their lanes must; None: all warps."""
        if mask is None:
            return None
        here = mask.reshape(-1, WARP)
        some: Array = np.any(here, axis=1)
        if not here[some].all():
            raise Fault(f"warp instruction that some lanes of a warp do not reach: {site}")
        return some
