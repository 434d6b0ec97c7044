"""The machines that run the Triton kernels of a test: one body, three of them.

* Triton's interpreter, tests marked `interpreted`: `TRITON_INTERPRET=1 pytest -m interpreted`.
* The code that Triton compiles for a GPU, executed by `emulator`, tests marked `executed`: an
  ordinary run, in bf16, on the tiles of the architecture.
* The same for every target, `EMULATE=gpus pytest -m executed`, or in every dtype too and with warps
  in other orders, `EMULATE=all`.

What differs between them are the dtypes, shapes and tolerances here, not the tests' bodies.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pytest
import torch

from fused_prefopt import kernels, ops
from fused_prefopt.kernels.architectures import ARCHITECTURES
from fused_prefopt.ops import cutting, engines, plan

if TYPE_CHECKING:
    from emulator import CutOff

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATE = os.environ.get("EMULATE", "")
if EMULATE not in ("", "gpus", "all"):
    raise ValueError(f"EMULATE: got {EMULATE!r}, wanted gpus, all or nothing")
EVERYTHING = EMULATE == "all"

T = TypeVar("T")


def per_machine(interpreted: T, executed: T) -> T:
    """What a test is given where kernels are interpreted, and where compiled ones are executed."""
    return interpreted if INTERPRETED else executed


def dtypes(*interpreted: torch.dtype) -> list[torch.dtype]:
    """Those of the interpreter, which multiplies no bf16 tiles, or those of a GPU's operands."""
    others = [torch.float16, torch.float32] if EVERYTHING else []
    return per_machine(list(interpreted), [torch.bfloat16, *others])


# Those whose matmuls are made of unlike instructions: sm_80's, and descriptors and wgmma.
TARGETS = ("sm_80", "sm_90")
# Half a unit in the last place, relative: what one rounding to the dtype may take. The interpreter
# cuts off what bf16 cannot hold, where a GPU rounds: twice the error.
UNIT = {
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: per_machine(2.0**-7, 2.0**-8),
}
# Gradients that are rounded once to their dtype, relative (Frobenius).
ROUNDED_ONCE = {
    torch.float32: 1e-5,
    torch.float16: per_machine(2e-3, 1e-3),
    torch.bfloat16: per_machine(8e-3, 4e-3),
}
# Of the whole op at |logit| <= 30: log-probs in nats, and gradients, relative (Frobenius).
OP = {
    torch.float32: (1e-5, 3e-6),
    torch.float16: (1e-5, 1e-3),
    torch.bfloat16: (1e-5, per_machine(8e-3, 4e-3)),
}
# Few entries do not average what the gradient of the logits and a matmul of it are rounded by.
OP_OF_FEW = OP | {torch.bfloat16: (1e-5, 8e-3)}
# Sequences, length, hidden size, vocabulary: of small tiles several; of a GPU's less than one, more
# than one, and rows that are not whole 16 bytes.
SIZES = per_machine([(3, 13, 24, 101)], [(3, 13, 24, 101), (3, 90, 136, 611), (4, 61, 77, 411)])


@dataclass(frozen=True)
class Machine:
    """A GPU to compile for, and how its warps follow each other.

    Attributes:
        target: name of one of `ARCHITECTURES`.
        order: None in lock step, or of `emulated`.
        cut_off: how tensor cores add, the library's too; None for exact sums.
    """

    target: str
    order: str | None = None
    cut_off: CutOff | None = None

    def __str__(self) -> str:
        cut_off = None if self.cut_off is None else "cut-off"
        return "-".join(filter(None, (self.target, self.order, cut_off)))


MACHINES = [
    *(Machine("sm_80", order) for order in (None, "random", "up", "down")),
    *(Machine("sm_90", order) for order in (None, "random")),
]


# Numbers that every warp of a program reads and a single thread writes, which has read its own
# before: what the others then find is never used. By file, as their pointers are written there.
OWN_NUMBERS = {
    "fold_logits.py": ("reference + row",),
    "fold_rows.py": (
        *("maximum + row", "total + row", "earlier + columns", "sums + columns"),
        # The slab itself where its exponentials are kept in place.
        *("products + columns", "kept + columns"),
    ),
    "kl.py": ("load(maximum)", "(maximum,", "(total,", "weighted + row"),
    "loss_parts.py": ("(nonfinite,",),
}


