"""What compiled kernels take, on disk: one file a target, equal runs give equal files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, Row

KERNELS = RESULTS / "kernels"
USAGE = ("warps", "stages", "registers", "stack", "spills", "shared", "matrix", "copies")
_KEY = ("case", "kernel", "dtype", "configuration")


def save_kernels(contents: Mapping[str, Any], folder: Path = KERNELS) -> None:
    """Write one file a target, named by it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        text = json.dumps(content, indent=1) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def load_kernels(folder: Path = KERNELS) -> dict[str, Any]:
    """Target → content of its results file, by name."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    }


def key(row: Row) -> tuple[str, ...]:
    """What tells a target's rows from each other."""
    return tuple(row[field] for field in _KEY)


def words(row: Row) -> str:
    """A row's name for people."""
    return f"{row['case']} in {row['dtype']} ({row['kernel']})"


def faults(content: Mapping[str, Any]) -> list[str]:
    """Why a target's default kernels must not be shipped; nothing where it is not gated."""
    if not content["gated"]:
        return []
    return [
        f"{content['target']}, {words(row)}: {reason}"
        for row in content["rows"]
        if row["default"]
        for reason in _reasons(row, content["shared_limit"])
    ]


def _reasons(row: Row, limit: int) -> Iterator[str]:
    if row["status"] != "ok":
        yield row["status"]
        return
    if row["spills"]:
        yield f"{row['spills']} spill instructions"
    if row["stack"]:
        yield f"{row['stack']} bytes of stack"
    if row["shared"] > limit:
        yield f"{row['shared']} bytes of shared memory, {limit} at most"


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """What differs from older results of the same target, one line each."""
    old, new = ({key(row): row for row in content["rows"]} for content in (before, after))
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            known = "no longer compiled" if name in old else "new"
            yield f"{after['target']}, {words(new.get(name) or old[name])}: {known}"
            continue
        for field in ("status", *USAGE):
            if old[name][field] != new[name][field]:
                change = f"{field} {old[name][field]} before, {new[name][field]} now"
                yield f"{after['target']}, {words(new[name])}: {change}"
