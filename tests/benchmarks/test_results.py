"""Results on disk: what is checked, replaced, and said of a failure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import RESULTS, Results, check, failure, load

SWEEP = load(RESULTS / "cpu")["sweep"]


def refused(message: str, content: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        check(content)


def test_rows_are_checked_by_the_types_of_their_section() -> None:
    row = SWEEP["rows"][0]
    refused("status: got None", {**SWEEP, "rows": [row, {**row, "status": None}]})
    refused("vocab: got 97.0", {**SWEEP, "rows": [{**row, "vocab": 97.0}]})
    check({**SWEEP, "rows": [{**row, "extra_bytes": None}]})
    short = {name: value for name, value in row.items() if name != "status"}
    refused("status: missing", {**SWEEP, "rows": [short]})
    refused("other: missing or unknown", {**SWEEP, "rows": [{**row, "other": 1}]})
    refused("machine: missing", {name: SWEEP[name] for name in SWEEP if name != "machine"})


def test_put_replaces_the_same_row(tmp_path: Path) -> None:
    results = Results(tmp_path / "sweep.json", "sweep")
    results.put(SWEEP["rows"][0])
    results.put({**SWEEP["rows"][0], "extra_bytes": 7})
    assert [row["extra_bytes"] for row in load(tmp_path)["sweep"]["rows"]] == [7]
    content = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))
    assert content["machine"].keys() >= {"cpu", "instructions", "threads", "memory_gib", "system"}
    assert content["versions"].keys() >= {"python", "torch"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (
            RuntimeError("no compiler at /some/place\nsecond line"),
            "failed: RuntimeError: no compiler at",
        ),
        (ModuleNotFoundError("no", name="trl.kernels"), "unavailable: needs trl.kernels"),
        (ImportError("\nUsing it requires `a>=1`: install"), "unavailable: Using it requires"),
    ],
)
def test_a_failure_is_one_line_without_paths(error: Exception, status: str) -> None:
    assert failure(error).startswith(status) and "\n" not in failure(error)
    assert "/" not in failure(error)
