"""All that a GPU tells before a deadline, telling rows first: our paths and TRL's on three heads,
whole trainer steps, the other peers, the longest contexts, and other shares, rows and dtypes.

Each row is measured in a process of its own (`workers`) and is on disk before the next begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.context_search import run_contexts
from benchmarks.gpu_candidates import DEFAULTS, ENGINES, OF_TRL, SOME, TRAINS, forced
from benchmarks.grid import Point, measure_alone, memory_here, row_of
from benchmarks.peers import CANDIDATES, Candidate
from benchmarks.results import Results
from benchmarks.shapes import HEADS, Shape
from benchmarks.trainer_candidates import EAGER, TRAINERS
from benchmarks.trainer_setups import ON_GPU
from benchmarks.trainer_steps import measure_beside_eager
from benchmarks.trainer_steps import row_of as trainer_row
from benchmarks.workers import Unit, run_units

DEVICE = "cuda"
# What is under way then is ended: the whole run takes less than eight minutes.
DEADLINE = 450.0
# Of the deadline, at which each stage ends: the telling grid, trainers, peers, contexts, others.
_SHARES = (0.55, 0.72, 0.86, 0.93, 1.0)
_SECONDS_OF_TRAINER = 90.0


def _named(*names: str) -> tuple[Candidate, ...]:
    return tuple(CANDIDATES[name] for name in names)


TELLING = (
    # The trained head first.
    *(each[trains] for trains in reversed(DEFAULTS) for each in (DEFAULTS, OF_TRL)),
    *(forced(path, engine) for path in TRAINS for engine in ENGINES),
    SOME,
)
# The engine that stands in for the others on a GPU comes last.
_PEERS = (
    *_named("Liger", "cut-cross-entropy", "Liger: per token", "cut-cross-entropy: full gradient"),
    *_named("torch linear_cross_entropy", "eager, labelled rows", "eager, compiled", "eager"),
    *_named("eager, fp32 logits"),
    *(forced(path, "torch") for path in TRAINS),
)
_FEW = (*TELLING, *_named("Liger", "cut-cross-entropy"))
_OTHER_LOSSES = _named("Liger: simpo", "Liger: orpo", "Liger: cpo", "Liger: kto")


def telling(heads: dict[str, Shape] | None = None) -> list[Point]:
    """Ours and TRL's on every head.

    Args:
        heads: those of `HEADS` or stand-ins for them, in their order.
    """
    return [Point(shape, "bf16", TELLING) for shape in (heads or HEADS).values()]


def peers(heads: dict[str, Shape] | None = None) -> list[Point]:
    """The other peers on every head; as `telling`."""
    return [Point(shape, "bf16", _PEERS) for shape in (heads or HEADS).values()]


def others(heads: dict[str, Shape] | None = None) -> list[Point]:
    """Other labelled shares, rows, losses and dtypes; as `telling`."""
    llama, gemma, _ = (heads or HEADS).values()
    found = [Point(replace(llama, labelled=share), "bf16", _FEW) for share in (0.25, 1.0)]
    found += [
        Point(replace(llama, sequences=sequences), "bf16", _FEW)
        for sequences in (max(2, llama.sequences // 4), 4 * llama.sequences)
    ]
    found.append(Point(llama, "bf16", _OTHER_LOSSES))
    found += [Point(replace(gemma, labelled=share), "bf16", _FEW) for share in (0.25, 1.0)]
    found.append(Point(replace(llama, sequences=2), "fp32", _FEW))
    return found


def units_of(points: Sequence[Point]) -> list[Unit]:
    """A unit for each candidate, the first candidates of all points first."""
    longest = max(len(point.candidates) for point in points)
    return [
        _unit(point, point.candidates[place])
        for place in range(longest)
        for point in points
        if place < len(point.candidates)
    ]


def _unit(point: Point, candidate: Candidate) -> Unit:
    given = (candidate, point.shape, point.dtype)
    modules = ("trl.kernels", "trl.trainer.utils") if candidate.name.startswith("TRL") else ()
    measure = partial(measure_alone, *given, DEVICE, memory_here)
    return Unit("grid", row_of(*given), measure, modules=modules)


def trainer_units() -> list[Unit]:
    """A unit for each trainer and setup; the eager one, beside which all are timed, comes last."""
    names = sorted(TRAINERS, key=lambda name: name == EAGER)
    return [
        Unit(
            "trainer",
            trainer_row(name, setup),
            partial(measure_beside_eager, name, setup, DEVICE),
            _SECONDS_OF_TRAINER,
            ("transformers.trainer", "trl"),
        )
        for setup in ON_GPU
        for name in names
    ]


def run_gpu(
    folder: Path, deadline: float, say: Callable[[str], None], *, again: bool = False
) -> int:
    """Measure on the first GPU; returns the exit status, 1 without a GPU.

    Args:
        folder: gets grid.json, trainer.json and context.json. Rows that are right there, from the
            same commit, code, machine and libraries, are not measured again.
        deadline: in seconds; each stage ends at its share of it.
        say: gets a line of progress for each row.
        again: measure everything anew.
    """
    if DEVICE == "cuda" and not torch.cuda.is_available():
        say("there is no GPU to measure on")
        return 1
    start = time.monotonic()

    def tell(text: str) -> None:
        say(f"[{time.monotonic() - start:4.0f} s] {text}")

    opened = Results if again else Results.resumed
    files = {name: opened(folder / f"{name}.json", name) for name in ("grid", "trainer", "context")}
    kept = sum(results.done(row) for results in files.values() for row in results.rows)
    if kept:
        tell(f"{kept} rows on disk are of this commit and machine; --again measures them anew")

    def work(units: list[Unit], end: float) -> None:
        run_units(units, files, end, tell)

    def contexts(end: float) -> None:
        run_contexts(files["context"], max(0.0, end - time.monotonic()), tell)

    stages: tuple[Callable[[float], None], ...] = (
        partial(work, units_of(telling())),
        partial(work, trainer_units()),
        partial(work, units_of(peers())),
        contexts,
        partial(work, [unit for point in others() for unit in units_of([point])]),
    )
    for stage, share in zip(stages, _SHARES, strict=True):
        stage(start + share * deadline)
    return 0
