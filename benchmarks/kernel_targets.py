"""What kernels are compiled for, and what a case is handed to launch them with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fused_prefopt.kernels.architectures import ARCHITECTURES, Architecture, architecture

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPERANDS = tuple(DTYPES)
# For kernels that see none of the model's tensors.
STATISTICS = ("fp32",)


@dataclass(frozen=True)
class Target:
    """What kernels are compiled for.

    Attributes:
        gpu: as Triton names it.
        architecture: the tile shapes, and the shared memory that a program may take.
        gated: whether a spill, or too much shared memory, fails the build.
    """

    gpu: GPUTarget
    architecture: Architecture
    gated: bool = True


def _nvidia(entry: Architecture) -> Target:
    major, minor = entry.capability
    return Target(GPUTarget("cuda", 10 * major + minor, 32), entry)


_BY_NAME = {entry.name: entry for entry in ARCHITECTURES}
TARGETS = {name: _nvidia(_BY_NAME[name]) for name in ("sm_80", "sm_90")}
TARGETS["gfx942"] = Target(
    GPUTarget("hip", "gfx942", 64), replace(architecture((9, 4), hip=True), name="gfx942")
)


@dataclass(frozen=True)
class Setting:
    """The architecture and the dtype of a launch, and tensors without storage for it."""

    architecture: Architecture
    dtype: torch.dtype

    def tiles(self, rich: bool) -> dict[str, Any]:
        """How a matmul kernel works: its tile's shape, and how it loads."""
        block = self.architecture.block(self.dtype.itemsize, rich)
        return {"block": block, "descriptors": self.architecture.descriptors}

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Of `dtype`, or the setting's."""
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def floats(self, *shape: int) -> Tensor:
        return self.new(*shape, dtype=torch.float32)

    def indices(self, rows: int) -> Tensor:
        return self.new(rows, dtype=torch.int64)


@dataclass(frozen=True)
class Case:
    """One way to launch.

    Attributes:
        launch: calls a launcher.
        dtypes: those of the operands that it is launched with.
        default: it happens without being asked for, so that a spill fails the build; otherwise
            it is a limit, only shown.
    """

    launch: Callable[[Setting], object]
    dtypes: tuple[str, ...] = OPERANDS
    default: bool = True
