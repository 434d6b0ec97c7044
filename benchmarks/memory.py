"""Extra peak memory: what a step needs on top of its inputs and of the gradients it delivers.

``extra = peak during the step − before it (inputs alive, gradients dropped) − its gradients``.
On CPU it is the resident memory of a fresh child process that runs nothing else, forked from a
server that has imported the peers. The step has run once on a tiny shape, so that libraries are
loaded (a candidate that compiles: on the same shape). Freed blocks go back to the system at once
there, so resident memory follows the live tensors.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import resource
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.candidates import CANDIDATES, Candidate, step
from benchmarks.results import failure
from benchmarks.shapes import DTYPES, TINY, Problem, Shape, make_problem

# glibc's names for what `mallopt` sets.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4


def keep_freed_memory() -> None:
    """From now on let glibc keep what this process frees, as the CUDA allocator does.

    By default it hands large blocks back to the system, and every step faults their pages in anew:
    for 250 MiB that can take as long as a whole P.
    """
    _mallopt(_MMAP_MAX, 0)
    _mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """From now on let glibc return freed blocks at once, so that resident memory is live memory."""
    _mallopt(_MMAP_THRESHOLD, 2**16)


def _mallopt(option: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(option, value)


_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_PRELOADED = (
    "benchmarks.candidates",
    "cut_cross_entropy",
    "liger_kernel.chunked_loss",
    "trl.kernels",
    "trl.trainer.utils",
)
Answer = TypeVar("Answer")


def in_child(
    function: Callable[..., Answer],
    *arguments: Any,
    limit: int | None = None,
    libraries: Sequence[str] = (),
) -> Answer:
    """The result of a function in a process of its own, with as many threads as this one has.

    Args:
        function: of a module, so that the process finds it.
        *arguments: its arguments, copied to the process.
        limit: bytes of data that the process may have; more fails there as an allocation.
        libraries: what it needs beside the peers, which the first call alone loads for all.

    Raises:
        ChildProcessError: the process ended before it answered.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOADED, *libraries])
    receiver, sender = context.Pipe(duplex=False)
    threads = torch.get_num_threads()
    child = context.Process(target=_answer, args=(sender, function, arguments, threads, limit))
    child.start()
    sender.close()
    try:
        answer: Answer = receiver.recv()
    except EOFError:
        child.join()
        raise ChildProcessError(f"process ended with code {child.exitcode}") from None
    child.join()
    return answer


def _answer(
    sender: Any,
    function: Callable[..., object],
    arguments: tuple[Any, ...],
    threads: int,
    limit: int | None,
) -> None:
    # What peers warn of (deprecations, compile fallbacks) would bury the progress.
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    sender.send(function(*arguments))


def start_peak() -> int:
    """Set the peak back to what is resident now, where the system can, and return the latter."""
    # Only here: on CUDA the allocator is asked, and a GPU machine may lack it.
    import psutil

    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        pass
    resident: int = psutil.Process().memory_info().rss
    return resident


def peak() -> int:
    """The most bytes that were resident since `start_peak`."""
    try:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_peak(run: Callable[[], object]) -> int:
    """Bytes that were resident during a call beyond those before it."""
    gc.collect()
    before = start_peak()
    run()
    return peak() - before


def allocated_peak(run: Callable[[], object]) -> int:
    """Bytes of CUDA that were allocated during a call beyond those before it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class Memory:
    """Bytes of one step.

    Attributes:
        extra: peak beyond the inputs and the gradients, None where it could not be measured.
        gradients: of the gradients that the step leaves.
        status: "ok", or why there is no figure.
    """

    extra: int | None
    gradients: int | None
    status: str


MemoryOf = Callable[[Candidate, Problem, str], Memory]


def memory_here(candidate: Candidate, problem: Problem, dtype: str) -> Memory:
    """By the allocator on CUDA, of a child process on CPU."""
    if problem.hidden.is_cuda:
        return _cuda_memory(candidate, problem)
    return peak_memory(candidate, problem.shape, dtype)


def not_measured(candidate: Candidate, problem: Problem, dtype: str) -> Memory:
    """In the place of a memory that other points show already."""
    return Memory(None, None, "not measured")


def peak_memory(candidate: Candidate, shape: Shape, dtype: str) -> Memory:
    """Measure one candidate on a CPU; it is skipped where its logits would not fit free memory."""
    # Only here: on CUDA the allocator is asked, and a GPU machine may lack it.
    import psutil

    needed = candidate.logits_copies * 4 * shape.rows * shape.vocab
    free = psutil.virtual_memory().available
    if needed > 0.8 * free:
        gib = 2**30
        return Memory(None, None, f"skipped: needs {needed / gib:.0f} of {free / gib:.0f} GiB free")

    try:
        return in_child(_in_child, candidate.name, shape, dtype)
    except ChildProcessError as error:
        return Memory(None, None, f"failed: {error}")


def _in_child(name: str, shape: Shape, dtype: str) -> Memory:
    return_freed_memory()
    candidate = CANDIDATES[name]
    try:
        step(candidate, make_problem(shape if candidate.compiles else TINY, DTYPES[dtype]))
        problem = make_problem(shape, DTYPES[dtype])
        extra = resident_peak(lambda: step(candidate, problem)) - problem.gradient_bytes
    except Exception as error:
        return Memory(None, None, failure(error))
    return Memory(extra, problem.gradient_bytes, "ok")


def _cuda_memory(candidate: Candidate, problem: Problem) -> Memory:
    """After a step that has compiled and loaded what there is."""
    try:
        step(candidate, problem)
        problem.clear()
        extra = allocated_peak(lambda: step(candidate, problem)) - problem.gradient_bytes
    except Exception as error:
        return Memory(None, None, failure(error))
    return Memory(extra, problem.gradient_bytes, "ok")