def is_harmless(race: str) -> bool:
    """Whether a race is about one of `OWN_NUMBERS`."""
    kinds = "global bytes another warp (may still read|has written, no barrier)"
    found = re.search(rf"^{kinds}: .*\[(?P<file>\w+\.py):(?P<line>\d+):\d+\]$", race)
    if found is None:
        return False
    source = Path(kernels.__path__[0], found["file"]).read_text(encoding="utf-8")
    last = int(found["line"])
    # A load is two lines of assembly, which LLVM counts on from its own.
    lines = source.splitlines()[last - 1 - (": ld." in race) : last]
    pointers = OWN_NUMBERS.get(found["file"], ())
    return any(pointer in line for pointer in pointers for line in lines)


def machines_of(marker: pytest.Mark) -> list[Machine]:
    """Those that a test with this marker runs on, `executed(targets=…)`."""
    if EVERYTHING:
        return MACHINES
    targets = TARGETS if EMULATE == "gpus" else marker.kwargs.get("targets", ("sm_80",))
    return [Machine(target) for target in targets]


def forget_plans() -> None:
    """What has been planned for a shape is not planned again, though a test may have changed it."""
    for known in (*vars(cutting.GpuPass).values(), *vars(plan).values()):
        if hasattr(known, "cache_clear"):
            known.cache_clear()


def compute_as_a_gpu(monkeypatch: pytest.MonkeyPatch, cut_off: CutOff | None = None) -> None:
    """Operands in the dtype computed in, library products of them, and kept values in place.

    Args:
        monkeypatch: what undoes it.
        cut_off: how the library's products of 16 bits are added; None for exact sums.
    """
    from fused_prefopt.ops.cublas_engine import CublasEngine
    from fused_prefopt.ops.precision import HeadMath
    from fused_prefopt.ops.torch_engine import product as library_product

    def cut(left, right):
        start = np.zeros((left.shape[0], right.shape[1]), np.float32)
        operands = (each.double().contiguous().numpy() for each in (left, right))
        smallest = torch.finfo(left.dtype).smallest_normal
        return torch.from_numpy(cut_off(*operands, start, smallest)).double()

    def product(left, right, out, *, alpha=1.0, accumulate=False):
        assert left.dtype == right.dtype
        summed = cut_off is not None and left.dtype != torch.float32
        total = alpha * (cut(left, right) if summed else left.double() @ right.double())
        return out.copy_(out.double() + total if accumulate else total)

    for found in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
        module = importlib.import_module(found.name)
        # The torch engine, which defines it, keeps its own.
        used = getattr(module, "product", None) is library_product
        if used and found.name != library_product.__module__:
            monkeypatch.setattr(module, "product", product)
    monkeypatch.setattr(HeadMath, "operand", lambda math, device: math.dtype)

    def in_place(math, device):
        return math.kept == math.dtype

    monkeypatch.setattr(CublasEngine, "in_place", staticmethod(in_place))


@contextmanager
def executing(machine: Machine) -> Iterator[None]:
    """Within the block, what is launched is compiled for a machine's GPU and executed.

    Engines take CPU tensors as they take a GPU's.

    Args:
        machine: to execute on.

    Raises:
        AssertionError: nothing was launched, shared memory was read that nothing had written, or
            races were found that are not `is_harmless`.
    """
    from emulator import emulated

    from fused_prefopt.ops import tuning

    (architecture,) = (found for found in ARCHITECTURES if found.name == machine.target)
    forget_plans()
    with pytest.MonkeyPatch.context() as monkeypatch:
        compute_as_a_gpu(monkeypatch, machine.cut_off)
        monkeypatch.setattr(engines, "_take_cpu_tensors", lambda: True)
        monkeypatch.setattr(tuning, "_INTERPRETER", architecture)
        with emulated(machine.target, order=machine.order, cut_off=machine.cut_off) as log:
            yield
    forget_plans()
    assert log.launches, "no kernel was launched: this test executes nothing"
    found = {race for race in log.races if not is_harmless(race)}
    found |= {f"read, and never written: {one}" for one in log.unwritten}
    assert not found, "\n".join(sorted(found))
