"""What is made of TRL's own tests: kinds of results, and the committed page of them."""

from __future__ import annotations

import json

import pytest
import trls_own_tests as runner

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a.TestA" name="one[x]"/>
<testcase classname="tests.test_a.TestA" name="two">
<failure message="ValueError: no&#10;more"/></testcase>
<testcase classname="tests.test_a" name="three"><skipped message="no kernels"/></testcase>
<testcase classname="tests.test_a" name="four"><error message=""/></testcase>
</testsuite></testsuites>"""
GOOD, BAD, NOT = (
    {"outcome": outcome, "why": why}
    for outcome, why in (("passed", ""), ("failed", "no"), ("skipped", "x"))
)
METRICS = "test_dpo_trainer.TestDPOTrainer.test_train_with_compute_metrics"


def test_outcomes_of_a_report(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    assert runner.outcomes_of(tmp_path / "report.xml") == {
        "test_a.TestA.one[x]": GOOD,
        "test_a.TestA.two": {"outcome": "failed", "why": "ValueError: no"},
        "test_a.three": {"outcome": "skipped", "why": "no kernels"},
        "test_a.four": {"outcome": "failed", "why": ""},
    }


@pytest.mark.parametrize(
    ("name", "own", "ours", "kind"),
    [
        ("a", GOOD, GOOD, "passed"),
        ("a", GOOD, BAD, "unexpectedly failing"),
        ("a", GOOD, NOT, "unexpectedly failing"),
        ("a", GOOD, None, "unexpectedly failing"),
        ("a", BAD, GOOD, "failing with TRL's own, too"),
        ("a", BAD, BAD, "failing with TRL's own, too"),
        ("a", NOT, NOT, "skipped"),
        (METRICS, GOOD, BAD, "expected to fail"),
        (METRICS, GOOD, GOOD, "no longer failing"),
        (f"{METRICS}[x]", BAD, BAD, "failing with TRL's own, too"),
    ],
)
def test_every_test_is_of_one_kind(name, own, ours, kind):
    runs = [{} if each is None else {name: each} for each in (own, ours)]
    kinds = runner.compared(*runs)
    assert [each for each, tests in kinds.items() if name in tests] == [kind]
    fine = {"tests": kinds | {"passed": {"another": ""}}}
    assert runner.went_well(fine) == (kind not in ("unexpectedly failing", "no longer failing"))
    assert not runner.went_well({"tests": kinds | {"passed": {}}})


def test_the_page_shows_the_results_and_none_is_unexpected():
    result = json.loads(runner.RESULTS.read_text(encoding="utf-8"))
    assert runner.PAGE.read_text(encoding="utf-8") == runner.page_of(result)
    assert runner.went_well(result)
    # Each reason is one of a test that ran.
    assert set(result["tests"]["expected to fail"].values()) == set(runner.EXPECTED.values())
