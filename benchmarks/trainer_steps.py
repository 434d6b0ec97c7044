"""A whole trainer step, forward to update: plain, ours and TRL's, all checked against the first.

Rows are on disk as soon as they are known. A trainer is timed on a setup only where its loss and
the norm of its gradients are those of the eager one; who is wrong, missing or fails is named so.
Rounds take every trainer once, after one whole step of each that is not timed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory

import torch

from benchmarks.accuracy import WRONG_BEYOND, failure
from benchmarks.results import NO_TIME, RESULTS, Results, Row, Sink
from benchmarks.shapes import DTYPES
from benchmarks.timing import FEWEST_ROUNDS, stopwatch
from benchmarks.trainer_candidates import EAGER, TRAINERS, Stepper, Taken
from benchmarks.trainer_memory import StepMemory, step_memory
from benchmarks.trainer_setups import ON_CPU, Setup

# Of `python -m benchmarks trainer`, whose last step may take a minute.
DEADLINE = 520.0
_UNKNOWN = (
    *("loss", "gradient_norm", "distance", "ms", "ms_quartiles", "of_eager"),
    *("of_eager_quartiles", "extra_bytes", "gradient_bytes"),
)


@dataclass(frozen=True)
class TrainerRun:
    """How the trainers are measured.

    Attributes:
        results: where the rows go.
        device: "cpu" or "cuda".
        seconds: after these nothing new is begun.
        seconds_of_rounds: no round of a setup is begun after these.
        clock: seconds that go by.
        memory: trainer, setup, device → its peak memory.
        say: gets a line of progress now and then.
        names: of the trainers; the others are compared with the eager one.
    """

    results: Sink
    device: str = "cpu"
    seconds: float = float("inf")
    seconds_of_rounds: float = 75.0
    clock: Callable[[], float] = time.monotonic
    memory: Callable[[str, Setup, str], StepMemory] = step_memory
    say: Callable[[str], None] = print
    names: Sequence[str] | None = None

    def measure(self, setups: Sequence[Setup]) -> None:
        """Every setup in order, as far as the time allows."""
        end = self.clock() + self.seconds

        def late() -> bool:
            return self.clock() >= end

        for setup in setups:
            rows = {name: row_of(name, setup) for name in self.names or TRAINERS}
            if setup.rounds:
                with TemporaryDirectory() as folder:
                    self._time(setup, rows, Path(folder), late)
                self._release()
            if setup.memory:
                self._remember(setup, rows, late)
            for row in rows.values():
                self.results.put(row)

    def _time(
        self, setup: Setup, rows: dict[str, Row], folder: Path, late: Callable[[], bool]
    ) -> None:
        steppers: dict[str, Stepper] = {}
        for name, row in rows.items():
            if late():
                return
            try:
                stepper = Stepper(name, setup, folder, self.device)
                stepper.warm_up()
                compare(row, stepper.step(check=True), rows[EAGER])
            except Exception as error:
                row["status"] = failure(error)
            if row["status"] == "ok":
                steppers[name] = stepper
            self._tell(setup, row, row["status"])
        ms: dict[str, list[float]] = {name: [] for name in steppers}
        measure, stop = stopwatch(self.device), self.clock() + self.seconds_of_rounds
        for number in range(setup.rounds):
            if late() or (number >= FEWEST_ROUNDS and self.clock() > stop):
                return
            for name, stepper in steppers.items():
                gc.collect()
                ms[name].append(measure(stepper.step))
            for name in steppers:
                rows[name].update(figures(ms[name], ms.get(EAGER)))
                self._tell(setup, rows[name], f"{rows[name]['ms']:.0f} ms")

    def _remember(self, setup: Setup, rows: dict[str, Row], late: Callable[[], bool]) -> None:
        for name, row in rows.items():
            if late():
                return
            timed = row["status"] == "ok"
            if not timed and row["status"] != NO_TIME:
                continue
            found = self.memory(name, setup, self.device)
            self._release()
            row.update(extra_bytes=found.extra, gradient_bytes=found.gradients)
            row["memory_status"] = found.status
            if not timed and found.taken is None:
                row["status"] = found.status
            elif found.taken is not None and not timed:
                compare(row, found.taken, rows[EAGER])
            size = "" if found.extra is None else f", {found.extra / 2**20:.0f} MiB"
            self._tell(setup, row, row["status"] + size)

    def _tell(self, setup: Setup, row: Row, text: str) -> None:
        self.results.put(row)
        self.say(f"{setup.name}, {setup.dtype}: {row['candidate']}: {text}")

    def _release(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Only:
    """Passes one trainer's rows on."""

    name: str
    sink: Sink

    def put(self, row: Row) -> None:
        if row["candidate"] == self.name:
            self.sink.put(row)


