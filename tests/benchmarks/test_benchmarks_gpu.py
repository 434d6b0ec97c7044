"""Units of work that die, raise or hang, rows that are resumed, and a profile's arithmetic."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import context_search, gpu, profile_step
from benchmarks.accuracy import failure
from benchmarks.cpu_grid import not_measured
from benchmarks.grid import measure_alone, row_of
from benchmarks.longest import COMPARED
from benchmarks.peers import CANDIDATES, Candidate
from benchmarks.profile_step import Span, Timeline
from benchmarks.results import NO_TIME, Results, Row, Sink, load
from benchmarks.shapes import HEADS, TINY, Problem
from benchmarks.trainer_candidates import EAGER, TRAINERS
from benchmarks.workers import Unit, run_units


def timed(row: Row) -> Row:
    return {**row, "status": "ok", "rounds": 1, "ms": 2.0, "p_ms": 1.0, "in_p": 2.0}


def works(row: Row, sink: Sink) -> None:
    sink.put(timed(row))


def dies(row: Row, sink: Sink) -> None:
    os._exit(7)


def dies_late(row: Row, sink: Sink) -> None:
    sink.put({**row, "status": "ok", "logp_error": 1e-6})
    os._exit(7)


def fails_and_dies(row: Row, sink: Sink) -> None:
    sink.put({**row, "status": "failed: AcceleratorError: an illegal memory access"})
    os.abort()


def raises(row: Row, sink: Sink) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more of it")


def misses(row: Row, sink: Sink) -> None:
    raise ModuleNotFoundError("No module named 'absent'", name="absent")


def hangs(row: Row, sink: Sink) -> None:
    time.sleep(3600)


def broken(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    os._exit(9)


def unit(name: str, measure: Callable[[Row, Sink], None], seconds: float = 60.0) -> Unit:
    row = row_of(replace(CANDIDATES["ours: local"], name=name), TINY, "fp32")
    return Unit("grid", row, partial(measure, row), seconds, modules=("absent.module",))


def statuses(folder: Path) -> dict[str, str]:
    return {row["candidate"]: row["status"] for row in load(folder)["grid"]["rows"]}


def run(folder: Path, units: list[Unit], seconds: float = 600.0, again: bool = False) -> list[str]:
    """What is said; the rows are in the folder."""
    said: list[str] = []
    opened = Results if again else Results.resumed
    files = {"grid": opened(folder / "grid.json", "grid")}
    run_units(units, files, time.monotonic() + seconds, said.append)
    return said


def test_what_ends_a_process_is_the_status_of_its_row_alone(tmp_path: Path) -> None:
    units = [
        unit("first", works),
        unit("dies", dies),
        unit("dies late", dies_late),
        unit("fails and dies", fails_and_dies),
        unit("raises", raises),
        unit("misses", misses),
        unit("hangs", hangs, seconds=0.5),
        unit("last", works),
    ]
    said = run(tmp_path, units)
    assert statuses(tmp_path) == {
        "first": "ok",
        "dies": "failed: the process ended with code 7",
        "dies late": "failed: the process ended with code 7",
        "fails and dies": "failed: AcceleratorError: an illegal memory access",
        "raises": "failed: RuntimeError: CUDA error: an illegal memory access was encountered",
        "misses": "unavailable: needs absent",
        "hangs": "failed: not done after 0 s",
        "last": "ok",
    }
    assert said[0] == "tiny, 24 rows, fp32: first: ok, 2.0 ms, 2.00 P"
    rows = {row["candidate"]: row for row in load(tmp_path)["grid"]["rows"]}
    assert rows["dies late"]["logp_error"] == 1e-6

    # A second run measures what was not right, and nothing else.
    mended = [replace(each, measure=partial(works, each.row)) for each in units]
    said = run(tmp_path, [units[0], mended[1], units[7]])
    assert said == ["tiny, 24 rows, fp32: dies: ok, 2.0 ms, 2.00 P"]
    assert len(run(tmp_path, mended[:1], again=True)) == 1
    assert statuses(tmp_path) == {"first": "ok"}


def test_rows_of_other_code_or_another_machine_are_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    run(tmp_path, [unit("first", works)])
    for name, other in (("commit", "0000000"), ("code", "0"), ("machine", {}), ("versions", {})):
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**content, name: other}), encoding="utf-8")
        assert not Results.resumed(path, "grid").rows
        path.write_text(json.dumps(content), encoding="utf-8")
    assert Results.resumed(path, "grid").rows
    path.write_text("{ half a file", encoding="utf-8")
    assert not Results.resumed(path, "grid").rows


def test_what_no_time_is_left_for_is_named_and_failures_stay(tmp_path: Path) -> None:
    units = [unit("first", works), unit("raises", raises)]
    run(tmp_path, units)
    said = run(tmp_path, [*units, unit("last", works)], seconds=0.0)
    assert said == []
    found = statuses(tmp_path)
    assert found["last"] == NO_TIME and found["first"] == "ok"
    assert found["raises"].startswith("failed: RuntimeError")


def test_what_is_under_way_at_the_deadline_is_ended(tmp_path: Path) -> None:
    began = time.monotonic()
    run(tmp_path, [unit("hangs", hangs), unit("last", works)], seconds=3.0)
    assert time.monotonic() - began < 60.0
    assert statuses(tmp_path) == {"hangs": NO_TIME, "last": NO_TIME}


def test_candidates_are_measured_beside_p_in_processes_of_their_own(tmp_path: Path) -> None:
    dying = Candidate("dying", broken)
    units = [
        Unit(
            "grid",
            row_of(candidate, TINY, "fp32"),
            partial(measure_alone, candidate, TINY, "fp32", "cpu", not_measured),
        )
        for candidate in (dying, CANDIDATES["ours: local"], CANDIDATES["eager"])
    ]
    run(tmp_path, units)
    rows = {row["candidate"]: row for row in load(tmp_path)["grid"]["rows"]}
    assert rows["dying"]["status"] == "failed: the process ended with code 9"
    for name in ("ours: local", "eager"):
        row = rows[name]
        assert row["status"] == "ok" and row["rounds"] >= 3
        assert row["in_p"] > 0 and row["p_ms"] > 0 and row["forward_in_p"] > 0
        assert 0 < row["dweight_error"] < 1e-5


def test_the_trainers_are_units_and_the_eager_one_comes_last() -> None:
    units = gpu.trainer_units()
    assert [unit.row["candidate"] for unit in units].count(EAGER) == 2
    assert units[len(TRAINERS) - 1].row["candidate"] == EAGER
    assert {unit.row["trains"] for unit in units} == {"all", "adapter"}


def test_contexts_that_are_known_are_not_searched_again(tmp_path: Path) -> None:
    tried: list[str] = []

    def fits(name: str, shape: object, capacity: int) -> bool:
        tried.append(name)
        return name != "eager"

    def search() -> dict[str, Row]:
        results = Results.resumed(tmp_path / "context.json", "context")
        run = context_search.ContextRun(results, 1e9, fits, say=lambda text: None)
        run.measure({"llama-3": HEADS["llama-3"]}, {"80 GB": 80 * 10**9})
        return {row["candidate"]: row for row in load(tmp_path)["context"]["rows"]}

    first = search()
    assert set(tried) == set(COMPARED) and first["eager"]["status"] != "ok"
    tried.clear()
    assert search() == first
    assert set(tried) == {"eager"}


def test_without_a_gpu_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said: list[str] = []
    assert gpu.run_gpu(tmp_path, 1.0, said.append) == 1
    assert said == ["there is no GPU to measure on"] and not list(tmp_path.iterdir())


def test_a_missing_package_is_named_whoever_misses_it() -> None:
    assert (
        failure(ModuleNotFoundError("no", name="trl.kernels")) == "unavailable: needs trl.kernels"
    )
    text = "\nUsing the `Trainer` with `PyTorch` requires `accelerate>=1.1.0`: install it"
    assert failure(ImportError(text)) == (
        "unavailable: Using the `Trainer` with `PyTorch` requires `accelerate>=1.1.0`: install it"
    )


def test_a_timeline_tells_shares_and_gaps() -> None:
    spans = (Span("a", 0, 4), Span("b", 3, 6), Span("a", 10, 12), Span("c", 13, 20))
    timeline = Timeline(spans)
    assert timeline.whole == 20
    assert timeline.gaps() == [(4, "a"), (1, "c")]
    assert timeline.shares() == [("c", 7, 1), ("a", 6, 2), ("b", 3, 1)]
    first, *others = profile_step.lines_of(timeline, unit_ms=0.01)
    assert first == "0.020 ms (2.00 P of 0.010 ms), 4 launches, idle 25.0% in 2 gaps"
    assert others[0].split() == ["35.0%", "0.007", "ms", "1", "x", "c"]
    assert Timeline(()).whole == 0 and Timeline(()).gaps() == []


def test_the_profile_shows_matmuls_of_the_path() -> None:
    said: list[str] = []
    assert profile_step.run_profile(["gemma-2:stash"], said.append, "cpu") == 0
    assert said[0] == "gemma-2:stash, 24 labelled rows, bf16, cpu:"
    assert any("aten::addmm" in line for line in said)
    assert profile_step.run_profile(["gemma-2:none"], said.append, "cpu") == 2
    assert "wanted HEAD:PATH of llama-3, gemma-2" in said[-1]
