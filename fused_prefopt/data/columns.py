"""Columns of records and features: their names, and checks of what stands in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from fused_prefopt.checks import closest

PAIR = ("chosen", "rejected")
SCORES = ("score_chosen", "score_rejected")
# Names of a single completion's score and label; the first that is there counts.
RATINGS = ("reward", "score", "rating")
LABELS = ("desirable", "label")
# What Python, NumPy and torch raise of values that are no number, or several.
_UNREADABLE = (TypeError, ValueError, OverflowError, RuntimeError)


def require_columns(row: Mapping[str, Any], wanted: Iterable[str], where: str = "") -> None:
    """Raise ValueError naming the missing columns, the closest to them, and those there are.

    Args:
        row: a record or a feature.
        wanted: names of columns.
        where: which row it is, such as `row_at(3)`, to begin the message; "" does not say.

    Raises:
        ValueError: a column is missing.
    """
    missing = [f"{name!r}{closest(name, row)}" for name in wanted if name not in row]
    if missing:
        place = f"{where}: " if where else ""
        raise ValueError(
            f"{place}missing column {', '.join(missing)}; got {', '.join(map(repr, row))}"
        )


def has_values(row: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether a row has all these columns, none of them None."""
    return all(row.get(name) is not None for name in names)


def row_at(index: int) -> str:
    """A record's place as messages name it."""
    return f"row {index} (counted from 0)"


def column_of(rows: Iterable[Mapping[str, Any]], names: Iterable[str]) -> str | None:
    """The first of these columns with a value in any row, or None."""
    rows = list(rows)
    return next((name for name in names if any(row.get(name) is not None for row in rows)), None)


def finite_number(name: str, value: Any, where: str) -> float:
    """A score or a log-prob as a float.

    Args:
        name: of its column.
        value: what stands there; text that spells a number is one.
        where: which row it is, such as `row_at(3)` or "feature 3".

    Raises:
        ValueError: it is no number (a bool is none), NaN or infinite.
    """
    try:
        number = math.nan if _is_bool(value) else float(value)
    except _UNREADABLE:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{name}: got {value!r} in {where}, wanted a finite number; repair the value or drop"
            " the row"
        )
    return number


def whole_number(name: str, value: Any, where: str) -> int:
    """A group as an int.

    Args:
        name: of its column.
        value: what stands there.
        where: which row it is.

    Raises:
        ValueError: it is no integer.
    """
    try:
        number = int(value)
        if not _is_bool(value) and (isinstance(value, str) or number == value):
            return number
    except _UNREADABLE:
        pass
    raise ValueError(
        f"{name}: got {value!r} in {where}, wanted an integer; number the prompts 0, 1, …"
    )


def judgement(name: str, value: Any, where: str) -> bool:
    """A label as a bool.

    Args:
        name: of its column.
        value: what stands there: a bool, or a number that is 0 or 1.
        where: which row it is.

    Raises:
        ValueError: it is anything else.
    """
    if not isinstance(value, str):
        try:
            if value in (0, 1):
                return bool(value)
        except _UNREADABLE:
            pass
    raise ValueError(
        f"{name}: got {value!r} in {where}, wanted true or false, or 1 or 0; map what is desirable"
        " to true and everything else to false"
    )


def _is_bool(value: Any) -> bool:
    # NumPy's and torch's bools, and arrays of them, say so by their dtype.
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
