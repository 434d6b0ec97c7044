"""A plugin of pytest for TRL's tests: helpers that they miss, processors, no GPU kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoProcessor
from trl import import_utils
from trl_image_stand_ins import NAMES, processor_of


def pytest_configure() -> None:
    """Optional packages that TRL no longer asks for count as not installed."""

    def missing(name: str) -> Callable[[], bool]:
        if name.startswith("is_") and name.endswith("_available"):
            return lambda: False
        raise AttributeError(name)

    import_utils.__getattr__ = missing  # type: ignore[attr-defined]
    if not torch.cuda.is_available():
        # Liger's kernels fail there, and the models that it has changed with them.
        import_utils.is_liger_kernel_available = lambda: False
    load = AutoProcessor.from_pretrained

    def ready_made(name: str, *args: Any, **options: Any) -> Any:
        return processor_of(NAMES[name]) if name in NAMES else load(name, *args, **options)

    AutoProcessor.from_pretrained = ready_made
