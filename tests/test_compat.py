"""`make compat`: what its page says, and which versions its environments hold."""

from __future__ import annotations

import json
import re

import pytest
from compat import (
    ENVIRONMENTS,
    EXECUTED,
    PAGE,
    PARTS,
    RESULTS,
    ROOT,
    TRL,
    Environment,
    counts_of,
    environment_of,
    merged,
    page_of,
    went_well,
)

from fused_prefopt.checks import OLDEST

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="one"/>
<testcase classname="tests.test_a" name="two"/>
<testcase classname="tests.test_a" name="three[x]"><failure message="no"/></testcase>
<testcase classname="" name="tests.test_b"><error message="no"/></testcase>
<testcase classname="tests.test_a" name="four"><skipped message="no peft"/></testcase>
</testsuite></testsuites>"""


def pins_of(name: str) -> dict[str, str]:
    (environment,) = (one for one in ENVIRONMENTS if one.name == name)
    text = environment.requirements.read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w-]+)==([\d.]+)", text, re.MULTILINE))


def test_the_page_shows_the_results_and_all_passed():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == page_of(results)
    assert list(results) == [environment.name for environment in ENVIRONMENTS]
    for environment in ENVIRONMENTS:
        result = results[environment.name]
        found = tuple(part for part in result["parts"] if part not in environment.apart)
        assert found == environment.parts
        assert all(map(went_well, result["parts"].values()))
        # Without what a build adds behind a "+".
        held = {name: version.split("+")[0] for name, version in result["versions"].items()}
        pins = pins_of(environment.name)
        assert held.items() >= {(name, pins[name]) for name in pins.keys() & held.keys()}


def test_every_part_has_files():
    for patterns in PARTS.values():
        assert all(list((ROOT / "tests").rglob(pattern)) for pattern in patterns)


def test_the_oldest_versions_are_the_least_that_the_package_asks_for():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    least = dict(re.findall(r'"([\w-]+)>=([\d.]+)', project)) | OLDEST
    pins = {"trl": pins_of("trl-1.9")["trl"], **pins_of("oldest")}
    known = pins.keys() & least.keys()
    assert known >= {"torch", "triton", "transformers", "accelerate", "peft", "datasets", "trl"}
    for name in known:
        assert f"{pins[name]}.".startswith(f"{least[name]}."), name


def test_every_minor_version_of_trl_has_an_environment():
    minors = [
        int(pins_of(each.name)["trl"].split(".")[1]) for each in ENVIRONMENTS if TRL in each.parts
    ]
    least = int(OLDEST["trl"].partition(".")[2])
    assert set(minors) == set(range(least, max(minors) + 1))


def test_a_part_that_is_run_alone_has_its_own_commit():
    oldest = environment_of("oldest")
    good = {"exit": 0, "passed": 5, "failed": [], "skipped": {}}
    versions = {"python": "3.10"}
    first = {"commit": "aa", "date": "2026-01-01", "versions": versions}
    first |= {"parts": dict.fromkeys(oldest.parts, good)}
    second = {"commit": "bb", "date": "2026-01-02", "versions": versions}
    second |= {"parts": {EXECUTED: good}}
    both = merged(oldest, first, second)
    assert tuple(both["parts"]) == (*oldest.parts, EXECUTED)
    alone = good | {"commit": "bb", "date": "2026-01-02"}
    assert both == first | {"parts": first["parts"] | {EXECUTED: alone}}
    line = "| **kernels, executed** | 5 passed, 0 failed, 0 skipped, at bb, 2026-01-02 |"
    assert line in page_of({"oldest": both})
    # The others run again keep it, and on other versions nothing of it.
    third = first | {"commit": "cc"}
    assert merged(oldest, both, third) == third | {"parts": both["parts"]}
    others = first | {"versions": {"python": "3.11"}}
    assert merged(oldest, both, others) == others
    with pytest.raises(SystemExit, match="oldest: its versions"):
        merged(oldest, others, second)


def test_counts_of_a_report(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    counts = counts_of(tmp_path / "report.xml")
    failed = ["tests.test_a::three[x]", "::tests.test_b"]
    assert counts == {"passed": 2, "failed": failed, "skipped": {"no peft": 1}}
    assert not went_well({"exit": 0, **counts})
    assert not went_well({"exit": 1, **counts, "failed": []})
    assert not went_well({"exit": 0, **counts, "failed": [], "passed": 0})
    assert went_well({"exit": 0, **counts, "failed": []})
    assert not went_well({"exit": 2, "failed": []})


def test_an_environment_is_made_anew_where_a_file_that_it_includes_has_changed(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("compat.TESTS", tmp_path)
    (tmp_path / "versions").mkdir()
    (tmp_path / "versions" / "one.txt").write_text("--requirement ../two.txt\nc==3\n")
    (tmp_path / "two.txt").write_text("a==1\n")
    environment = Environment("one", "3.11", ())
    assert environment.made_of() == "--requirement ../two.txt\nc==3\na==1\n"
    (tmp_path / "two.txt").write_text("a==2\n")
    assert "a==2" in environment.made_of()
