"""The CPU's part of the grid: labelled shares, rows and dtypes, each with a head that trains and a
frozen one, and every peer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.grid import Point, Run, memory_here
from benchmarks.memory import Memory
from benchmarks.peers import CANDIDATES, IN_GRID, OTHER_LOSSES, Candidate, ours_with_room
from benchmarks.results import Results
from benchmarks.shapes import DTYPES, LAPTOP, Problem, Shape

# Nothing is begun after these: what is under way by then ends before ten minutes.
DEADLINE = 540.0
# A quarter of a laptop batch.
QUARTER = replace(LAPTOP, name="quarter laptop", sequences=2)
SHARES = (0.25, 0.5, 1.0)
OF_SHARES = ("ours: stash", "ours: local", "ours: recompute", "TRL: frozen head", "TRL", "eager")
# Labelled rows 2048 and 8192.
ROWS = tuple(Shape("rows", sequences, 512, 256, 16_000) for sequences in (8, 32))


def not_measured(candidate: Candidate, problem: Problem, dtype: str) -> Memory:
    """In the place of a memory that the sweep and the shares show already."""
    return Memory(None, None, "not measured")


def cpu_points() -> dict[str, list[Point]]:
    """File → its points, the most telling first."""
    shares = tuple(CANDIDATES[name] for name in OF_SHARES)
    roomy = replace(CANDIDATES["ours: local"], forward=partial(ours_with_room, "local", "auto"))
    rows = tuple(roomy if c.name == roomy.name else c for c in shares)
    both = ("ours: local", "ours: recompute", "Liger", "cut-cross-entropy", "eager")
    single = tuple(CANDIDATES[name] for name in (*both, *IN_GRID, *OTHER_LOSSES))
    narrow = tuple(CANDIDATES[name] for name in (*both, *IN_GRID))
    return {
        "shares": [Point(replace(QUARTER, labelled=share), "fp32", shares) for share in SHARES],
        "rows": [Point(shape, dtype, rows) for shape in ROWS for dtype in DTYPES],
        "peers": [Point(QUARTER, "fp32", single), Point(QUARTER, "bf16", narrow)],
    }


def run_cpu_grid(
    folder: Path,
    count: int,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Measure every file, in less than ten minutes on two cores."""
    end = clock() + DEADLINE
    for name, points in cpu_points().items():
        run = partial(Run, Results(folder / f"{name}.json", "grid"), count=count, say=say)
        memory = not_measured if name == "rows" else memory_here
        seconds = max(0.0, end - clock())
        run(seconds=seconds, seconds_of_rounds=10.0, memory=memory, clock=clock).measure(points)
