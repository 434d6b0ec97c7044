"""Checks on the columns of records and features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def require_columns(row: Mapping[str, Any], wanted: Iterable[str]) -> None:
    """Raise ValueError naming the missing columns and those that are there."""
    missing = [name for name in wanted if name not in row]
    if missing:
        raise ValueError(
            f"missing column {', '.join(map(repr, missing))}; got {', '.join(map(repr, row))}"
        )
