"""All that a GPU tells before a deadline, telling rows first: a grid of three heads with every path
on every engine beside the peers, whole trainer steps, and the longest contexts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.context_search import run_contexts
from benchmarks.grid import Point, Run
from benchmarks.peers import CANDIDATES, HEAD, HIDDEN, NOTHING, Candidate, ours_with_room
from benchmarks.results import Results
from benchmarks.shapes import HEADS, Shape
from benchmarks.trainer_setups import ON_GPU
from benchmarks.trainer_steps import TrainerRun
from fused_prefopt.ops.engines import ENGINES

DEVICE = "cuda"
DEADLINE = 520.0
_TRAINS = {"evaluate": NOTHING, "stash": HIDDEN, "local": HEAD, "recompute": HEAD}
_PEERS = (
    "TRL",
    "Liger",
    "TRL: frozen head",
    "TRL: no gradient",
    "cut-cross-entropy",
    "cut-cross-entropy: full gradient",
    "Liger: per token",
    "torch linear_cross_entropy",
    "eager, compiled",
    "eager, labelled rows",
    "eager, fp32 logits",
    "eager",
)
_OTHER_LOSSES = ("Liger: simpo", "Liger: orpo", "Liger: cpo", "Liger: kto")
# Points of the grid before the trainers and the contexts.
_TELLING = 2
_FEW_PEERS = ("TRL", "TRL: frozen head", "Liger", "cut-cross-entropy")


def _forced(path: str, engine: str) -> Candidate:
    run = partial(ours_with_room, path, engine)
    return Candidate(f"ours: {path}, {engine}", run, _TRAINS[path], ours=True)


AUTO = replace(CANDIDATES["ours: auto"], name="ours: auto, auto")
FORCED = tuple(_forced(path, engine) for path in _TRAINS for engine in reversed(ENGINES))
# Without the engine that stands in for the others on a GPU.
_QUICK = (AUTO, *(candidate for candidate in FORCED if not candidate.name.endswith("torch")))


def points(heads: dict[str, Shape] | None = None) -> list[Point]:
    """The grid, the most telling points first.

    Args:
        heads: those of `HEADS` or stand-ins for them, Llama-3's first, then Gemma-2's.
    """
    heads = HEADS if heads is None else heads
    llama, gemma, *others = heads.values()
    every = (AUTO, *FORCED, *_named(_PEERS))
    few = (*_QUICK, *_named(_FEW_PEERS))
    found = [Point(llama, "bf16", every), Point(gemma, "bf16", every)]
    found += [Point(replace(llama, labelled=share), "bf16", few) for share in (0.25, 1.0)]
    found += [Point(shape, "bf16", few) for shape in others]
    found += [
        Point(replace(llama, sequences=sequences), "bf16", few)
        for sequences in (max(2, llama.sequences // 4), 4 * llama.sequences)
    ]
    found.append(Point(llama, "bf16", _named(_OTHER_LOSSES)))
    found += [Point(replace(gemma, labelled=share), "bf16", few) for share in (0.25, 1.0)]
    found.append(Point(replace(llama, sequences=2), "fp32", few))
    return found


def _named(names: tuple[str, ...]) -> tuple[Candidate, ...]:
    return tuple(CANDIDATES[name] for name in names)


def run_gpu(
    folder: Path,
    deadline: float,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Measure on the first GPU, the most telling first; nothing is begun after `deadline` seconds.

    Args:
        folder: gets grid.json, trainer.json and context.json.
        deadline: in seconds; each stage ends at its share of it.
        say: gets a line of progress now and then.
        clock: seconds that go by.
    """
    start, grid = clock(), Results(folder / "grid.json", "grid")
    telling, others = points()[:_TELLING], points()[_TELLING:]

    def measure(chosen: list[Point], seconds: float) -> None:
        Run(grid, DEVICE, seconds=seconds, clock=clock, say=say).measure(chosen)

    def trainers(seconds: float) -> None:
        results = Results(folder / "trainer.json", "trainer")
        TrainerRun(results, DEVICE, seconds, 15.0, clock=clock, say=say).measure(ON_GPU)

    def contexts(seconds: float) -> None:
        run_contexts(Results(folder / "context.json", "context"), seconds, say)

    stages: dict[Callable[[float], None], float] = {
        partial(measure, telling): 0.45,
        trainers: 0.65,
        contexts: 0.80,
        partial(measure, others): 1.0,
    }
    for stage, share in stages.items():
        stage(max(0.0, start + share * deadline - clock()))
