"""A fresh process that measures the resident memory of one step, and may not take the machine's.

It is forked from a server that has imported the peers and has run nothing else.
"""

from __future__ import annotations

import multiprocessing
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_PRELOADED = (
    "benchmarks.peers",
    "cut_cross_entropy",
    "liger_kernel.chunked_loss",
    "trl.kernels",
    "trl.trainer.utils",
)
Answer = TypeVar("Answer")


def in_child(function: Callable[..., Answer], *arguments: Any, limit: int | None = None) -> Answer:
    """What a function returns in a process of its own, with as many threads as this one has.

    Args:
        function: of a module, so that the process finds it.
        *arguments: its arguments, copied to the process.
        limit: bytes of data that the process may have; more fails there as an allocation.

    Raises:
        ChildProcessError: the process ended before it answered.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
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
