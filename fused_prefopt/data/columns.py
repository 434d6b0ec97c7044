"""Checks on the columns of records and features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fused_prefopt.checks import closest


def require_columns(row: Mapping[str, Any], wanted: Iterable[str]) -> None:
    """Raise ValueError naming the missing columns, the closest to them, and those there are."""
    missing = [f"{name!r}{closest(name, row)}" for name in wanted if name not in row]
    if missing:
        raise ValueError(f"missing column {', '.join(missing)}; got {', '.join(map(repr, row))}")


def has_values(row: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether a row has all these columns, none of them None."""
    return all(row.get(name) is not None for name in names)
