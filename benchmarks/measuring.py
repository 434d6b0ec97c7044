"""The one measuring loop: error against float64, time in interleaved rounds, then memory.

A point is one problem and who is measured on it. Every row is on disk before anything is measured
and as often as more is known: who is wrong, missing or fails is named so and is not timed, and so
is what no time is left for.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.results import NO_TIME, Row, Sink, failure

FEWEST_ROUNDS = 3
# A candidate beyond these relative errors is wrong, not imprecise.
WRONG_BEYOND = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
# Written before each CUDA measurement, so that no step finds its inputs in the last-level cache.
_CACHE_BYTES = 2**28

Step = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Rounds of one step; `unit_ms[i]` is the P measured right before `ms[i]`, if there is one."""

    ms: tuple[float, ...]
    unit_ms: tuple[float, ...] = ()

    @property
    def median_ms(self) -> float:
        return median(self.ms)

    @property
    def ratios(self) -> list[float]:
        return [ms / unit for ms, unit in zip(self.ms, self.unit_ms, strict=True)]

    @property
    def in_p(self) -> float:
        """Median over the rounds of time / P."""
        return median(self.ratios)


@dataclass(frozen=True)
class Rounds:
    """How steps are timed.

    Attributes:
        count: rounds at most.
        device: "cpu" or "cuda".
        seconds: start no round after these, but make `FEWEST_ROUNDS`.
        spare_slow: whether the slower half of the steps stops after `FEWEST_ROUNDS`.
        collect: whether garbage is collected before each step; not for steps that take less.
    """

    count: int = 7
    device: str = "cpu"
    seconds: float = math.inf
    spare_slow: bool = False
    collect: bool = True

    def time(
        self, steps: Mapping[str, Step], unit: Step | None = None
    ) -> Iterator[dict[str, Timing]]:
        """Run every step once a round, P right before each, and yield all timings after each round.

        Run each step once before: what first touches memory, compiles or loads is not to be timed.

        Args:
            steps: name → step.
            unit: the step that takes 1 P, or None.
        """
        measure = stopwatch(self.device)
        ms: dict[str, list[float]] = {name: [] for name in steps}
        units: dict[str, list[float]] = {name: [] for name in steps}
        if unit is not None:
            measure(unit)
        end = time.monotonic() + self.seconds
        for number in range(self.count):
            if number >= FEWEST_ROUNDS and time.monotonic() > end:
                return
            if self.spare_slow and number == FEWEST_ROUNDS:
                known = {name: median(values) for name, values in ms.items()}
                middle = median(known.values())
                steps = {name: run for name, run in steps.items() if known[name] <= middle}
            for name, run in steps.items():
                if self.collect:
                    gc.collect()
                if unit is not None:
                    units[name].append(measure(unit))
                ms[name].append(measure(run))
            yield {name: Timing(tuple(ms[name]), tuple(units[name])) for name in ms}


def stopwatch(device: str) -> Callable[[Step], float]:
    """A function that runs a step once and returns the ms it took on the device."""
    return _CudaStopwatch() if device == "cuda" else _cpu_ms


def _cpu_ms(step: Step) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


class _CudaStopwatch:
    def __init__(self) -> None:
        self._cache = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._cache.zero_()
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def quartiles(values: Sequence[float], digits: int) -> list[float]:
    """The first and the third, rounded."""
    if len(values) == 1:
        return 2 * [round(values[0], digits)]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return [round(low, digits), round(high, digits)]


def figures(timing: Timing | None, prefix: str = "") -> Row:
    """The fields of a timing in ms and in P, or empty ones."""
    names = ("rounds", "ms", "p_ms", "in_p", "in_p_quartiles")
    values: tuple[Any, ...] = (0, None, None, None, None)
    if timing is not None:
        p_ms, spread = round(median(timing.unit_ms), 3), quartiles(timing.ratios, 3)
        values = (len(timing.ms), round(timing.median_ms, 3), p_ms, round(timing.in_p, 3), spread)
    return {f"{prefix}{name}": value for name, value in zip(names, values, strict=True)}


class Session(Protocol):
    """A point's problem in memory, and its candidates ready to run on it."""

    @property
    def unit(self) -> Step | None:
        """The step that takes 1 P."""

    def check(self, name: str) -> Row:
        """Take a candidate's first step: fields of its row, the status among them. What compiles,
        loads or touches memory first does so here."""

    def steps(self, name: str) -> dict[str, Step]:
        """The timed steps of a candidate, by names that no other one has."""

    def figures(self, name: str, timings: Mapping[str, Timing], prefix: str) -> Row:
        """Fields of a candidate's row from the timings of all."""

    def release(self) -> None:
        """Drop what only the timings have needed."""

    def memory(self, name: str) -> Row:
        """Fields of a candidate's row on its peak memory."""


