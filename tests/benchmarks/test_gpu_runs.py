"""What a GPU is asked, and units of work that die, raise or hang; rows that are resumed."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.candidates import CANDIDATES, Candidate
from benchmarks.gpu_runs import (
    Unit,
    measure_alone,
    others,
    peers,
    run_gpu,
    run_units,
    telling,
    trainer_units,
    units_of,
)
from benchmarks.head_points import GridPoint
from benchmarks.measuring import Loop
from benchmarks.memory import Memory, not_measured
from benchmarks.results import NO_TIME, Results, Row, Sink, load, row_key
from benchmarks.shapes import HEADS, TINY, Problem
from benchmarks.trainers import EAGER, EVERYWHERE

STAND_INS = {
    "llama-3": replace(TINY, name="llama-3"),
    "gemma-2": replace(TINY, name="gemma-2", softcap=5.0),
    "qwen2.5-0.5b": replace(TINY, name="qwen2.5-0.5b", hidden_size=8),
}
LOCAL = CANDIDATES["ours: local"]


def timed(row: Row) -> Row:
    return {**row, "status": "ok", "rounds": 1, "ms": 2.0, "p_ms": 1.0, "in_p": 2.0}


def acts(how: str, row: Row, sink: Sink) -> None:
    """The work of a unit, which ends as its name says."""
    match how:
        case "works":
            sink.put(timed(row))
        case "dies late":
            sink.put({**row, "status": "ok", "logp_error": 1e-6})
            os._exit(7)
        case "fails and dies":
            sink.put({**row, "status": "failed: AcceleratorError: an illegal memory access"})
            os.abort()
        case "raises":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")
        case "misses":
            raise ModuleNotFoundError("No module named 'absent'", name="absent")
        case "hangs":
            time.sleep(3600)


def broken(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    os._exit(9)


def unit(how: str, name: str = "", seconds: float = 60.0) -> Unit:
    named = replace(LOCAL, name=name or how)
    row = GridPoint(TINY, "fp32", (named,)).row_of(named)
    return Unit("grid", row, partial(acts, how, row), seconds, modules=("absent.module",))


def alone(candidate: Candidate) -> Unit:
    point = GridPoint(TINY, "fp32", (candidate,), not_measured)
    return Unit("grid", point.row_of(candidate), partial(measure_alone, point, "cpu"))


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
    failing = ("dies late", "fails and dies", "raises", "misses")
    dying = alone(Candidate("dies", broken))
    units = [dying, *map(unit, failing), unit("hangs", seconds=0.5), alone(LOCAL)]
    said = run(tmp_path, units)
    found = {
        "dies": "failed: the process ended with code 9",
        "dies late": "failed: the process ended with code 7",
        "fails and dies": "failed: AcceleratorError: an illegal memory access",
        "raises": "failed: RuntimeError: CUDA error: an illegal memory access was encountered",
        "misses": "unavailable: needs absent",
        "hangs": "failed: not done after 0 s",
        LOCAL.name: "ok",
    }
    assert statuses(tmp_path) == found
    assert said[-1].startswith("tiny, 24 rows, fp32: ours: local: ok, ")
    rows = {row["candidate"]: row for row in load(tmp_path)["grid"]["rows"]}
    assert rows["dies late"]["logp_error"] == 1e-6
    # Beside P and float64, in a process of its own.
    row = rows[LOCAL.name]
    assert row["rounds"] >= 3 and 0 < row["dweight_error"] < 1e-5
    assert row["in_p"] > 0 and row["p_ms"] > 0 and row["forward_in_p"] > 0

    # Failures stay where no time is left, and what was not begun is named.
    assert run(tmp_path, [*units, unit("works", "new")], seconds=0.0) == []
    assert statuses(tmp_path) == {**found, "new": NO_TIME}
    # A second run measures what was not right, and nothing else.
    mended = unit("works", "dies")
    assert run(tmp_path, [mended, units[-1]]) == ["tiny, 24 rows, fp32: dies: ok, 2.0 ms, 2.00 P"]
    assert len(run(tmp_path, [mended], again=True)) == 1
    assert statuses(tmp_path) == {"dies": "ok"}


def test_rows_of_other_code_or_another_machine_are_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    Results(path, "grid").put(timed(unit("works").row))
    content = json.loads(path.read_text(encoding="utf-8"))
    assert Results.resumed(path, "grid").rows == content["rows"]
    for name, other in (("commit", "0000000"), ("code", "0"), ("machine", {}), ("versions", {})):
        path.write_text(json.dumps({**content, name: other}), encoding="utf-8")
        assert not Results.resumed(path, "grid").rows
    path.write_text("{ half a file", encoding="utf-8")
    assert not Results.resumed(path, "grid").rows


def test_what_is_under_way_at_the_deadline_is_ended(tmp_path: Path) -> None:
    began = time.monotonic()
    run(tmp_path, [unit("hangs"), unit("works", "last")], seconds=3.0)
    assert time.monotonic() - began < 60.0
    assert statuses(tmp_path) == {"hangs": NO_TIME, "last": NO_TIME}


def test_every_point_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.measuring.gc.collect", lambda: 0)
    memory = Memory(3 * 2**20, 2**20, "ok")
    points = [
        replace(point, memory=lambda *_: memory)
        for stage in (telling, peers, others)
        for point in stage(STAND_INS)
    ]
    results = Results(tmp_path / "grid.json", "grid")
    with torch.compiler.set_stance("force_eager"):
        Loop(results, count=2, say=lambda text: None).measure(points)
    rows = load(tmp_path)["grid"]["rows"]
    assert len(rows) == sum(len(point.candidates) for point in points)
    assert not [row["candidate"] for row in rows if row["status"] == NO_TIME]
    found = {(row["candidate"], row["shape"]): row for row in rows if row["length"] == 12}
    paths = [f"ours: {path}, torch" for path in ("evaluate", "stash", "local", "recompute")]
    for name in (*paths, "ours: auto, auto", "ours: auto, 1024 MiB", "TRL"):
        for shape in STAND_INS:
            row = found[name, shape]
            assert (row["status"], row["rounds"], row["extra_bytes"]) == ("ok", 2, memory.extra)
            assert row["in_p"] > 0 and row["forward_in_p"] > 0
            # What asks for no gradient has no other forward.
            assert (row["forward_ms"] == row["ms"]) == (name == paths[0])
    # Kernels take no CPU tensors outside the interpreter: named, not absent.
    status = found["ours: local, triton", "llama-3"]["status"]
    assert status.startswith("failed: ValueError: engine: 'triton'")
    assert {row["objective"] for row in rows} == {"dpo", "simpo", "cpo", "orpo", "kto"}


def test_the_telling_points_come_first_and_every_candidate_has_one() -> None:
    stages = telling(), peers(), others()
    for points in stages[:2]:
        assert [point.shape for point in points] == list(HEADS.values())
        assert {(point.dtype, point.shape.labelled_rows) for point in points} == {("bf16", 8192)}
    first, _, last = stages
    names = {candidate.name for candidate in first[0].candidates}
    assert {name for name in names if not name.startswith("ours: ")} == {
        *("TRL", "TRL: frozen head", "TRL: no gradient")
    }
    assert {"ours: auto, auto", "ours: local, cublas", "ours: stash, triton"} < names
    units = units_of(first)
    # Breadth first: no head waits for all that there is to know of another.
    assert [unit.row["shape"] for unit in units[:3]] == list(HEADS)
    assert {unit.row["candidate"] for unit in units[3:6]} == {"TRL"}
    rows = {point.shape.labelled_rows for point in last}
    assert {2048, 32768} <= rows and {0.25, 1.0} <= {point.shape.labelled for point in last}
    keys = [row_key(unit.row) for points in stages for unit in units_of(points)]
    assert len(keys) == len(set(keys))
    every = {c.name for points in stages for point in points for c in point.candidates}
    assert set(CANDIDATES) - every == {
        *(f"ours: {path}" for path in ("auto", "evaluate", "stash", "local", "recompute")),
        "ours: half kept",
    }


def test_the_trainers_are_units_and_the_eager_one_comes_last() -> None:
    units = trainer_units()
    assert [unit.row["candidate"] for unit in units].count(EAGER) == 2
    assert units[len(EVERYWHERE) - 1].row["candidate"] == EAGER
    assert {unit.row["trains"] for unit in units} == {"all", "adapter"}


def test_without_a_gpu_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said: list[str] = []
    assert run_gpu(tmp_path, 1.0, said.append) == 1
    assert said == ["there is no GPU to measure on"] and not list(tmp_path.iterdir())
