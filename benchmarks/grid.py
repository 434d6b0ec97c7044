"""Points of a grid, one shape and dtype each: error, forward, step and memory of its candidates.

Rows are on disk as soon as they are known, and what no time is left for is named so.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.accuracy import Accuracy, Truth, assess, failure, truth_of
from benchmarks.counts import count
from benchmarks.memory import Memory, cuda_memory, peak_memory
from benchmarks.peers import NOTHING, Candidate, forward, step
from benchmarks.results import NO_TIME, Row, Sink
from benchmarks.shapes import DTYPES, Problem, Shape, bare_matmul, make_problem
from benchmarks.suite import about, figures
from benchmarks.timing import rounds


@dataclass(frozen=True)
class Point:
    """One problem and who is measured on it, the most telling candidates first."""

    shape: Shape
    dtype: str
    candidates: tuple[Candidate, ...]


def memory_here(candidate: Candidate, problem: Problem, dtype: str) -> Memory:
    """By the allocator on CUDA, of a child process on CPU."""
    if problem.hidden.is_cuda:
        return cuda_memory(candidate, problem)
    return peak_memory(candidate, problem.shape, dtype)


@dataclass(frozen=True)
class Run:
    """How a grid is run.

    Attributes:
        results: where the rows go.
        device: "cpu" or "cuda".
        count: rounds of the timings at most.
        seconds: after these nothing new is begun.
        seconds_of_rounds: no round of a point is begun after these.
        clock: seconds that go by.
        memory: candidate, problem, dtype → extra peak memory.
        say: gets a line of progress now and then.
    """

    results: Sink
    device: str = "cpu"
    count: int = 7
    seconds: float = float("inf")
    seconds_of_rounds: float = 15.0
    clock: Callable[[], float] = time.monotonic
    memory: Callable[[Candidate, Problem, str], Memory] = memory_here
    say: Callable[[str], None] = print

    def measure(self, points: Sequence[Point]) -> None:
        """Every point in order, as far as the time allows."""
        end = self.clock() + self.seconds

        def late() -> bool:
            return self.clock() >= end

        for point in points:
            rows = {c.name: row_of(c, point.shape, point.dtype) for c in point.candidates}
            if not late():
                # A function that was compiled for many shapes falls back to eager silently.
                torch.compiler.reset()
                try:
                    self._measure(point, rows, late)
                except Exception as error:
                    for row in rows.values():
                        if row["status"] == NO_TIME or (
                            row["status"] == "ok" and not row["rounds"]
                        ):
                            row["status"] = failure(error)
                gc.collect()
                if self.device == "cuda":
                    torch.cuda.empty_cache()
            for row in rows.values():
                self.results.put(row)
            self.say(f"{point.shape.name}, {point.shape.labelled_rows} rows, {point.dtype}: done")

    def _measure(self, point: Point, rows: dict[str, Row], late: Callable[[], bool]) -> None:
        problem = make_problem(point.shape, DTYPES[point.dtype], self.device)
        truths: dict[str, Truth] = {}
        right: list[Candidate] = []
        for candidate in point.candidates:
            if late():
                break
            if candidate.objective not in truths:
                truths = {candidate.objective: truth_of(problem, candidate.objective)}
            accuracy = self._assess(candidate, problem, truths[candidate.objective])
            rows[candidate.name].update(asdict(accuracy))
            self.results.put(rows[candidate.name])
            self.say(f"{point.shape.name}: {candidate.name}: {accuracy.status}")
            if accuracy.status == "ok":
                right.append(candidate)
        truths.clear()
        self._time(problem, right, rows, late)
        for candidate in right:
            if late():
                break
            memory = self.memory(candidate, problem, point.dtype)
            rows[candidate.name].update(
                extra_bytes=memory.extra,
                gradient_bytes=memory.gradients,
                memory_status=memory.status,
            )
            self.results.put(rows[candidate.name])

    def _assess(self, candidate: Candidate, problem: Problem, truth: Truth) -> Accuracy:
        """A first step, so that nothing is compiled, loaded or touched first while timed."""
        found = assess(candidate, problem, truth)
        if found.status == "ok" and candidate.trains != NOTHING:
            forward(candidate, problem)
        problem.clear()
        return found

    def _time(
        self,
        problem: Problem,
        right: Sequence[Candidate],
        rows: dict[str, Row],
        late: Callable[[], bool],
    ) -> None:
        steps: dict[str, Callable[[], object]] = {}
        for candidate in right:
            steps[candidate.name] = partial(step, candidate, problem)
            if candidate.trains != NOTHING:
                steps[f"forward of {candidate.name}"] = partial(forward, candidate, problem)
        if not steps or late():
            return
        unit = bare_matmul(problem)
        limit = self.seconds_of_rounds
        timings = rounds(steps, unit, self.count, self.device, limit, self.device == "cpu")
        for timed in timings:
            for candidate in right:
                row = rows[candidate.name]
                row.update(figures(timed[candidate.name], ""))
                alone = timed.get(f"forward of {candidate.name}", timed[candidate.name])
                named = figures(alone, "forward_")
                row.update({name: named[name] for name in _FORWARD})
                self.results.put(row)
            if late():
                return


def measure_alone(
    candidate: Candidate,
    shape: Shape,
    dtype: str,
    device: str,
    memory: Callable[[Candidate, Problem, str], Memory],
    sink: Sink,
) -> None:
    """One candidate of a point, beside P and float64 alone, for a process of its own."""

    def say(text: str) -> None:
        pass

    run = Run(sink, device, seconds_of_rounds=5.0, memory=memory, say=say)
    run.measure([Point(shape, dtype, (candidate,))])


_FORWARD = ("forward_ms", "forward_in_p", "forward_in_p_quartiles")


def row_of(candidate: Candidate, shape: Shape, dtype: str) -> Row:
    """A row without figures."""
    counts = count(candidate.name, shape, DTYPES[dtype].itemsize)
    nothing: dict[str, Any] = dict.fromkeys(("extra_bytes", "gradient_bytes", *_FORWARD))
    return {
        **about(candidate, shape, dtype),
        **nothing,
        **figures(None, ""),
        **asdict(Accuracy(None, None, None, NO_TIME)),
        "objective": candidate.objective,
        "memory_status": "not measured",
        "flops": counts.flops if counts else None,
        "bytes": counts.moved if counts else None,
    }
