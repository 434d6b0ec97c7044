"""Argument checks whose messages name the argument, what it was, and what was wanted."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor

# What to do about a loss or gradient that is not finite.
ON_NONFINITE = ("stop", "skip", "ignore")
_HOSTS = ("cpu",)


def is_on_host(value: Tensor) -> bool:
    """Whether Python can look at a tensor's values without waiting for a device."""
    return value.device.type in _HOSTS


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
    """Raise ValueError, with the closest choices, unless `value` is one of them."""
    choices = tuple(choices)
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name}: got {value!r}{closest(value, choices)}, wanted one of {listed}")


def closest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean …?)"` with the known names closest to a wrong one, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def require_number(
    name: str,
    value: float,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
    below: bool = False,
) -> None:
    """Raise ValueError unless `value` is a finite number with ``low <= value <= high``.

    Args:
        name: the hyperparameter, for the message.
        value: what was passed.
        low: smallest value allowed.
        high: largest value allowed.
        above: `value` must be greater than `low`, not equal to it.
        below: `value` must be smaller than `high`, not equal to it.

    Raises:
        ValueError: `value` is not such a number.
    """
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if number and low <= value <= high:
        if not (above and value == low) and not (below and value == high):
            return
    bounds = []
    if low > -math.inf:
        bounds.append(f"{'>' if above else '>='} {low:g}")
    if high < math.inf:
        bounds.append(f"{'<' if below else '<='} {high:g}")
    wanted = f"a finite number {' and '.join(bounds)}".rstrip()
    raise ValueError(f"{name}: got {value!r}, wanted {wanted}")


def require_count(name: str, value: int, *, low: int = 0) -> None:
    """Raise ValueError unless `value` is an integer that is at least `low`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}: got {value!r}, wanted an integer >= {low}")


def require_tokens(name: str, ids: Tensor, vocab_size: int | None) -> None:
    """Raise ValueError unless all token ids are at least 0 and below `vocab_size`.

    Args:
        name: of the ids, for the message.
        ids: on CPU: on another device the check would wait for it.
        vocab_size: rows of the input embedding; None sets no upper bound.

    Raises:
        ValueError: a token id is outside; the message has it and the bound.
    """
    if not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        bound = "" if vocab_size is None else f" and below the {vocab_size} of the model"
        raise ValueError(
            f"{name}: got token id {low if low < 0 else high}, needs ids of at least 0{bound}; is"
            " the tokenizer another model's?"
        )
