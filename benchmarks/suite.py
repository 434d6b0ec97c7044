"""The CPU suite: every candidate on one shape in fp32 and bf16, then the memory sweep."""

from __future__ import annotations

import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.accuracy import Accuracy, assess, truth_of
from benchmarks.malloc import keep_freed_memory
from benchmarks.memory import Memory, peak_memory
from benchmarks.peers import CANDIDATES, IN_SWEEP, ON_ONE_SHAPE, Candidate, step
from benchmarks.results import NO_TIME, RESULTS, Results, Row
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

# Nothing is begun after these: what is under way by then ends before ten minutes.
DEADLINE = 555.0
_SECONDS_OF_ROUNDS = {"": 60.0, "reused_": 30.0}


def run_cpu(
    folder: Path = RESULTS / "cpu",
    *,
    count: int = 7,
    seconds: float = DEADLINE,
    say: Callable[[str], None] = print,
    isolate: bool = True,
) -> None:
    """Everything that the README shows, in less than ten minutes on two cores.

    Args:
        folder: where the results go.
        count: rounds of the timings, as far as their time allows; the slower half of the
            candidates gets no more than the fewest.
        seconds: nothing is begun after them; rows without figures are named so.
        say: gets a line of progress now and then.
        isolate: time each dtype in a process of its own: what one keeps of its freed memory, the
            next must not find.
    """
    start = time.monotonic()

    def tell(text: str) -> None:
        say(f"[{time.monotonic() - start:4.0f} s] {text}")

    for dtype in DTYPES:
        left = start + seconds - time.monotonic()
        measure = partial(_measure_laptop, LAPTOP, dtype, folder, count, left)
        if isolate:
            _run_alone(measure)
        else:
            measure()
        tell(f"{dtype}: done")
    sweep_memory(
        {"vocab": SWEEP_VOCAB, "length": SWEEP_LENGTH},
        Results(folder / "sweep.json", "sweep"),
        tell,
        start + seconds - time.monotonic(),
    )


def _measure_laptop(shape: Shape, dtype: str, folder: Path, count: int, seconds: float) -> None:
    warnings.simplefilter("ignore")
    results = Results(folder / f"head-{dtype}.json", "head")
    measure_head(shape, dtype, results, count, partial(print, flush=True), seconds)


def _run_alone(function: Callable[[], None]) -> None:
    child = multiprocessing.get_context("spawn").Process(target=function)
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"the measuring process ended with exit code {child.exitcode}")


def measure_head(
    shape: Shape,
    dtype: str,
    results: Results,
    count: int,
    say: Callable[[str], None],
    seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Error, then time, then memory of every candidate on one shape; rows grow as it goes.

    Args:
        shape: of the batch.
        dtype: of the operands, a name of `DTYPES`.
        results: where the rows go.
        count: rounds of the timings at most.
        say: gets a line of progress now and then.
        seconds: nothing is begun after these.
        clock: seconds that go by.
    """
    end = clock() + seconds
    rows = {name: _row(CANDIDATES[name], shape, dtype) for name in ON_ONE_SHAPE}
    for row in rows.values():
        results.put(row)
    if clock() >= end:
        return
    say(f"{dtype}: float64 truth")
    problem = make_problem(shape, DTYPES[dtype])
    truth = truth_of(problem)
    for name, row in rows.items():
        if clock() >= end:
            break
        row.update(asdict(assess(CANDIDATES[name], problem, truth)))
        results.put(row)
        say(f"{dtype}: {name}: {row['status']}")
    del truth

    right = [name for name, row in rows.items() if row["status"] == "ok"]
    steps = {name: partial(step, CANDIDATES[name], problem) for name in right}
    unit = bare_matmul(problem)

    def time_them(prefix: str) -> None:
        limit = _SECONDS_OF_ROUNDS[prefix]
        timings = rounds(steps, unit, count, "cpu", limit, spare_slow=True)
        for number, timed in enumerate(timings, 1):
            for name in right:
                rows[name].update(figures(timed[name], prefix))
                results.put(rows[name])
            say(f"{dtype}: {prefix}round {number} of {count}")
            if clock() >= end:
                return

    if right and clock() < end:
        time_them("")
    keep_freed_memory()
    if right and clock() < end:
        time_them("reused_")
    problem.clear()

    for name in right:
        if clock() >= end:
            rows[name]["memory_status"] = NO_TIME
            results.put(rows[name])
            continue
        memory = peak_memory(CANDIDATES[name], shape, dtype)
        rows[name].update(_bytes(memory), memory_status=memory.status)
        results.put(rows[name])
        say(f"{dtype}: {name}: {_mib(memory)}")


def _row(candidate: Candidate, shape: Shape, dtype: str) -> Row:
    """A row without figures."""
    return {
        **about(candidate, shape, dtype),
        **dict.fromkeys(("extra_bytes", "gradient_bytes")),
        **figures(None, ""),
        **figures(None, "reused_"),
        "memory_status": "not measured",
        **asdict(Accuracy(None, None, None, NO_TIME)),
    }


def sweep_memory(
    axes: dict[str, Sequence[Shape]],
    results: Results,
    say: Callable[[str], None],
    seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Extra peak memory in fp32 while one size of the shape grows, the largest shapes first; a
    shape that two axes share is measured once, and nothing is begun after `seconds` on `clock`."""
    end = clock() + seconds
    measured: dict[tuple[Shape, str], Memory] = {}
    pairs = [(axis, shape) for axis, shapes in axes.items() for shape in shapes]
    for axis, shape in sorted(pairs, key=lambda pair: -pair[1].rows * pair[1].vocab):
        for name in IN_SWEEP:
            key, memory = (replace(shape, name="any"), name), Memory(None, None, NO_TIME)
            if clock() < end:
                memory = measured.get(key) or peak_memory(CANDIDATES[name], shape, "fp32")
                measured[key] = memory
            known = about(CANDIDATES[name], shape, "fp32")
            results.put({**known, "axis": axis, "status": memory.status, **_bytes(memory)})
            say(f"sweep: {shape.name}: {name}: {_mib(memory)}")


def about(candidate: Candidate, shape: Shape, dtype: str) -> Row:
    """What a row is about."""
    return {
        "candidate": candidate.name,
        **shape.fields,
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
