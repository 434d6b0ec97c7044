"""Argument checks whose messages name the argument, what it was, and what was wanted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def require_shape(name: str, value: Tensor, wanted: Sequence[int | str]) -> None:
    """Raise ValueError unless `value` has the wanted shape; a string stands for any size."""
    got = tuple(value.shape)
    fits = len(got) == len(wanted) and all(
        isinstance(want, str) or have == want for have, want in zip(got, wanted, strict=True)
    )
    if not fits:
        shape = ", ".join(str(size) for size in wanted)
        raise ValueError(f"{name}: got shape {got}, wanted ({shape})")


def require_floating(name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise ValueError(f"{name}: got dtype {value.dtype}, wanted a floating-point dtype")


def require_integer(name: str, value: Tensor) -> None:
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name}: got dtype {value.dtype}, wanted an integer dtype")


def require_device(name: str, value: Tensor, wanted: torch.device) -> None:
    if value.device != wanted:
        raise ValueError(f"{name}: got device {value.device}, wanted {wanted}")


def require_choice(name: str, value: str, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, choices))}")
