"""What became worse between two files of results, beyond what their noise explains."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import Row, check, row_key

# A time is worse where the quartiles do not overlap and the medians differ by more than this.
_TIME = 1.05
# Allocators round, and pages come and go.
_MEMORY, _MEMORY_BYTES = 1.05, 4 * 2**20
# A search ends where two lengths are as near as this.
_LENGTH = 1.07
# Another order of a sum changes an error by less.
_ERROR = 2.0
_TIMES = ("in_p", "reused_in_p", "forward_in_p")
_ERRORS = ("logp_error", "dhidden_error", "dweight_error")


@dataclass(frozen=True)
class Change:
    """One figure that became worse.

    Attributes:
        row: which row, in words.
        field: which figure.
        before, after: its values.
    """

    row: str
    field: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.row}: {self.field}: {_shown(self.before)} -> {_shown(self.after)}"


def compare_files(before: Path, after: Path) -> list[Change]:
    """Regressions from one file to another.

    Raises:
        ValueError: a file is no results file, or the two hold different sections.
    """
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in (before, after)]
    for content in contents:
        check(content)
    if contents[0]["section"] != contents[1]["section"]:
        sections = " and ".join(content["section"] for content in contents)
        raise ValueError(f"section: got {sections}, wanted the same one twice")
    return compare(contents[0], contents[1])


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Regressions between the contents of two results files; a row that is gone is one too."""
    found = {row_key(row): row for row in after["rows"]}
    changes: list[Change] = []
    for row in before["rows"]:
        name = ", ".join(str(part) for part in row_key(row) if part is not None)
        other = found.get(row_key(row))
        if other is None:
            changes.append(Change(name, "row", "measured", "missing"))
        elif row["status"] == "ok" and other["status"] != "ok":
            changes.append(Change(name, "status", "ok", other["status"]))
        elif row["status"] == "ok":
            worse = _worse(row, other)
            changes += [Change(name, field, row[field], other[field]) for field in worse]
    return changes


def _worse(before: Row, after: Row) -> Iterator[str]:
    # Without P beside it a time counts where its spread is known.
    for name in (*_TIMES, *(["ms"] if "ms_quartiles" in before else [])):
        if _both(before, after, name) and _slower(before, after, name):
            yield name
    if _both(before, after, "extra_bytes"):
        limit = max(_MEMORY * before["extra_bytes"], before["extra_bytes"] + _MEMORY_BYTES)
        if after["extra_bytes"] > limit:
            yield "extra_bytes"
    if _both(before, after, "longest") and after["longest"] < before["longest"] / _LENGTH:
        yield "longest"
    for name in _ERRORS:
        if _both(before, after, name) and after[name] > _ERROR * before[name]:
            yield name


def _slower(before: Row, after: Row, name: str) -> bool:
    spread, later = (row.get(f"{name}_quartiles") for row in (before, after))
    apart = spread is None or later is None or later[0] > spread[1]
    return apart and after[name] > _TIME * before[name]


def _both(before: Row, after: Row, name: str) -> bool:
    return before.get(name) is not None and after.get(name) is not None


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
