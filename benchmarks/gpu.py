"""The GPU grid: three heads, every path on every engine beside the peers, telling rows first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from benchmarks.grid import Point, Run
from benchmarks.peers import CANDIDATES, HEAD, HIDDEN, NOTHING, Candidate, ours
from benchmarks.results import Results
from benchmarks.shapes import HEADS, Problem, Shape
from fused_prefopt.ops.engines import ENGINES

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
_FEW_PEERS = ("TRL", "TRL: frozen head", "Liger", "cut-cross-entropy")
_TILES = 512


def _with_room(path: str, engine: str, problem: Problem) -> tuple[Tensor, Tensor]:
    """The default workspace; `local` gets the probabilities that it keeps beside it."""
    kept = problem.shape.labelled_rows * problem.shape.vocab * problem.hidden.element_size()
    room = kept / 2**20 + _TILES if path == "local" else 256
    return ours(path, problem, engine=engine, workspace_mb=room)


def _forced(path: str, engine: str) -> Candidate:
    run = partial(_with_room, path, engine)
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


def run_gpu(folder: Path, deadline: float, say: Callable[[str], None]) -> None:
    """Measure on the first GPU; nothing new is begun after `deadline` seconds."""
    results = Results(folder / "grid.json", "grid")
    Run(results, "cuda", seconds=deadline, say=say).measure(points())
