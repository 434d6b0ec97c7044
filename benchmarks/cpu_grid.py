"""The CPU's part of the grid: labelled shares with head training and frozen, and every peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.grid import Point, Run
from benchmarks.peers import CANDIDATES, OTHER_LOSSES
from benchmarks.results import Results
from benchmarks.shapes import LAPTOP

# A quarter of a laptop batch, so that each file takes less than three minutes.
QUARTER = replace(LAPTOP, name="quarter laptop", sequences=2)
SHARES = (0.25, 0.5, 1.0)
OF_SHARES = ("ours: stash", "ours: local", "ours: recompute", "TRL: frozen head", "TRL", "eager")
OF_PEERS = (
    "ours: local",
    "ours: recompute",
    "Liger",
    "Liger: per token",
    "cut-cross-entropy",
    "cut-cross-entropy: full gradient",
    "torch linear_cross_entropy",
    "eager, compiled",
    "eager, fp32 logits",
    "eager",
    *OTHER_LOSSES,
)


def cpu_points() -> dict[str, list[Point]]:
    """File → its points."""
    shares = tuple(CANDIDATES[name] for name in OF_SHARES)
    peers = tuple(CANDIDATES[name] for name in OF_PEERS)
    return {
        "shares": [Point(replace(QUARTER, labelled=share), "fp32", shares) for share in SHARES],
        "peers": [Point(QUARTER, "fp32", peers)],
    }


def run_cpu_grid(folder: Path, count: int, say: Callable[[str], None]) -> None:
    """Measure both files."""
    for name, points in cpu_points().items():
        results = Results(folder / f"{name}.json", "grid")
        Run(results, count=count, seconds=160.0, seconds_of_rounds=12.0, say=say).measure(points)