class Point(Protocol):
    """One problem and who is measured on it."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def rounds(self) -> int | None:
        """Of the timings: None for the loop's, 0 where only memory is measured."""

    @property
    def has_memory(self) -> bool:
        """Whether memory is measured."""

    def rows(self) -> dict[str, Row]:
        """Candidate → row without figures, the most telling first."""

    def open(self, device: str, rows: Mapping[str, Row]) -> Session:
        """Make the problem; what fails here is the status of every row."""


@dataclass(frozen=True)
class Pass:
    """One pass of timings over a point.

    Attributes:
        seconds: no round is begun after these.
        prefix: of the fields that the pass fills.
        prepare: called before it.
    """

    seconds: float = 15.0
    prefix: str = ""
    prepare: Step = lambda: None


@dataclass(frozen=True)
class Loop:
    """The measuring loop.

    Attributes:
        results: where the rows go.
        device: "cpu" or "cuda".
        count: rounds of the timings at most.
        spare_slow: whether the slower half of a point's steps gets no more than the fewest rounds.
        seconds: after these nothing new is begun.
        passes: of timings.
        clock: seconds that go by.
        say: gets a line of progress now and then.
    """

    results: Sink
    device: str = "cpu"
    count: int = 7
    spare_slow: bool = False
    seconds: float = math.inf
    passes: tuple[Pass, ...] = (Pass(),)
    clock: Callable[[], float] = time.monotonic
    say: Callable[[str], None] = print

    def measure(self, points: Iterable[Point]) -> None:
        """Every point in order, as far as the time allows."""
        end = self.clock() + self.seconds

        def late() -> bool:
            return self.clock() >= end

        for point in points:
            rows = point.rows()
            for row in rows.values():
                self.results.put(row)
            if not late():
                self._measure(point, rows, late)
                # Now that its session is gone.
                self._collect()
            self.say(f"{point.name}: done")

    def _measure(self, point: Point, rows: dict[str, Row], late: Callable[[], bool]) -> None:
        # A function that was compiled for many shapes falls back to eager silently.
        torch.compiler.reset()
        try:
            session = point.open(self.device, rows)
            if point.rounds != 0:
                self.say(f"{point.name}: in memory")
                self._check(point, session, rows, late)
                self._time(point, session, rows, late)
            session.release()
            self._collect()
            if point.has_memory:
                self._remember(point, session, rows, late)
        except Exception as error:
            for row in rows.values():
                if row["status"] == NO_TIME or (row["status"] == "ok" and not row["rounds"]):
                    row["status"] = failure(error)
                    self.results.put(row)

    def _check(
        self, point: Point, session: Session, rows: dict[str, Row], late: Callable[[], bool]
    ) -> None:
        for name, row in rows.items():
            if late():
                return
            try:
                row.update(session.check(name))
            except Exception as error:
                row["status"] = failure(error)
            self._tell(point, row, row["status"])

    def _time(
        self, point: Point, session: Session, rows: dict[str, Row], late: Callable[[], bool]
    ) -> None:
        right = [name for name, row in rows.items() if row["status"] == "ok"]
        steps = {key: run for name in right for key, run in session.steps(name).items()}
        total = self.count if point.rounds is None else point.rounds
        for each in self.passes:
            if not steps or late():
                return
            each.prepare()
            rounds = Rounds(total, self.device, each.seconds, self.spare_slow)
            for number, timings in enumerate(rounds.time(steps, session.unit), 1):
                for name in right:
                    rows[name].update(session.figures(name, timings, each.prefix))
                    self.results.put(rows[name])
                self.say(f"{point.name}: {each.prefix}round {number} of {total}")
                if late():
                    return

    def _remember(
        self, point: Point, session: Session, rows: dict[str, Row], late: Callable[[], bool]
    ) -> None:
        for name, row in rows.items():
            untimed = point.rounds == 0 and row["status"] == NO_TIME
            if row["status"] != "ok" and not untimed:
                continue
            if late():
                row.update({"memory_status": NO_TIME} if "memory_status" in row else {})
                self.results.put(row)
                continue
            row.update(session.memory(name))
            self._collect()
            extra = row["extra_bytes"]
            self._tell(point, row, "no memory" if extra is None else f"{extra / 2**20:.0f} MiB")

    def _tell(self, point: Point, row: Row, text: str) -> None:
        self.results.put(row)
        self.say(f"{point.name}: {row['candidate']}: {text}")

    def _collect(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def verdict(errors: Mapping[str, float], dtype: torch.dtype) -> str:
    """ "ok", or which relative errors are too large to be rounding; a NaN is."""
    limit = WRONG_BEYOND[dtype]
    wrong = [f"{what} off by {error:.1e}" for what, error in errors.items() if not error <= limit]
    return "wrong: " + ", ".join(wrong) if wrong else "ok"


def relative(value: Tensor | None, wanted: Tensor) -> float:
    """‖value − wanted‖ / ‖wanted‖, infinite where there is no value."""
    if value is None:
        return float("inf")
    return ((value.double() - wanted).norm() / wanted.norm()).item()
