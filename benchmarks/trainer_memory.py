"""Peak memory of a whole trainer step, beyond the model and the batch.

On CPU it is the resident memory of a fresh child process, as `memory` measures it, in which a
trainer that needs more than `LIMIT` fails instead of the machine.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.accuracy import failure
from benchmarks.child import in_child, peak, start_peak
from benchmarks.malloc import return_freed_memory
from benchmarks.trainer_candidates import Stepper, Taken
from benchmarks.trainer_setups import Setup

LIMIT = 18 * 2**30


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
        return _guarded(_by_allocator, name, setup)
    # Only here: on CUDA the allocator is asked, and a GPU machine may lack it.
    import psutil

    limit = min(LIMIT, int(0.8 * psutil.virtual_memory().available))
    try:
        return in_child(_guarded, _resident, name, setup, limit=limit)
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
    stepper.warm_up()
    gc.collect()
    before = start_peak()
    taken = stepper.step(check=True)
    return StepMemory(peak() - before, stepper.gradient_bytes, taken, "ok")


def _by_allocator(name: str, setup: Setup, folder: Path) -> StepMemory:
    stepper = Stepper(name, setup, folder, "cuda")
    stepper.warm_up()
    # Once as it is measured: kernels are compiled and tuned at the first step of a shape.
    stepper.step()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    taken = stepper.step(check=True)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    return StepMemory(extra, stepper.gradient_bytes, taken, "ok")
