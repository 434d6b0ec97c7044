"""Peak memory of trainings by other frameworks' commands: rows, failures, the page's section."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import frameworks
from benchmarks.frameworks import FRAMEWORKS, HERE, OWN, Framework, measured
from benchmarks.results import Results
from benchmarks.tables import framework_section

_MIB = 2**20
# A training that takes memory by the length of its sequences.
_TRAINS = """
from pathlib import Path
x = bytearray(Path("pairs.jsonl").stat().st_size << 14)
print({"loss": 0.5})
"""


@pytest.fixture
def framework(tmp_path, monkeypatch):
    """A framework that is this Python; its command is a line of it."""
    monkeypatch.setattr(frameworks, "ENVIRONMENTS", tmp_path)
    interpreter = tmp_path / "mine" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    interpreter.chmod(0o755)

    def make(code: str = _TRAINS) -> Framework:
        return Framework("mine", "Mine", "pytest", lambda *_: ["-c", code])

    return make


def test_a_row_has_both_peaks_and_the_losses(framework, tmp_path):
    row = measured(framework(), HERE, {})
    assert row["status"] == "ok" and row["version"] == pytest.__version__
    assert row["losses"] == [0.5]
    letters = 7 * (frameworks._WORDS - frameworks._FEW) * 2 * 2 * frameworks.PAIRS
    added = row["peak_bytes"] - row["short_peak_bytes"]
    assert added == pytest.approx(letters * 2**14, abs=8 * _MIB)
    results = Results(tmp_path / "frameworks.json", "framework")
    results.put(row)
    text = framework_section(json.loads(results.path.read_text()))
    assert f"Mine {pytest.__version__} | here | {row['peak_bytes'] / _MIB:.0f}" in text[-1]


def test_a_failure_is_told_without_paths(framework):
    row = measured(framework("raise SystemExit('no /such/file here')"), OWN, None)
    assert row["status"] == "failed: exit 1: no here" and row["peak_bytes"] is None


def test_an_environment_that_is_not_there_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(frameworks, "ENVIRONMENTS", tmp_path)
    assert "make frameworks" in measured(FRAMEWORKS[0], OWN, None)["status"]


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda it: it.name)
def test_only_our_options_differ(framework, tmp_path):
    def words(options):
        folder = tmp_path / str(options)
        folder.mkdir()
        found = framework.command(folder, options)
        config = json.loads(Path(found[-1]).read_text().replace(str(folder), "folder"))
        return found[:-1], config

    (_, own), (_, ours) = words(None), words({"workspace_mb": 8})
    added = {key: ours.pop(key) for key in ours.keys() - own.keys()}
    assert own == ours and '"workspace_mb": 8' in json.dumps(added)
