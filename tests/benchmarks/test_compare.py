"""Regressions between two results files: what is flagged, and what noise explains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psutil")

from benchmarks.__main__ import main  # noqa: E402
from benchmarks.candidates import CANDIDATES, ON_ONE_SHAPE  # noqa: E402
from benchmarks.compare import claims_of, compare, compare_files  # noqa: E402
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


@pytest.mark.parametrize(
    ("figures", "worse", "noise"),
    [
        (
            {"ms": 1.0, "ms_quartiles": [0.9, 1.1]},
            {"ms": 1.3, "ms_quartiles": [1.2, 1.4]},
            {"ms": 1.3, "ms_quartiles": [1.0, 1.4]},
        ),
        ({"longest": 10_000}, {"longest": 5_000}, {"longest": 9_999}),
        ({"extra_bytes": 10 * 2**20}, {"extra_bytes": 30 * 2**20}, {"extra_bytes": 12 * 2**20}),
    ],
)
def test_other_sections_are_compared_by_what_they_have(
    figures: Any, worse: Any, noise: Any
) -> None:
    row = {"candidate": "it", "capacity_bytes": 80, "status": "ok", **figures}
    (change,) = compare({"rows": [row]}, {"rows": [row | worse]})
    assert change.field in figures and change.row == "it, 80"
    assert compare({"rows": [row]}, {"rows": [row | noise]}) == []


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


def test_claims_compare_with_their_limits() -> None:
    def rows(ours: float, peer: float) -> dict[str, dict[str, object]]:
        return {
            name: {"in_p": ours if CANDIDATES[name].ours else peer, "extra_bytes": None}
            for name in ON_ONE_SHAPE
        }

    claims = claims_of({"fp32": rows(2.0, 6.0), "bf16": rows(2.0, 6.0)})
    assert {str(claim).split(":")[0]: claim.value for claim in claims[:2]} == {
        "MISSED  fp32, ours": 2.0,
        "holds   fp32, ours": 2.0,
    }
    faster = [claim for claim in claims if "as fast as" in claim.text]
    assert [claim.holds for claim in faster] == [True, True, False]
    assert [claim.holds for claim in claims if "memory" in claim.text] == [False, False]
