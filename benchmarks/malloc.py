"""What glibc's malloc does with large blocks that this process frees; nothing elsewhere."""

from __future__ import annotations

import ctypes

# glibc's names for what `mallopt` sets.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4


def keep_freed_memory() -> None:
    """From now on let glibc keep what this process frees, as the CUDA allocator does.

    By default it hands large blocks back to the system, and every step faults their pages in anew:
    for 250 MiB that can take as long as a whole P.
    """
    _mallopt(_MMAP_MAX, 0)
    _mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """From now on let glibc return freed blocks at once, so that resident memory is live memory."""
    _mallopt(_MMAP_THRESHOLD, 2**16)


def _mallopt(option: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(option, value)
