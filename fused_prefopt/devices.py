"""GPUs: which is the current one, and what each is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

_NOTHING: AbstractContextManager[Any] = nullcontext()


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one inside, as torch's own operations do.

    With a model spread over several GPUs (``device_map="auto"``) the head may be on another than
    the current one: launched there, a kernel would run beside the stream that its tensors wait on.

    Args:
        device: of the tensors; the CPU has nothing to make current.
    """
    # Without CUDA at work the tensors are stand-ins without values.
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return _NOTHING
    return torch.cuda.device(device)


def gpu_index(device: torch.device) -> int:
    """The number of a GPU, the current one's where the device has none."""
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def gpu_properties(index: int) -> Any:
    """Properties of a GPU, asked once: to ask takes longer than to plan a call."""
    return torch.cuda.get_device_properties(index)
