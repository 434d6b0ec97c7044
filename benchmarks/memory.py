"""Extra peak memory: what a step needs on top of its inputs and of the gradients it delivers.

``extra = peak during the step − before it (inputs alive, gradients dropped) − its gradients``.
On CPU it is the resident memory of a fresh child process that runs nothing else. The step has run
once on a tiny shape, so that libraries are loaded (a candidate that compiles: on the same shape).
Freed blocks go back to the system at once there, so resident memory follows the live tensors.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

from benchmarks.accuracy import failure
from benchmarks.child import in_child, peak, start_peak
from benchmarks.malloc import return_freed_memory
from benchmarks.peers import CANDIDATES, Candidate, step
from benchmarks.shapes import DTYPES, TINY, Problem, Shape, make_problem


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


def peak_memory(candidate: Candidate, shape: Shape, dtype: str, device: str = "cpu") -> Memory:
    """Measure one candidate; it is skipped where its logits would not fit the free memory."""
    if device == "cuda":
        return cuda_memory(candidate, make_problem(shape, DTYPES[dtype], device))
    # Only here: on CUDA the allocator is asked, and a GPU machine may lack it.
    import psutil

    needed = candidate.logits_copies * 4 * shape.rows * shape.vocab
    free = psutil.virtual_memory().available
    if needed > 0.8 * free:
        gib = 2**30
        return Memory(None, None, f"skipped: needs {needed / gib:.0f} of {free / gib:.0f} GiB free")

    try:
        return in_child(_measure, candidate.name, shape, dtype)
    except ChildProcessError as error:
        return Memory(None, None, f"failed: {error}")


def _measure(name: str, shape: Shape, dtype: str) -> Memory:
    return_freed_memory()
    candidate = CANDIDATES[name]
    try:
        step(candidate, make_problem(shape if candidate.compiles else TINY, DTYPES[dtype]))
        problem = make_problem(shape, DTYPES[dtype])
        gc.collect()
        before = start_peak()
        step(candidate, problem)
        extra = peak() - before - problem.gradient_bytes
    except Exception as error:
        return Memory(None, None, failure(error))
    return Memory(extra, problem.gradient_bytes, "ok")


def cuda_memory(candidate: Candidate, problem: Problem) -> Memory:
    """By the allocator, after a step that has compiled and loaded what there is."""
    try:
        step(candidate, problem)
        problem.clear()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(candidate, problem)
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - problem.gradient_bytes
    except Exception as error:
        return Memory(None, None, failure(error))
    return Memory(extra, problem.gradient_bytes, "ok")
