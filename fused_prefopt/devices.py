"""Which GPU is the current one: Triton launches on it, wherever the tensors are."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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
