"""Argument checks whose messages name the argument, what it was, and what was wanted."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

# What to do about a loss or gradient that is not finite.
ON_NONFINITE = ("stop", "skip", "ignore")
_HOSTS = ("cpu",)
_COMPILED = (
    "fused_prefopt: labels, num_labels or sequence_ids do not fit this call (a label outside the"
    " vocabulary, or another number of labelled rows); call it without torch.compile to be told"
)


def is_on_host(value: Tensor) -> bool:
    """Whether Python can look at a tensor's values without waiting for a device."""
    return value.device.type in _HOSTS


def require(condition: Tensor, message: Callable[[], str]) -> None:
    """Raise ValueError on CPU, or a device-side assert without a host sync elsewhere.

    Args:
        condition: 0-d bool.
        message: begins with the argument's name. A compiled call does not tell it: with a number
            of the call in it, every call would be compiled anew.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(condition, _COMPILED)
    elif not is_on_host(condition):
        torch._assert_async(condition, message())
    elif not bool(condition):
        raise ValueError(message())


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
    close = difflib.get_close_matches(str(name), list(known), n=3)
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


def require_switches(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError unless options with a bool as default are given one.

    Any value would be taken for one of the two: YAML's `no` is a text, and true.

    Args:
        given: values by name.
        defaults: defaults by name.

    Raises:
        ValueError: such an option got something else.
    """
    for name, value in given.items():
        if isinstance(defaults[name], bool) and not isinstance(value, bool):
            raise ValueError(f"{name}: got {value!r}, wanted True or False")


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


# Package → the oldest version that what needs it runs on.
OLDEST = {"trl": "1.9", "axolotl": "0.19", "llamafactory": "0.9.5", "swift": "4.6"}
# Package → its name where it is installed from, if that is another.
_INSTALLED_AS = {"swift": "ms-swift"}
# Package → what installs it.
_INSTALLS = {
    "transformers": 'pip install "fused-prefopt[trainers]"',
    "accelerate": 'pip install "fused-prefopt[trainers]"',
    "datasets": 'pip install "fused-prefopt[trainers]"',
    "tokenizers": 'pip install "fused-prefopt[trainers]"',
    "omegaconf": 'pip install "fused-prefopt[trainers]"',
    "safetensors": 'pip install "fused-prefopt[trainers]"',
    "matplotlib": 'pip install "fused-prefopt[plots]"',
    "peft": 'pip install "peft>=0.17"',
    "swift": f'pip install "ms-swift>={OLDEST["swift"]}"',
    "trl": f'pip install "fused-prefopt[trainers]" "trl>={OLDEST["trl"]}"',
    "axolotl": f'pip install "axolotl>={OLDEST["axolotl"]}"',
    "llamafactory": f"pip install llamafactory=={OLDEST['llamafactory']}",
}


def require_packages(who: str, *packages: str) -> None:
    """Raise ImportError, saying what to install, unless all the packages are there.

    Args:
        who: what needs them, for the message.
        *packages: names to import.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        commands = " and ".join(dict.fromkeys(_INSTALLS[name] for name in missing))
        raise ImportError(f"{who} needs {', '.join(missing)}: {commands}")


def require_version(package: str) -> None:
    """Raise ImportError, with what does, if the installed version is older than `OLDEST`."""
    try:
        found = version(_INSTALLED_AS.get(package, package))
    except PackageNotFoundError:  # or a checkout without metadata
        return
    oldest = OLDEST[package]
    if TorchVersion(found) < oldest:
        raise ImportError(f"{package}: got {found}, wanted {oldest} or newer: {_INSTALLS[package]}")
