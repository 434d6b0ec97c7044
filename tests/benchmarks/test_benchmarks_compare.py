"""Regressions between two results files: what is flagged, and what noise explains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psutil")

from benchmarks.__main__ import main  # noqa: E402
from benchmarks.compare import compare, compare_files  # noqa: E402
from benchmarks.results import RESULTS, load  # noqa: E402

CONTENT = load(RESULTS / "cpu")["head-fp32"]
ROW = next(row for row in CONTENT["rows"] if row["candidate"] == "ours: local")
LOW, HIGH = ROW["in_p_quartiles"]


def changed(**fields: Any) -> list[str]:
    """What is flagged where one row has other figures."""
    rows = [{**row, **fields} if row is ROW else row for row in CONTENT["rows"]]
    return [change.field for change in compare(CONTENT, {**CONTENT, "rows": rows})]


def test_the_same_results_hold_no_regression() -> None:
    assert changed() == []


@pytest.mark.parametrize(
    ("fields", "flagged"),
    [
        ({"in_p": 1.2 * HIGH, "in_p_quartiles": [1.1 * HIGH, 1.3 * HIGH]}, ["in_p"]),
        ({"in_p": 1.2 * HIGH, "in_p_quartiles": [0.99 * HIGH, 1.3 * HIGH]}, []),
        ({"in_p": 1.01 * ROW["in_p"], "in_p_quartiles": [1.01 * HIGH, 1.02 * HIGH]}, []),
        ({"in_p": 0.5 * LOW, "in_p_quartiles": [0.4 * LOW, 0.6 * LOW]}, []),
        ({"extra_bytes": 2 * ROW["extra_bytes"]}, ["extra_bytes"]),
        ({"extra_bytes": ROW["extra_bytes"] + 2**20}, []),
        ({"dweight_error": 3 * ROW["dweight_error"]}, ["dweight_error"]),
        ({"logp_error": None}, []),
        ({"status": "wrong: log-probs off by 1"}, ["status"]),
    ],
)
def test_only_what_noise_does_not_explain_is_flagged(fields: Any, flagged: list[str]) -> None:
    assert changed(**fields) == flagged


def test_a_method_is_compared_by_its_ms() -> None:
    row = {
        **dict.fromkeys(("candidate", "shape", "dtype", "sequences", "length", "labelled_rows")),
        "status": "ok",
        "ms": 1.0,
        "ms_quartiles": [0.9, 1.1],
    }
    slower = {**row, "ms": 1.3, "ms_quartiles": [1.2, 1.4]}
    (change,) = compare({"rows": [row]}, {"rows": [slower]})
    assert str(change).endswith("ms: 1 -> 1.3")
    assert compare({"rows": [row]}, {"rows": [{**slower, "ms_quartiles": [1.0, 1.4]}]}) == []


def test_a_missing_row_is_flagged() -> None:
    rows = [row for row in CONTENT["rows"] if row is not ROW]
    (change,) = compare(CONTENT, {**CONTENT, "rows": rows})
    assert str(change).startswith("ours: local, laptop, fp32")
    assert str(change).endswith("row: measured -> missing")


def test_the_command_fails_on_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    before.write_text(json.dumps(CONTENT), encoding="utf-8")
    assert main(["compare", str(before), str(before)]) == 0
    assert capsys.readouterr().out == "no regression\n"
    after.write_text(json.dumps({**CONTENT, "rows": CONTENT["rows"][1:]}), encoding="utf-8")
    assert main(["compare", str(before), str(after)]) == 1
    assert "row: measured -> missing" in capsys.readouterr().out

    sweep = RESULTS / "cpu" / "sweep.json"
    with pytest.raises(ValueError, match="section: got head and sweep"):
        compare_files(before, sweep)
