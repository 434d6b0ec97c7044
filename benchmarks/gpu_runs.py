"""Measurements on a GPU before a deadline, telling rows first.

Our paths and TRL's on three heads, whole trainer steps, the other peers, the longest contexts, and
other shares, rows and dtypes.

Each row is a unit of work in a process of its own: what ends or breaks it ends nothing else, and is
the status of the unit's row, which is on disk before the next unit begins.
"""

from __future__ import annotations

import importlib
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.candidates import (
    CANDIDATES,
    DEFAULTS,
    ENGINES,
    OF_TRL,
    SOME,
    TRAINS,
    Candidate,
    forced,
)
from benchmarks.context_search import run_contexts
from benchmarks.head_points import GridPoint
from benchmarks.measuring import Loop, Pass
from benchmarks.results import NO_TIME, Results, Row, Sink, failure
from benchmarks.shapes import HEADS, Shape
from benchmarks.trainer_steps import measure_beside_eager
from benchmarks.trainer_steps import row_of as trainer_row
from benchmarks.trainers import EAGER, EVERYWHERE, ON_GPU

# How often it is looked whether a silent process is still there: those that it has started may
# hold its end of the pipe open.
_SECONDS_OF_SILENCE = 0.2


@dataclass(frozen=True)
class Unit:
    """Work on one row.

    Attributes:
        file: name of the results that the row belongs to.
        row: without figures.
        measure: puts the row into a sink as often as it knows more; a function of a module, or a
            partial of one.
        seconds: after these the process is killed.
        modules: imported ahead, those that are there.
    """

    file: str
    row: Row
    measure: Callable[[Sink], None]
    seconds: float = 60.0
    modules: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For people."""
        row = self.row
        return f"{row['shape']}, {row['labelled_rows']} rows, {row['dtype']}: {row['candidate']}"


class UnitFailed(Exception):
    """The work has raised, or its process has ended; the text is the status of a row."""


class Worker:
    """A new process that imports what a unit needs, and waits to begin: CUDA is not touched yet."""

    def __init__(self, unit: Unit) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        arguments = (other, unit.measure, unit.modules, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments)
        self._process.start()
        other.close()

    def rows(self, seconds: float) -> Iterator[Row]:
        """Begin; the row, each time that it has grown.

        Raises:
            UnitFailed: the work has raised, or its process has ended.
            TimeoutError: it was not done after `seconds`.
        """
        end = time.monotonic() + seconds
        with suppress(OSError):  # a process that is gone is noticed below
            self._connection.send("begin")
        while (left := end - time.monotonic()) > 0:
            gone = self._process.exitcode
            try:
                if self._connection.poll(min(left, _SECONDS_OF_SILENCE)):
                    message = self._connection.recv()
                    if message is None:
                        return
                    if isinstance(message, str):
                        raise UnitFailed(message)
                    yield message
                    continue
            except (EOFError, OSError):
                self._process.join()
                gone = self._process.exitcode
            if gone is not None:
                raise UnitFailed(f"failed: the process ended with {_ending(gone)}")
        raise TimeoutError

    def stop(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self._connection.close()


@dataclass(frozen=True)
class _Sent:
    connection: Any

    def put(self, row: Row) -> None:
        self.connection.send(row)


def _serve(
    connection: Any, measure: Callable[[Sink], None], modules: Sequence[str], threads: int
) -> None:
    # What peers warn of (deprecations, compile fallbacks) would bury the progress.
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    for name in modules:
        with suppress(Exception):
            importlib.import_module(name)
    try:
        connection.recv()
    except EOFError:
        return
    try:
        measure(_Sent(connection))
    except Exception as error:
        connection.send(failure(error))
    else:
        connection.send(None)


def run_units(
    units: Sequence[Unit],
    files: Mapping[str, Results],
    end: float,
    say: Callable[[str], None],
) -> None:
    """Every unit in order, while the process of the next one starts; rows that are done stay.

    Args:
        units: the most telling first.
        files: name → results.
        end: time of `time.monotonic` after which nothing begins, and what is under way is ended.
        say: gets a line for each unit.
    """
    left = [unit for unit in units if not files[unit.file].done(unit.row)]
    waiting: Worker | None = None
    try:
        for place, unit in enumerate(left):
            if time.monotonic() >= end:
                break
            worker = waiting or Worker(unit)
            following = left[place + 1 : place + 2]
            waiting = Worker(following[0]) if following else None
            try:
                row = _measured(worker, unit, files[unit.file], end)
            finally:
                worker.stop()
            say(f"{unit.name}: {row['status']}{_figures(row)}")
    finally:
        if waiting is not None:
            waiting.stop()
    for unit in left:
        if not files[unit.file].holds(unit.row):
            files[unit.file].put(unit.row)


def _measured(worker: Worker, unit: Unit, results: Results, end: float) -> Row:
    row, problem = unit.row, None
    try:
        for row in worker.rows(min(unit.seconds, end - time.monotonic())):
            results.put(row)
    except UnitFailed as error:
        problem = str(error)
    except TimeoutError:
        late = time.monotonic() >= end
        problem = NO_TIME if late else f"failed: not done after {unit.seconds:.0f} s"
    # What a row says of its own failure tells more than the end that its process has come to.
    if problem is not None and row["status"] in ("ok", NO_TIME):
        row = {**row, "status": problem}
        results.put(row)
    return row


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"code {code}"


def _figures(row: Row) -> str:
    """A row's time, for people, as far as it is known."""
    if row.get("in_p") is not None:
        return f", {row['ms']:.1f} ms, {row['in_p']:.2f} P"
    return f", {row['ms']:.0f} ms" if row.get("ms") is not None else ""


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


