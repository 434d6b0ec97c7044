"""A whole trainer step, forward to update: plain, ours and TRL's, all checked against the first.

A trainer is timed on a setup only where its loss and the norm of its gradients are those of the
eager one, after one whole step of each that is not timed. Peak memory is what a step takes beyond
the model and the batch; on CPU in a fresh child process, in which a trainer that needs more than
`LIMIT` fails instead of the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.measuring import Loop, Pass, Step, Timing, quartiles, verdict
from benchmarks.memory import allocated_peak, in_child, resident_peak, return_freed_memory
from benchmarks.results import NO_TIME, RESULTS, Results, Row, Sink, failure
from benchmarks.shapes import DTYPES
from benchmarks.trainers import (
    COMPILED,
    EAGER,
    EVERYWHERE,
    IN_CONTEXT,
    ON_CPU,
    OVER_CONTEXT,
    Setup,
    Stepper,
    Taken,
)

# Of `python -m benchmarks trainer`, whose last step may take a minute.
DEADLINE = 520.0
LIMIT = 18 * 2**30
# What trainers import where they are built.
_LIBRARIES = (
    *("benchmarks.trainer_steps", "transformers.trainer", "trl.trainer.dpo_trainer"),
    *("fused_prefopt.integrations.transformers", "fused_prefopt.integrations.trl"),
)
_UNKNOWN = (
    *("loss", "gradient_norm", "distance", "ms", "ms_quartiles", "of_eager"),
    *("of_eager_quartiles", "extra_bytes", "gradient_bytes"),
)


@dataclass(frozen=True)
class StepMemory:
    """Of one step.

    Attributes:
        extra: bytes of the peak beyond the model and the batch, the gradients among them; None
            where it could not be measured.
        gradients: bytes of the gradients.
        taken: what the measured step computed.
        status: "ok", or why there is no figure.
    """

    extra: int | None
    gradients: int | None
    taken: Taken | None
    status: str


Measure = Callable[[str, Setup, Path], StepMemory]


def step_memory(name: str, setup: Setup, device: str = "cpu") -> StepMemory:
    """Measure one trainer: in a child process on CPU, by the allocator on CUDA."""
    if device == "cuda":
        return _guarded(_allocated, name, setup)
    # Only here: on CUDA the allocator is asked, and a GPU machine may lack it.
    import psutil

    limit = min(LIMIT, int(0.8 * psutil.virtual_memory().available))
    try:
        return in_child(_guarded, _resident, name, setup, limit=limit, libraries=_LIBRARIES)
    except ChildProcessError as error:
        return StepMemory(None, None, None, f"failed: {error}")


def _guarded(measure: Measure, name: str, setup: Setup) -> StepMemory:
    try:
        with TemporaryDirectory() as folder:
            return measure(name, setup, Path(folder))
    except Exception as error:
        return StepMemory(None, None, None, failure(error))


def _resident(name: str, setup: Setup, folder: Path) -> StepMemory:
    return_freed_memory()
    stepper = Stepper(name, setup, folder)
    # Code is compiled for a shape.
    if name in COMPILED:
        stepper.step()
    else:
        stepper.warm_up()
    return _remembered(stepper, resident_peak)


def _allocated(name: str, setup: Setup, folder: Path) -> StepMemory:
    stepper = Stepper(name, setup, folder, "cuda")
    stepper.warm_up()
    # Once as it is measured: kernels are compiled and tuned at the first step of a shape.
    stepper.step()
    return _remembered(stepper, allocated_peak)


def _remembered(stepper: Stepper, peak_of: Callable[[Step], int]) -> StepMemory:
    taken: list[Taken] = []
    extra = peak_of(lambda: taken.append(stepper.step(check=True)))
    return StepMemory(extra, stepper.gradient_bytes, taken[0], "ok")


@dataclass(frozen=True)
class TrainerPoint:
    """The trainers on one setup, as a point of the measuring loop.

    Attributes:
        setup: model and batch.
        names: of the trainers, the eager one first: the others are compared with it.
        memory_of: trainer, setup, device → its peak memory.
    """

    setup: Setup
    names: tuple[str, ...] = ()
    memory_of: Callable[[str, Setup, str], StepMemory] = step_memory

    @property
    def name(self) -> str:
        return f"{self.setup.name}, {self.setup.dtype}"

    @property
    def rounds(self) -> int:
        return self.setup.rounds

    @property
    def has_memory(self) -> bool:
        return self.setup.memory

    def rows(self) -> dict[str, Row]:
        return {name: row_of(name, self.setup) for name in self.names or EVERYWHERE}

    def open(self, device: str, rows: Mapping[str, Row]) -> _TrainerSession:
        return _TrainerSession(self, device, rows)


class _TrainerSession:
    unit = None

    def __init__(self, point: TrainerPoint, device: str, rows: Mapping[str, Row]) -> None:
        self._point, self._device, self._rows = point, device, rows
        self._steppers: dict[str, Stepper] = {}
        self._folder = TemporaryDirectory()

    def check(self, name: str) -> Row:
        stepper = Stepper(name, self._point.setup, Path(self._folder.name), self._device)
        stepper.warm_up()
        found = self._compared(name, stepper.step(check=True))
        if found["status"] == "ok":
            self._steppers[name] = stepper
        return found

    def _compared(self, name: str, taken: Taken) -> Row:
        eager = self._rows[EAGER]
        known = name != EAGER and eager["status"] == "ok"
        return compared(taken, eager if known else None, self._point.setup.dtype)

    def steps(self, name: str) -> dict[str, Step]:
        return {name: self._steppers[name].step}

    def figures(self, name: str, timings: Mapping[str, Timing], prefix: str) -> Row:
        eager = timings.get(EAGER)
        return beside_eager(timings[name].ms, eager.ms if eager else None)

    def release(self) -> None:
        self._steppers.clear()
        self._folder.cleanup()

    def memory(self, name: str) -> Row:
        found = self._point.memory_of(name, self._point.setup, self._device)
        row: Row = {"extra_bytes": found.extra, "gradient_bytes": found.gradients}
        row["memory_status"] = found.status
        if self._rows[name]["status"] == "ok":
            return row
        # Nothing was timed: the measured step is the one that is compared.
        return row | (
            {"status": found.status} if found.taken is None else self._compared(name, found.taken)
        )


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
    point = TrainerPoint(setup, tuple(dict.fromkeys((EAGER, name))))
    loop = Loop(_Only(name, sink), device, passes=(Pass(15.0),), say=lambda text: None)
    loop.measure([point])


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


def compared(taken: Taken, eager: Row | None, dtype: str) -> Row:
    """Fields of what a step computed, and whether that is what the eager trainer computed.

    Args:
        taken: the step.
        eager: the eager trainer's row, None where it is this one or has no figures: nothing is
            compared then, and there is no `distance`.
        dtype: a name of `DTYPES`.
    """
    values = {"loss": taken.loss, "gradient_norm": taken.gradient_norm}
    if eager is None:
        finite = all(value is not None and abs(value) < float("inf") for value in values.values())
        status = "ok" if finite else "wrong: its loss or gradient is not finite"
        return {**values, "status": status}
    off = {name.replace("_", " "): _off(value, eager[name]) for name, value in values.items()}
    return {**values, "distance": max(off.values()), "status": verdict(off, DTYPES[dtype])}


def beside_eager(ms: Sequence[float], eager: Sequence[float] | None) -> Row:
    """The fields of the timings of one trainer, and of the eager one in the same rounds."""
    found: Row = {"rounds": len(ms), "ms": round(median(ms), 2), "ms_quartiles": quartiles(ms, 2)}
    if eager is not None:
        ratios = [mine / other for mine, other in zip(ms, eager, strict=True)]
        found["of_eager"] = round(median(ratios), 4)
        found["of_eager_quartiles"] = quartiles(ratios, 4)
    return found


def run_trainer(folder: Path = RESULTS / "cpu", say: Callable[[str], None] = print) -> None:
    """Measure on this CPU, in less than ten minutes on two cores."""
    results = Results(folder / "trainer.json", "trainer")
    loop = Loop(results, seconds=DEADLINE, passes=(Pass(75.0),), say=say)
    loop.measure([TrainerPoint(setup) for setup in ON_CPU])


def run_memory(folder: Path = RESULTS / "cpu", say: Callable[[str], None] = print) -> None:
    """Measure the memory of steps over the context on this CPU, in a quarter of an hour."""
    loop = Loop(Results(folder / "memory.json", "trainer"), say=say)
    loop.measure([TrainerPoint(setup, IN_CONTEXT) for setup in OVER_CONTEXT])


def _off(value: float | None, wanted: float) -> float:
    return float("nan") if value is None else abs(value - wanted) / max(abs(wanted), 1e-12)
