"""The longest context whose head fits a GPU: by a model of its memory, and by search on the GPU.

One pair, half of its tokens labelled, in bf16; no backbone: this is where the head stops being what
ends the context. A length is tried by a whole step under the allocator, which may take no more than
the capacity. Steps run in a process of their own, which is replaced after any failure that is not a
lack of memory: such a failure can leave CUDA unusable.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.candidates import CANDIDATES, Candidate, ours_with_room, step
from benchmarks.counts import count
from benchmarks.results import NO_TIME, Results, Row, failure
from benchmarks.shapes import HEADS, Shape, make_problem

CAPACITIES = {"80 GB (A100)": 80 * 10**9, "141 GB (H200)": 141 * 10**9}
COMPARED = (
    "ours: stash",
    "ours: local",
    "ours: recompute",
    "TRL",
    "cut-cross-entropy",
    "Liger",
    "Liger: per token",
    "torch linear_cross_entropy",
    "eager, compiled",
    "eager, labelled rows",
    "eager",
)
_LEAST, _MOST = 16, 2**28


def needed(name: str, shape: Shape) -> int:
    """Bytes of the weight, the hidden states, their gradients and a candidate's extra."""
    counts = count(name, shape, 2)
    if counts is None:
        raise ValueError(f"name: got {name!r}, whose memory is not modelled")
    weight, hidden = shape.vocab * shape.hidden_size, shape.rows * shape.hidden_size
    # A frozen head has no gradient.
    copies = 1 if name == "ours: stash" else 2
    return 2 * (copies * weight + 2 * hidden) + counts.extra


def longest(name: str, head: Shape, capacity: int) -> int:
    """The largest length T of one pair that fits, 0 where none does."""
    low, high = 0, _MOST
    while low < high:
        middle = (low + high + 1) // 2
        shape = replace(head, sequences=2, length=middle, labelled=0.5)
        low, high = (middle, high) if needed(name, shape) <= capacity else (low, middle - 1)
    return low


# A workspace of its own size for `local`, whose probabilities grow with the length.
_LOCAL = replace(CANDIDATES["ours: local"], forward=partial(ours_with_room, "local", "auto"))
SEARCHED: dict[str, Candidate] = {**CANDIDATES, _LOCAL.name: _LOCAL}


class StepFailed(Exception):
    """A step failed for another reason than memory; its text is the status of a row."""


class LengthProber:
    """Whether a candidate's step fits; a context that ends its process.

    Args:
        end: no answer is waited for after this time of `time.monotonic`.
    """

    def __init__(self, end: float) -> None:
        self._end = end
        self._child: Any = None
        self._connection: Any = None

    def __enter__(self) -> LengthProber:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, name: str, shape: Shape, capacity: int) -> bool:
        """Whether a step of a candidate fits.

        Raises:
            StepFailed: the step fails for another reason than memory, or its process ended.
            TimeoutError: there was no answer in time.
        """
        if self._child is None:
            self._start()
        self._connection.send((name, shape, capacity))
        if not self._connection.poll(max(0.0, self._end - time.monotonic())):
            self._stop()
            raise TimeoutError("no answer in time")
        try:
            answer, usable = self._connection.recv()
        except EOFError:
            self._stop()
            raise StepFailed("failed: the process ended") from None
        if not usable:
            self._stop()
        if isinstance(answer, str):
            raise StepFailed(answer)
        fits: bool = answer
        return fits

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._child = context.Process(target=_probe_on, args=(other,), daemon=True)
        self._child.start()
        other.close()

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.join()
            self._connection.close()
        self._child = None


def _probe_on(connection: Any) -> None:
    warnings.simplefilter("ignore")
    while True:
        name, shape, capacity = connection.recv()
        answer = _fits(SEARCHED[name], shape, capacity)
        connection.send((answer, not isinstance(answer, str) or _usable()))


def _fits(candidate: Candidate, shape: Shape, capacity: int) -> bool | str:
    """Whether a step fits, or why it fails otherwise."""
    try:
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, capacity / total))
        step(candidate, make_problem(shape, torch.bfloat16, "cuda"))
        torch.cuda.synchronize()
        answer: bool | str = True
    except torch.OutOfMemoryError:
        answer = False
    except Exception as error:
        answer = failure(error)
    # After the error is gone, whose traceback keeps the step's tensors.
    gc.collect()
    if answer is True or answer is False:
        torch.cuda.empty_cache()
    return answer


