"""Engines by name: which one a call gets; each is imported when first chosen."""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from functools import cache
from typing import TYPE_CHECKING

import torch

from fused_prefopt.checks import require_choice
from fused_prefopt.devices import gpu_index, gpu_properties

if TYPE_CHECKING:
    from fused_prefopt.ops.torch_engine import TorchEngine

ENGINES = ("torch", "cublas", "triton")
# What is asked of an engine: fold a tile's logits into statistics; the same and keep their
# exponentials; the same and weigh the head's rows by them; the same and more statistics; turn what
# was kept into its gradient; build logits again for theirs; the same with entropies' gradient; both
# passes over a policy's logits beside a reference's.
ROLES = ("fold", "keep", "weigh", "details", "kept", "rebuild", "entropy", "kl")
# The only kernel that has these sums; in a matmul's epilogue entropies and two heads take too many
# registers.
_ONLY = {"details": "triton", "entropy": "cublas", "kl": "cublas"}
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


def choose_engine(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The engine of a device: one of `ENGINES`, or `auto` where `role_engine` chooses.

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
        return "torch"
    if name == "auto":
        if device.type != "cuda" or dtype == torch.float64 or not triton_is_usable():
            return "torch"
        return "auto" if _has_kernels(gpu_index(device)) else "torch"
    if dtype == torch.float64:
        raise ValueError(f"engine: {name!r} computes in fp32 at most, got float64")
    if not triton_is_usable():
        return "torch"
    if device.type == "cpu" and not _take_cpu_tensors():
        raise ValueError(f"engine: {name!r} takes CPU tensors under TRITON_INTERPRET=1 only")
    return name


def _take_cpu_tensors() -> bool:
    """Whether kernels run without a GPU in this process: in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def role_engine(name: str, role: str, device: torch.device, hidden_size: int, bent: bool) -> str:
    """Engine of a part of a pass over a head: the choice of `auto`, or the one named.

    Args:
        name: of `choose_engine`.
        role: one of `ROLES`.
        device: of the tensors.
        hidden_size: D: the fewer sums a logit takes, the more its way through memory costs.
        bent: whether the head has a softcap, which takes a fused kernel's registers.
    """
    if role in _ONLY and name != "torch":
        return _ONLY[role]
    if name != "auto":
        return name
    if role == "kept":
        role = "keep"  # what was kept is as its engine has left it
    from fused_prefopt.ops.tuning import tuning_of

    return tuning_of(device).architecture.engine(role, hidden_size, bent)


def takes_kernels(engine: str, device: torch.device) -> bool:
    """Whether an engine's name stands for Triton kernels on this device, for fp32 log-probs."""
    return choose_engine(engine, device, torch.float32) != "torch"


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 where a tile is as good as another."""
    if device.type != "cuda":
        return 1
    return int(gpu_properties(gpu_index(device)).multi_processor_count)


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory, or None elsewhere."""
    if device.type != "cuda":
        return None
    return int(gpu_properties(gpu_index(device)).total_memory)


def triton_is_usable() -> bool:
    """Whether Triton is installed and new enough; warns, once, where it is not."""
    if MISSING_TRITON is not None:
        _warn_once(f"{MISSING_TRITON}; the torch engine stands in for it")
    return MISSING_TRITON is None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def missing_triton() -> str | None:
    """Why Triton cannot be used here, or None."""
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


@cache
def _has_kernels(index: int) -> bool:
    """Whether there are tile shapes for a GPU."""
    from fused_prefopt.ops.tuning import architecture_of

    try:
        architecture_of(gpu_properties(index))
    except ValueError:
        return False
    return True