def measure_beside_eager(name: str, setup: Setup, device: str, sink: Sink) -> None:
    """One trainer's row, beside the eager trainer alone, for a process of its own."""

    def say(text: str) -> None:
        pass

    names = tuple(dict.fromkeys((EAGER, name)))
    run = TrainerRun(_Only(name, sink), device, seconds_of_rounds=15.0, say=say, names=names)
    run.measure([setup])


def row_of(name: str, setup: Setup) -> Row:
    """A row without figures."""
    return {
        "candidate": name,
        "shape": setup.name,
        "sequences": 2 * setup.pairs,
        "length": setup.length,
        "labelled_rows": setup.labelled_rows,
        "layers": setup.layers,
        "hidden_size": setup.hidden_size,
        "vocab": setup.vocab,
        "dtype": setup.dtype,
        "trains": setup.trains,
        "status": NO_TIME,
        "rounds": 0,
        "memory_status": "not measured",
        **dict.fromkeys(_UNKNOWN),
    }


def compare(row: Row, taken: Taken, eager: Row) -> None:
    """Note what a step computed, and whether that is what the eager one computed.

    Where the eager trainer has no figures, nothing is compared and `distance` stays None.

    Args:
        row: of the trainer, gets the figures and its status.
        taken: its step.
        eager: the eager trainer's row, which may be the same.
    """
    values = {"loss": taken.loss, "gradient_norm": taken.gradient_norm}
    row.update(values, status="ok")
    if eager["status"] != "ok" or row is eager:
        if not all(value is not None and abs(value) < float("inf") for value in values.values()):
            row["status"] = "wrong: its loss or gradient is not finite"
        return
    limit = WRONG_BEYOND[DTYPES[row["dtype"]]]
    off = {name: _relative(value, eager[name]) for name, value in values.items()}
    row["distance"] = max(off.values())
    wrong = [
        f"{name.replace('_', ' ')} off by {x:.1e}" for name, x in off.items() if not x <= limit
    ]
    if wrong:
        row["status"] = "wrong: " + ", ".join(wrong)


def figures(ms: Sequence[float], eager: Sequence[float] | None) -> Mapping[str, object]:
    """The fields of the timings of one trainer, and of the eager one in the same rounds."""
    found: dict[str, object] = {"rounds": len(ms), "ms": round(median(ms), 2)}
    found["ms_quartiles"] = _quartiles(ms, 2)
    if eager is not None:
        ratios = [mine / other for mine, other in zip(ms, eager, strict=True)]
        found["of_eager"] = round(median(ratios), 4)
        found["of_eager_quartiles"] = _quartiles(ratios, 4)
    return found


def run_trainer(folder: Path = RESULTS / "cpu", say: Callable[[str], None] = print) -> None:
    """Measure on this CPU, in less than ten minutes on two cores."""
    results = Results(folder / "trainer.json", "trainer")
    TrainerRun(results, seconds=DEADLINE, say=say).measure(ON_CPU)


def _quartiles(values: Sequence[float], digits: int) -> list[float]:
    if len(values) == 1:
        return 2 * [round(values[0], digits)]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return [round(low, digits), round(high, digits)]


def _relative(value: float | None, wanted: float) -> float:
    return float("nan") if value is None else abs(value - wanted) / max(abs(wanted), 1e-12)
