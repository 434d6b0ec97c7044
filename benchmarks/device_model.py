"""The device model: a recording played on a machine, the host beside it on a second timeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from benchmarks.machines import (
    GAP,
    LIBRARY,
    LIBRARY_CALL,
    LIBRARY_TILES,
    SINGLE,
    TRITON_LAUNCH,
    UNHIDDEN,
    Machine,
)
from benchmarks.recording import Event


@dataclass(frozen=True)
class Played:
    """A recording on a machine.

    Attributes:
        seconds: from the first call of the host to the end of the last kernel.
        exposed: of them, the GPU has waited for the host, gaps between launches not counted.
        launches: calls that the GPU ran.
        moved: bytes read and written.
    """

    seconds: float
    exposed: float
    launches: int
    moved: int


def waves(tiles: int, processors: int) -> int:
    """How often a GPU is filled by as many tiles."""
    return ceil(tiles / processors)


def matmul_seconds(machine: Machine, event: Event) -> float:
    """Of a matmul's arithmetic, in whole waves of its tiles.

    Raises:
        ValueError: a fused kernel's tile that no rate is assumed for.
    """
    assert event.size is not None
    m, n, k = event.size
    peak = machine.peak * (1.0 if event.itemsize == 2 else SINGLE)

    def seconds(rows: int, columns: int, share: float) -> float:
        full = waves(ceil(m / rows) * ceil(n / columns), machine.processors)
        return 2 * full * machine.processors * rows * columns * k / (share * peak)

    if event.tile is None:
        return min(seconds(rows, cols, LIBRARY * part) for rows, cols, part in LIBRARY_TILES)
    area = event.tile[0] * event.tile[1]
    if area not in machine.fused:
        raise ValueError(f"{event.name}: got a tile {event.tile}, no rate is assumed for it")
    return seconds(*event.tile, machine.fused[area])


def event_seconds(machine: Machine, events: Sequence[Event], place: int) -> float:
    """Of one event, with what its neighbours leave or find in the cache."""
    event = events[place]
    before = {key for key, _ in events[place - 1].writes} if place else set()
    after = {key for key, _ in events[place + 1].reads} if place + 1 < len(events) else set()

    def cost(parts: Sequence[tuple[int, int]], near: set[int]) -> float:
        halves = (0.5 if key in near and size <= machine.cached else 1.0 for key, size in parts)
        return sum(half * size for half, (_, size) in zip(halves, parts, strict=True))

    reads, writes = cost(event.reads, before), cost(event.writes, after)
    if event.size is None:
        return (reads + writes) / machine.bandwidth
    output = UNHIDDEN * writes * (2 if event.accumulates else 1)
    return max(matmul_seconds(machine, event), reads / machine.bandwidth) + (
        output / machine.bandwidth
    )


def play(
    machine: Machine, events: Sequence[Event], python: Sequence[float] | None = None
) -> Played:
    """Play events in their order.

    Args:
        machine: where.
        events: of a recording.
        python: seconds of the host's own code before each event, or None for a host that costs
            nothing.
    """
    host = free = exposed = 0.0
    for place, event in enumerate(events):
        if python is not None:
            host += python[place] + (TRITON_LAUNCH if event.triton else LIBRARY_CALL)
        ready = free + (GAP if place else 0.0)
        exposed += max(0.0, host - ready)
        free = max(host, ready) + event_seconds(machine, events, place)
        if event.waits:
            host = max(host, free)
    moved = sum(size for event in events for _, size in (*event.reads, *event.writes))
    return Played(free, exposed, len(events), moved)
