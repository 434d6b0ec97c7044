"""Steps on a GPU in a process that may fail, with no more memory than a capacity."""

from __future__ import annotations

import gc
import multiprocessing
import time
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.accuracy import failure
from benchmarks.peers import CANDIDATES, Candidate, ours_with_room, step
from benchmarks.shapes import Shape, make_problem

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
        self._child = context.Process(target=_serve, args=(other,), daemon=True)
        self._child.start()
        other.close()

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.join()
            self._connection.close()
        self._child = None


def _serve(connection: Any) -> None:
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