def telling(heads: dict[str, Shape] | None = None) -> list[GridPoint]:
    """Ours and TRL's on every head.

    Args:
        heads: those of `HEADS` or stand-ins for them, in their order.
    """
    return [GridPoint(shape, "bf16", TELLING) for shape in (heads or HEADS).values()]


def peers(heads: dict[str, Shape] | None = None) -> list[GridPoint]:
    """The other peers on every head; as `telling`."""
    return [GridPoint(shape, "bf16", _PEERS) for shape in (heads or HEADS).values()]


def others(heads: dict[str, Shape] | None = None) -> list[GridPoint]:
    """Other labelled shares, rows, losses and dtypes; as `telling`."""
    llama, gemma, _ = (heads or HEADS).values()
    found = [GridPoint(replace(llama, labelled=share), "bf16", _FEW) for share in (0.25, 1.0)]
    found += [
        GridPoint(replace(llama, sequences=sequences), "bf16", _FEW)
        for sequences in (max(2, llama.sequences // 4), 4 * llama.sequences)
    ]
    found.append(GridPoint(llama, "bf16", _OTHER_LOSSES))
    found += [GridPoint(replace(gemma, labelled=share), "bf16", _FEW) for share in (0.25, 1.0)]
    found.append(GridPoint(replace(llama, sequences=2), "fp32", _FEW))
    return found


def units_of(points: Sequence[GridPoint]) -> list[Unit]:
    """A unit for each candidate, the first candidates of all points first."""
    longest = max(len(point.candidates) for point in points)
    return [
        _unit(point, point.candidates[place])
        for place in range(longest)
        for point in points
        if place < len(point.candidates)
    ]


def _unit(point: GridPoint, candidate: Candidate) -> Unit:
    modules = ("trl.kernels", "trl.trainer.utils") if candidate.name.startswith("TRL") else ()
    alone = replace(point, candidates=(candidate,))
    measure = partial(measure_alone, alone, DEVICE)
    return Unit("grid", point.row_of(candidate), measure, modules=modules)


def measure_alone(point: GridPoint, device: str, sink: Sink) -> None:
    """A point beside P and float64 alone, for a process of its own."""
    Loop(sink, device, passes=(Pass(5.0),), say=lambda text: None).measure([point])


def trainer_units() -> list[Unit]:
    """A unit for each trainer and setup; the eager one, beside which all are timed, comes last."""
    names = sorted(EVERYWHERE, key=lambda name: name == EAGER)
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
