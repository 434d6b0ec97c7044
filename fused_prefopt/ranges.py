"""Range checks of hyperparameters; each message names the hyperparameter and what was wanted."""

from __future__ import annotations

import math
from numbers import Real


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
