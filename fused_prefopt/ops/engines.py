"""Which engines there are and which one a call gets; an engine is imported when first chosen."""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from functools import cache
from typing import TYPE_CHECKING

import torch

from fused_prefopt.checks import require_choice
from fused_prefopt.ops.plan import PATHS

if TYPE_CHECKING:
    from fused_prefopt.ops.torch_engine import TorchEngine

ENGINES = ("torch", "cublas", "triton")
_OLDEST_TRITON = "3.4"


def load_engine(name: str) -> type[TorchEngine]:
    """The class of an engine."""
    if name == "cublas":
        from fused_prefopt.ops.cublas_engine import CublasEngine

        return CublasEngine
    if name == "triton":
        from fused_prefopt.ops.triton_engine import TritonEngine

        return TritonEngine
    from fused_prefopt.ops.torch_engine import TorchEngine

    return TorchEngine


def choose_engines(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Path → engine that `auto` stands for, or that is asked for and can run here.

    Without a Triton that is new enough everything runs on the torch engine, with one warning.

    Args:
        name: `auto`, `torch`, `cublas` (matmuls of the library, Triton for the rest) or `triton`
            (matmuls inside the kernels).
        device: of the tensors.
        dtype: that matmuls compute in.

    Raises:
        ValueError: there is no such engine, or it cannot run on this device or dtype.
    """
    require_choice("engine", name, ("auto", *ENGINES))
    if name == "torch":
        return _everywhere("torch")
    if name == "auto":
        if device.type != "cuda" or dtype == torch.float64:
            return _everywhere("torch")
        return _fastest(device.index) if triton_is_usable() else _everywhere("torch")
    if dtype == torch.float64:
        raise ValueError(f"engine: {name!r} computes in fp32 at most, got float64")
    if not triton_is_usable():
        return _everywhere("torch")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"engine: {name!r} takes CPU tensors under TRITON_INTERPRET=1 only")
    return _everywhere(name)


def takes_kernels(engine: str, device: torch.device) -> bool:
    """Whether an engine's name stands for Triton kernels on this device, for fp32 log-probs."""
    return choose_engines(engine, device, torch.float32)["evaluate"] != "torch"


def triton_is_usable() -> bool:
    """Whether Triton is installed and new enough; warns, once, where it is not."""
    if MISSING_TRITON is not None:
        _warn_once(f"{MISSING_TRITON}; the torch engine stands in for it")
    return MISSING_TRITON is None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def missing_triton() -> str | None:
    """What is wrong with Triton here, or None."""
    try:
        # Not `import triton`: that takes a second, and most calls on a CPU never need it.
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return f"Triton is not installed (wanted {_OLDEST_TRITON} or newer)"
    parts, oldest = found.split(".")[:2], _OLDEST_TRITON.split(".")
    if [int(part) for part in parts] < [int(part) for part in oldest]:
        return f"Triton {found} is too old (wanted {_OLDEST_TRITON} or newer)"
    return None


MISSING_TRITON = missing_triton()


def _fastest(index: int | None) -> dict[str, str]:
    """What the architecture's table says; the torch engine on GPUs older than all of it."""
    from fused_prefopt.kernels.architectures import ARCHITECTURES, architecture

    capability = torch.cuda.get_device_capability(index)
    if capability < ARCHITECTURES[0].capability:
        return _everywhere("torch")
    return architecture(capability).engines


def _everywhere(engine: str) -> dict[str, str]:
    return dict.fromkeys(PATHS, engine)
