"""A plugin of pytest for TRL's tests: helpers that their version had, and no kernels on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from trl import import_utils


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
