"""A process for each unit of work: what ends or breaks it ends nothing else, and is the status of
the unit's row, which is on disk before the next unit begins."""

from __future__ import annotations

import importlib
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.accuracy import failure
from benchmarks.results import NO_TIME, Results, Row, Sink

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
    """What is known of a row's time, for people."""
    if row.get("in_p") is not None:
        return f", {row['ms']:.1f} ms, {row['in_p']:.2f} P"
    return f", {row['ms']:.0f} ms" if row.get("ms") is not None else ""