def _usable() -> bool:
    """Whether CUDA still works: an illegal access is reported by everything after it."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return False
    return True


# Candidate, shape, capacity → whether it fits.
Fits = Callable[[str, Shape, int], bool]
# A search ends where the shortest length that fails is this much longer than the longest that fits.
PRECISION = 1 / 16


@dataclass(frozen=True)
class Found:
    """The state of a search.

    Attributes:
        fits: the longest length that fits, 0 where none was seen.
        fails: the shortest that does not, None where none was seen.
        probes: lengths that were tried.
    """

    fits: int
    fails: int | None
    probes: int

    @property
    def ended(self) -> bool:
        """Whether the two lengths are as near as they are to be."""
        if self.fails is None:
            return self.fits >= _MOST
        return self.fails <= _LEAST or 0 < self.fails - self.fits <= PRECISION * self.fits


def search(
    fits: Callable[[int], bool | None], start: int, late: Callable[[], bool] = lambda: False
) -> Found:
    """Double from `start` while lengths fit (or halve while none does), then bisect.

    Args:
        fits: whether a length fits, monotone; None ends the search.
        start: the first length.
        late: whether to stop with what is known.
    """
    found, length = Found(0, None, 0), min(max(start, _LEAST), _MOST)
    while not found.ended and not late():
        answer = fits(length)
        if answer is None:
            break
        side = "fits" if answer else "fails"
        found = replace(found, **{side: length}, probes=found.probes + 1)
        if found.fails is None:
            length = min(2 * found.fits, _MOST)
        else:
            length = max(_LEAST, (found.fits + found.fails) // 2)
    return found


@dataclass(frozen=True)
class ContextRun:
    """How contexts are searched for.

    Attributes:
        results: where the rows go.
        seconds: after these no length is tried.
        fits: candidate, shape, capacity → whether a step fits; raises TimeoutError where there is
            no answer in time, StepFailed where the step fails for another reason.
        clock: seconds that go by.
        say: gets a line of progress now and then.
    """

    results: Results
    seconds: float
    fits: Fits
    clock: Callable[[], float] = time.monotonic
    say: Callable[[str], None] = print

    def measure(
        self, heads: Mapping[str, Shape] = HEADS, capacities: Mapping[str, int] = CAPACITIES
    ) -> None:
        """Every candidate, on the first head and the first capacity first."""
        end = self.clock() + self.seconds
        for head in heads.values():
            for capacity in capacities.values():
                for name in COMPARED:
                    about = _about(name, head, capacity)
                    if self.results.done(about):
                        continue
                    row = self._row(about, name, head, capacity, lambda: self.clock() >= end)
                    if row["probes"] or not self.results.holds(about):
                        self.results.put(row)
                    self.say(f"{head.name}, {capacity / 1e9:.0f} GB: {name}: {row['longest']}")

    def _row(
        self, about: Row, name: str, head: Shape, capacity: int, late: Callable[[], bool]
    ) -> Row:
        problems: list[str] = []

        def runs(length: int) -> bool | None:
            shape = replace(head, sequences=2, length=length, labelled=0.5)
            try:
                return self.fits(name, shape, capacity)
            except TimeoutError:
                return None
            except StepFailed as error:
                problems.append(str(error))
                return False

        def fits(length: int) -> bool | None:
            known = len(problems)
            answer = runs(length)
            if len(problems) == 1 > known and not runs(_LEAST):
                # It fails at any length: nothing is to be found.
                return None
            return answer

        predicted = longest(name, head, capacity) if count(name, head, 2) else None
        found = search(fits, (predicted or 2 * _LEAST) * 3 // 4, late)
        status = "ok" if found.ended and found.fits else NO_TIME
        if problems and not found.fits:
            status = problems[-1]
        elif found.fails is not None and found.fails <= _LEAST:
            status = "failed: the shortest length does not fit"
        return {
            **about,
            "longest": found.fits or None,
            "fails_at": found.fails,
            "ended_by": problems[-1] if problems else "memory",
            "probes": found.probes,
            "predicted": predicted,
            "status": status,
        }


def _about(name: str, head: Shape, capacity: int) -> Row:
    """The fields that say what a row is about."""
    return {
        "candidate": name,
        "shape": head.name,
        "sequences": 2,
        "hidden_size": head.hidden_size,
        "vocab": head.vocab,
        "dtype": "bf16",
        "trains": CANDIDATES[name].trains,
        "capacity_bytes": capacity,
    }


def run_contexts(results: Results, seconds: float, say: Callable[[str], None]) -> None:
    """Search on the first GPU."""
    with LengthProber(time.monotonic() + seconds) as prober:
        ContextRun(results, seconds, prober, say=say).measure()
