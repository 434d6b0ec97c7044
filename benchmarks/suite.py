"""The CPU suite: every candidate on one shape in fp32 and bf16, then the memory sweep."""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.accuracy import assess, truth_of
from benchmarks.malloc import keep_freed_memory
from benchmarks.memory import Memory, peak_memory
from benchmarks.peers import CANDIDATES, IN_SWEEP, ON_ONE_SHAPE, Candidate, step
from benchmarks.results import RESULTS, Results, Row
from benchmarks.shapes import (
    DTYPES,
    LAPTOP,
    SWEEP_LENGTH,
    SWEEP_VOCAB,
    Shape,
    bare_matmul,
    make_problem,
)
from benchmarks.timing import Timing, rounds

_SECONDS_OF_ROUNDS = 90.0


def run_cpu(
    folder: Path = RESULTS / "cpu",
    *,
    count: int = 7,
    say: Callable[[str], None] = print,
    isolate: bool = True,
) -> None:
    """Everything that the README shows, in less than ten minutes on two cores.

    Args:
        folder: where the results go.
        count: rounds of the timings, as far as their time allows.
        say: gets a line of progress now and then.
        isolate: time each dtype in a process of its own: what one keeps of its freed memory, the
            next must not find.
    """
    start = time.monotonic()

    def tell(text: str) -> None:
        say(f"[{time.monotonic() - start:4.0f} s] {text}")

    for dtype in DTYPES:
        measure = partial(_measure_laptop, LAPTOP, dtype, folder, count)
        if isolate:
            _run_alone(measure)
        else:
            measure()
        tell(f"{dtype}: done")
    sweep_memory(
        {"vocab": SWEEP_VOCAB, "length": SWEEP_LENGTH},
        Results(folder / "sweep.json", "sweep"),
        tell,
    )


def _measure_laptop(shape: Shape, dtype: str, folder: Path, count: int) -> None:
    warnings.simplefilter("ignore")
    results = Results(folder / f"head-{dtype}.json", "head")
    measure_head(shape, dtype, results, count, partial(print, flush=True))


def _run_alone(function: Callable[[], None]) -> None:
    child = multiprocessing.get_context("spawn").Process(target=function)
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"the measuring process ended with exit code {child.exitcode}")


def measure_head(
    shape: Shape, dtype: str, results: Results, count: int, say: Callable[[str], None]
) -> None:
    """Error, then time, then memory of every candidate on one shape; rows grow as it goes."""
    say(f"{dtype}: float64 truth")
    problem = make_problem(shape, DTYPES[dtype])
    truth = truth_of(problem)
    rows: dict[str, Row] = {}
    for name in ON_ONE_SHAPE:
        accuracy = assess(CANDIDATES[name], problem, truth)
        rows[name] = {
            **about(CANDIDATES[name], shape, dtype),
            **dict.fromkeys(("extra_bytes", "gradient_bytes")),
            **figures(None, ""),
            **figures(None, "reused_"),
            "memory_status": "not measured",
            **asdict(accuracy),
        }
        results.put(rows[name])
        say(f"{dtype}: {name}: {accuracy.status}")
    del truth

    right = [name for name, row in rows.items() if row["status"] == "ok"]
    steps = {name: partial(step, CANDIDATES[name], problem) for name in right}
    unit = bare_matmul(problem)

    def time_them(prefix: str) -> None:
        timings = rounds(steps, unit, count, "cpu", _SECONDS_OF_ROUNDS)
        for number, timed in enumerate(timings, 1):
            for name in right:
                rows[name].update(figures(timed[name], prefix))
                results.put(rows[name])
            local = timed["ours: local"].in_p
            say(f"{dtype}: {prefix}round {number} of {count}: ours: local {local:.2f} P")

    time_them("")
    keep_freed_memory()
    time_them("reused_")
    problem.clear()

    for name in right:
        memory = peak_memory(CANDIDATES[name], shape, dtype)
        rows[name].update(_bytes(memory), memory_status=memory.status)
        results.put(rows[name])
        say(f"{dtype}: {name}: {_mib(memory)}")


def sweep_memory(
    axes: dict[str, Sequence[Shape]], results: Results, say: Callable[[str], None]
) -> None:
    """Extra peak memory in fp32 while one size of the shape grows."""
    for axis, shapes in axes.items():
        for shape in shapes:
            for name in IN_SWEEP:
                memory = peak_memory(CANDIDATES[name], shape, "fp32")
                known = about(CANDIDATES[name], shape, "fp32")
                results.put({**known, "axis": axis, "status": memory.status, **_bytes(memory)})
                say(f"sweep: {shape.name}: {name}: {_mib(memory)}")


def about(candidate: Candidate, shape: Shape, dtype: str) -> Row:
    """What a row is about."""
    return {
        "candidate": candidate.name,
        "shape": shape.name,
        "sequences": shape.sequences,
        "length": shape.length,
        "labelled_rows": shape.labelled_rows,
        "hidden_size": shape.hidden_size,
        "vocab": shape.vocab,
        "dtype": dtype,
        "trains": candidate.trains,
    }


def figures(timing: Timing | None, prefix: str) -> Row:
    """The fields of a timing, or empty ones."""
    names = ("rounds", "ms", "p_ms", "in_p", "in_p_quartiles")
    values: tuple[Any, ...] = (0, None, None, None, None)
    if timing is not None:
        ratios = timing.ratios
        quartiles = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
        values = (
            len(ratios),
            round(timing.median_ms, 3),
            round(median(timing.unit_ms), 3),
            round(timing.in_p, 3),
            [round(quartiles[0], 3), round(quartiles[2], 3)],
        )
    return {f"{prefix}{name}": value for name, value in zip(names, values, strict=True)}


def _bytes(memory: Memory) -> Row:
    return {"extra_bytes": memory.extra, "gradient_bytes": memory.gradients}


def _mib(memory: Memory) -> str:
    if memory.extra is None:
        return memory.status
    return f"{memory.extra / 2**20:.0f} MiB extra"
