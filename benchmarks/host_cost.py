"""What the host's own code takes of a step: the real code on a CPU, its kernels and matmuls mocked.

Rows have one entry, and the planner is told the real hidden size. What is left is the Python that
plans, makes views and launches, on one core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from statistics import median
from time import thread_time
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.machines import Machine
from benchmarks.recording import Event, gpu_answers
from fused_prefopt import checks
from fused_prefopt.ops import cublas_engine, head_rows, registered
from fused_prefopt.ops.call import Call
from fused_prefopt.ops.head_math import HeadMath
from fused_prefopt.ops.layout import labelled_rows

_WARM, _ROUNDS = 3, 9


def host_seconds(
    step: Callable[[], object], machine: Machine, hidden_size: int, anchors: list[str]
) -> list[float]:
    """Seconds of the host before each anchor: a kernel's launch, or a matmul into an output.

    The median over several steps: what is searched once for a shape has been found.

    Args:
        step: a forward, and its backward if there is one, on CPU tensors of hidden size 1.
        machine: that is asked for.
        hidden_size: D that the planner is told.
        anchors: their names as a recording has them.

    Raises:
        ValueError: the step has launched something else.
    """
    marks: list[tuple[str, float]] = []
    rounds = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _mocked(machine, hidden_size, lambda name: marks.append((name, thread_time()))):
            for _ in range(_WARM + _ROUNDS):
                marks.clear()
                start = thread_time()
                step()
                times = [start, *(time for _, time in marks)]
                rounds.append([after - before for before, after in pairwise(times)])
    finally:
        torch.set_num_threads(threads)
    if [name for name, _ in marks] != anchors:
        raise ValueError(f"the host launched {len(marks)} times, the recording {len(anchors)}")
    return [median(each) for each in zip(*rounds[_WARM:], strict=True)]


def spread_over(events: list[Event], seconds: list[float]) -> list[float]:
    """The same for each event: what comes between two anchors is all before the first of them."""
    found, left = [], iter(seconds)
    ahead: list[float] = []
    for event in events:
        ahead.append(0.0)
        if event.anchor:
            ahead[0] += next(left)
            found += ahead
            ahead = []
    return found + ahead


@contextmanager
def _mocked(machine: Machine, hidden_size: int, mark: Callable[[str], None]) -> Iterator[None]:
    """Within the block CPU tensors are treated as a GPU's, and nothing of size is computed."""
    real_addmm, real_mm = torch.addmm, torch.mm
    known: dict[Any, Tensor] = {}

    def matmul(name: str, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*operands: Tensor, out: Tensor | None = None, **options: Any) -> Tensor:
            if out is None:
                return real(*operands, **options)
            mark(name)
            return out

        return call

    def found(targets: Tensor, ignore_index: int, num_labels: int) -> Tensor:
        key = (targets.shape, ignore_index, num_labels)
        if key not in known:
            known[key] = labelled_rows(targets, ignore_index, num_labels)
        return known[key]

    with gpu_answers(machine), ExitStack() as stack:

        def put(target: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(target, name, value))

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
            mark(kernel.__name__)

        put(JITFunction, "run", run)
        put(torch, "mm", matmul("mm", real_mm))
        put(torch, "addmm", matmul("addmm", real_addmm))
        put(checks, "_HOSTS", ())
        put(torch, "_assert_async", lambda *_: None)
        put(registered, "labelled_rows", found)
        for kind in (Call, head_rows.HeadRows):
            put(kind, "hidden_size", hidden_size)
        put(HeadMath, "operand", lambda math, device: math.dtype)
        in_place = staticmethod(lambda math, device: math.kept == math.dtype)
        put(cublas_engine.CublasEngine, "in_place", in_place)
        yield
