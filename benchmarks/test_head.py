"""Every candidate under pytest-benchmark, with P timed before each round.

``pytest benchmarks/test_head.py`` runs it; ``-k "fp32 and TRL"`` selects, ``--benchmark-json``
saves. `extra_info` holds P in ms, the time in P and the status.
"""

from __future__ import annotations

from functools import lru_cache, partial
from statistics import median
from typing import Any

import pytest
from torch import Tensor

from benchmarks.candidates import CANDIDATES, ON_ONE_SHAPE, step
from benchmarks.head_points import Truth, assess, truth_of
from benchmarks.measuring import Timing, stopwatch
from benchmarks.shapes import DTYPES, LAPTOP, Problem, bare_matmul, make_problem

ROUNDS = 5


@lru_cache(maxsize=1)
def _prepared(dtype: str) -> tuple[Problem, Truth]:
    problem = make_problem(LAPTOP, DTYPES[dtype])
    return problem, truth_of(problem)


@pytest.mark.parametrize("name", ON_ONE_SHAPE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_head(benchmark: Any, name: str, dtype: str) -> None:
    problem, truth = _prepared(dtype)
    candidate = CANDIDATES[name]
    accuracy = assess(candidate, problem, truth)
    benchmark.group = dtype
    benchmark.extra_info["status"] = accuracy.status
    if accuracy.status != "ok":
        pytest.skip(f"{name}: {accuracy.status}")

    measure, unit = stopwatch(problem.hidden.device.type), bare_matmul(problem)
    unit_ms: list[float] = []

    def time_p() -> None:
        unit_ms.append(measure(unit))

    run: partial[Tensor] = partial(step, candidate, problem)
    measure(unit)
    benchmark.pedantic(run, setup=time_p, rounds=ROUNDS)
    ms = tuple(1e3 * seconds for seconds in benchmark.stats.stats.data)
    timing = Timing(ms, tuple(unit_ms[-len(ms) :]))
    benchmark.extra_info.update(p_ms=median(timing.unit_ms), in_p=timing.in_p)
