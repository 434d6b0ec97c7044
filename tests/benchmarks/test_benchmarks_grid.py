"""The grid's whole loop on tiny shapes with the clock injected, and what is counted and shown."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import count as counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("psutil")

from benchmarks import benchmark_pages, cpu_grid, gpu, grid, peers  # noqa: E402
from benchmarks.counts import WORKSPACE, count  # noqa: E402
from benchmarks.grid import NO_TIME, Point, Run  # noqa: E402
from benchmarks.longest import COMPARED, longest, needed  # noqa: E402
from benchmarks.memory import Memory  # noqa: E402
from benchmarks.method_cost import (  # noqa: E402
    BASELINES,
    measure_methods,
    measured_losses,
    usual_batch,
)
from benchmarks.peers import (  # noqa: E402
    CANDIDATES,
    HEAD,
    HIDDEN,
    IN_GRID,
    ON_ONE_SHAPE,
    OTHER_LOSSES,
    Candidate,
)
from benchmarks.results import Results, Row, load, row_key  # noqa: E402
from benchmarks.shapes import HEADS, IGNORE_INDEX, TINY, Problem, Shape, make_problem  # noqa: E402
from fused_prefopt import PreferenceLoss, available_losses  # noqa: E402

STAND_INS = {
    "llama-3": replace(TINY, name="llama-3"),
    "gemma-2": replace(TINY, name="gemma-2", softcap=5.0),
    "qwen2.5-0.5b": replace(TINY, name="qwen2.5-0.5b", hidden_size=8),
}
MEMORY = Memory(3 * 2**20, 2**20, "ok")


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiles, and no garbage is collected before each measurement."""
    monkeypatch.setattr("benchmarks.timing.gc.collect", lambda: 0)
    with torch.compiler.set_stance("force_eager"):
        yield


def rows_of(folder: Path, points: list[Point], **options: object) -> list[Row]:
    """What a run leaves on disk."""
    results = Results(folder / "grid.json", "grid")
    options = {"count": 2, "memory": lambda *_: MEMORY, "say": lambda text: None, **options}
    Run(results, **options).measure(points)  # type: ignore[arg-type]
    return load(folder)["grid"]["rows"]


def test_the_gpu_grid_runs_to_its_end(tmp_path: Path) -> None:
    points = [*gpu.telling(STAND_INS), *gpu.peers(STAND_INS), *gpu.others(STAND_INS)]
    rows = rows_of(tmp_path, points)
    assert len(rows) == sum(len(point.candidates) for point in points)
    assert not [row["candidate"] for row in rows if row["status"] == NO_TIME]
    found = {(row["candidate"], row["shape"]): row for row in rows if row["length"] == 12}
    paths = [f"ours: {path}, torch" for path in ("evaluate", "stash", "local", "recompute")]
    for name in (*paths, "ours: auto, auto", "ours: auto, 1024 MiB", "TRL"):
        for shape in STAND_INS:
            row = found[name, shape]
            assert (row["status"], row["rounds"], row["extra_bytes"]) == ("ok", 2, MEMORY.extra)
            assert row["in_p"] > 0 and row["forward_in_p"] > 0
    # Kernels take no CPU tensors outside the interpreter: named, not absent.
    assert "failed" in found["ours: local, triton", "llama-3"]["status"]
    assert {row["objective"] for row in rows} == {"dpo", "simpo", "cpo", "orpo", "kto"}


def test_the_gpu_grid_begins_with_ours_and_trls_on_every_head() -> None:
    telling, peers, others = gpu.telling(), gpu.peers(), gpu.others()
    for points in (telling, peers):
        assert [point.shape for point in points] == list(HEADS.values())
        assert {(point.dtype, point.shape.labelled_rows) for point in points} == {("bf16", 8192)}
    names = {candidate.name for candidate in telling[0].candidates}
    assert {name for name in names if not name.startswith("ours: ")} == {
        *("TRL", "TRL: frozen head", "TRL: no gradient")
    }
    assert {"ours: auto, auto", "ours: local, cublas", "ours: stash, triton"} < names
    units = gpu.units_of(telling)
    # Breadth first: no head waits for all that there is to know of another.
    assert [unit.row["shape"] for unit in units[:3]] == list(HEADS)
    assert {unit.row["candidate"] for unit in units[3:6]} == {"TRL"}
    rows = {point.shape.labelled_rows for point in others}
    shares = {point.shape.labelled for point in others}
    assert {2048, 32768} <= rows and {0.25, 1.0} <= shares
    keys = [row_key(u.row) for points in (telling, peers, others) for u in gpu.units_of(points)]
    assert len(keys) == len(set(keys))
    every = {c.name for point in (*telling, *peers, *others) for c in point.candidates}
    assert set(CANDIDATES) - every == {
        *(f"ours: {path}" for path in ("auto", "evaluate", "stash", "local", "recompute")),
        "ours: half kept",
    }


def test_the_gpu_grid_does_without_peers_and_extras() -> None:
    absent = ("psutil", "matplotlib", "trl", "liger_kernel", "cut_cross_entropy", "transformers")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent!r}))
import benchmarks.__main__
from benchmarks.grid import Point, Run
from benchmarks.peers import CANDIDATES
from benchmarks.shapes import TINY
names = ("ours: local", "TRL", "Liger", "cut-cross-entropy", "Liger: per token")
rows = {{}}
class Kept:
    def put(self, row): rows[row["candidate"]] = row["status"]
memory = lambda *_: __import__("benchmarks.memory").memory.Memory(1, 1, "ok")
point = Point(TINY, "fp32", tuple(CANDIDATES[name] for name in names))
Run(Kept(), count=1, memory=memory, say=lambda text: None).measure([point])
print(rows)
from benchmarks.results import machine
assert machine()["memory_gib"] >= 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == {
        "ours: local": "ok",
        "TRL": "unavailable: needs trl.kernels",
        "Liger": "unavailable: needs liger_kernel",
        "Liger: per token": "unavailable: needs liger_kernel.ops",
        "cut-cross-entropy": "unavailable: needs cut_cross_entropy",
    }


def test_what_no_time_is_left_for_is_named(tmp_path: Path) -> None:
    ticks = counter()
    candidates = tuple(CANDIDATES[name] for name in ("ours: local", "ours: recompute", "eager"))
    points = [Point(TINY, "fp32", candidates), Point(replace(TINY, length=14), "fp32", candidates)]
    rows = rows_of(tmp_path, points, seconds=4.0, clock=lambda: float(next(ticks)))
    found = {(row["length"], row["candidate"]): row for row in rows}
    assert len(found) == 6
    # Readings: the end, the point, then one before each candidate.
    assert [found[12, c.name]["status"] for c in candidates] == ["ok", "ok", NO_TIME]
    assert {found[14, c.name]["status"] for c in candidates} == {NO_TIME}
    assert found[12, "ours: local"]["in_p"] is None


def test_rows_are_on_disk_before_the_next_candidate(tmp_path: Path) -> None:
    seen: list[str] = []

    def spy(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        seen[:] = [row["candidate"] for row in load(tmp_path)["grid"]["rows"]]
        return CANDIDATES["eager"].forward(problem)

    point = Point(TINY, "fp32", (CANDIDATES["ours: local"], Candidate("spy", spy)))
    rows = rows_of(tmp_path, [point])
    assert "ours: local" in seen
    assert [row["status"] for row in rows if row["candidate"] == "spy"] == ["ok"]


def test_a_problem_that_does_not_fit_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Problem:
        raise MemoryError("no room")

    monkeypatch.setattr(grid, "make_problem", full)
    rows = rows_of(tmp_path, [Point(TINY, "fp32", (CANDIDATES["eager"],))])
    assert [row["status"] for row in rows] == ["failed: MemoryError: no room"]


def test_a_wrong_candidate_is_not_timed(tmp_path: Path) -> None:
    def doubled(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        sums, loss = CANDIDATES["eager"].forward(problem)
        return 2 * sums, loss

    (row,) = rows_of(tmp_path, [Point(TINY, "fp32", (Candidate("doubled", doubled),))])
    assert row["status"] == "wrong: log-probs off by 1.0e+00"
    assert (row["in_p"], row["extra_bytes"], row["rounds"]) == (None, None, 0)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_shares_label_what_they_say(share: float) -> None:
    shape = replace(TINY, labelled=share)
    problem = make_problem(shape, torch.float32)
    assert int((problem.targets != IGNORE_INDEX).sum()) == shape.labelled_rows
    assert int(problem.lengths.sum()) == shape.labelled_rows


def test_the_cpu_grid_holds_shares_rows_and_every_peer() -> None:
    points = cpu_grid.cpu_points()
    assert [point.shape.labelled for point in points["shares"]] == [0.25, 0.5, 1.0]
    rows = {(point.shape.labelled_rows, point.dtype) for point in points["rows"]}
    assert rows == {(2048, "fp32"), (2048, "bf16"), (8192, "fp32"), (8192, "bf16")}
    for point in points["rows"]:
        assert {candidate.trains for candidate in point.candidates} == {HIDDEN, HEAD}
    single, narrow = points["peers"]
    assert (single.dtype, narrow.dtype) == ("fp32", "bf16")
    names = {candidate.name for candidate in single.candidates}
    assert {*IN_GRID, *OTHER_LOSSES} < names
    # What the suite leaves out is in the grid.
    assert set(CANDIDATES) <= names | {*ON_ONE_SHAPE, "ours: auto"}


def test_the_files_of_the_cpu_grid_share_one_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = Point(TINY, "fp32", (CANDIDATES["ours: local"], CANDIDATES["eager"]))
    monkeypatch.setattr(cpu_grid, "cpu_points", lambda: {"shares": [point], "rows": [point]})
    monkeypatch.setattr(cpu_grid, "DEADLINE", 100.0)
    monkeypatch.setattr(grid, "peak_memory", lambda *_: MEMORY)
    now = [0.0]

    def say(text: str) -> None:
        now[0] += 200.0 * text.endswith("done")

    cpu_grid.run_cpu_grid(tmp_path, 1, say, clock=lambda: now[0])
    found = {
        name: [row["status"] for row in load(tmp_path)[name]["rows"]] for name in load(tmp_path)
    }
    assert found == {"shares": ["ok", "ok"], "rows": [NO_TIME, NO_TIME]}


def test_local_gets_the_room_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    point = cpu_grid.cpu_points()["rows"][0]
    (local,) = (c for c in point.candidates if c.name == "ours: local")
    rooms: list[float] = []
    real = peers.ours
    monkeypatch.setattr(
        peers, "ours", lambda *a, **options: [rooms.append(options["workspace_mb"]), real(*a)][1]
    )
    local.forward(make_problem(TINY, torch.float32))
    assert rooms == [512 + 1.125 * 4 * TINY.labelled_rows * TINY.vocab / 2**20]


SMALL = Shape("small", 2, 100, 8, 1000)  # 100 labelled rows, 200 in all


def test_counts_are_those_worked_out_by_hand() -> None:
    eager = count("eager", SMALL, 2)
    assert eager is not None
    assert eager.flops == 3 * 2 * 200 * 1000 * 8
    assert eager.moved == 3 * 2 * (200 * 8 + 1000 * 8) + 200 * 1000 * (2 * 5 + 4 * 8)
    assert eager.extra == 12 * 200 * 1000
    local = count("ours: local, cublas", SMALL, 2)
    assert local is not None
    assert local.flops == 3 * 2 * 100 * 1000 * 8
    assert local.extra == WORKSPACE + 4 * 100 * 8 + 2 * 100 * 1000
    assert local.intensity == local.flops / local.moved
    trl = count("TRL", replace(SMALL, vocab=100_000), 2)
    assert trl is not None
    assert trl.extra == 2 * 100 * 32_768 + 4 * 100_000 * 8 + 4 * 100 * 8
    assert count("nobody", SMALL, 2) is None
    assert count("Liger: kto", SMALL, 2) == count("Liger", SMALL, 2)


def test_counts_of_torchs_function_follow_its_chunks() -> None:
    options = pytest.importorskip("torch.nn.modules.linear_cross_entropy_options")
    for shape in (SMALL, *HEADS.values()):
        found = count("torch linear_cross_entropy", shape, 2)
        rows = shape.labelled_rows
        chosen = options.LinearCrossEntropyOptions()._adjust(
            rows, shape.hidden_size, shape.vocab, torch.bfloat16, torch.device("cuda")
        )
        hidden = 4 * rows * shape.hidden_size
        assert found is not None
        assert found.extra == 6 * chosen.batch_chunk_size * shape.vocab + hidden
        assert found.flops == 4 * 2 * rows * shape.vocab * shape.hidden_size
    small = count("torch linear_cross_entropy", SMALL, 2)
    assert small is not None
    assert small.moved == 4 * 2 * (100 * 8 + 1000 * 8) + 100 * 1000 * (2 * 3 + 4 * 17)


def test_counts_of_the_compiled_eager_loss() -> None:
    found = count("eager, compiled", SMALL, 2)
    assert found is not None
    assert found.flops == 3 * 2 * 200 * 1000 * 8
    assert found.moved == 3 * 2 * (200 * 8 + 1000 * 8) + 200 * 1000 * (2 * 7 + 4 * 3)
    assert found.extra == 6 * 200 * 1000


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_candidate_is_counted_but_those_that_keep_what_fits(name: str) -> None:
    assert (count(name, SMALL, 2) is None) == (name in ("ours: auto", "ours: half kept"))


@pytest.mark.parametrize("name", COMPARED)
def test_the_longest_context_fits_and_one_more_token_does_not(name: str) -> None:
    head, capacity = HEADS["llama-3"], 80 * 10**9
    tokens = longest(name, head, capacity)

    def bytes_of(length: int) -> int:
        return needed(name, replace(head, sequences=2, length=length, labelled=0.5))

    # Half a token is rounded: the next two lengths hold one more labelled row at least.
    assert bytes_of(tokens) <= capacity < bytes_of(tokens + 2)


def test_only_eager_meets_the_wall_early() -> None:
    head, capacity = HEADS["llama-3"], 80 * 10**9
    assert longest("ours: recompute", head, capacity) > 20 * longest("eager", head, capacity)
    assert longest("eager", head, 10**9) == 0
    with pytest.raises(ValueError, match="not modelled"):
        needed("ours: auto", head)


def test_every_stateful_loss_is_measured(tmp_path: Path) -> None:
    names = measured_losses()
    assert names[: len(BASELINES)] == list(BASELINES)
    assert {name for name, info in available_losses().items() if info.stateful} < set(names)
    seconds = counter()
    results = Results(tmp_path / "methods.json", "method")
    measure_methods(results, TINY, lambda text: None, clock=lambda: float(next(seconds)))
    rows = {row["candidate"]: row for row in load(tmp_path)["methods"]["rows"]}
    assert rows.keys() == set(names)
    for row in rows.values():
        assert (row["ms"], row["step_ms"], row["share"]) == (1000.0, 1000.0, 1.0)
        assert row["ms_quartiles"] == [1000.0, 1000.0]


@pytest.mark.parametrize("name", available_losses())
def test_a_usual_batch_fits_every_loss(name: str) -> None:
    batch = usual_batch(name, pairs=4)
    loss = PreferenceLoss(name).from_logps(batch).loss
    loss.backward()
    assert math.isfinite(loss.item())
    assert batch.policy.grad is not None and batch.policy.grad.abs().sum() > 0


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """Results of a tiny CPU and GPU grid."""
    pytest.importorskip("matplotlib")
    candidates = tuple(CANDIDATES[name] for name in ("ours: local", "TRL", "eager"))
    shares = [Point(replace(TINY, labelled=share), "fp32", candidates) for share in (0.5, 1.0)]
    machine = tmp_path / "results" / "h200"
    rows_of(machine, [gpu.telling(STAND_INS)[0], gpu.peers(STAND_INS)[0]])
    folder = tmp_path / "results" / "cpu"
    rows_of(folder, shares)
    (folder / "grid.json").rename(folder / "shares.json")
    measure_methods(Results(folder / "methods.json", "method"), TINY, lambda text: None)
    return tmp_path / "results"


def test_the_page_is_what_the_results_say(measured: Path, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "benchmarks.md"
    assert not benchmark_pages.check_benchmarks(page, measured)
    benchmark_pages.write_benchmarks(page, measured)
    assert benchmark_pages.check_benchmarks(page, measured)
    text = page.read_text(encoding="utf-8")
    assert "## H200" in text and "| gamma-dpo | yes |" in text
    assert "which has 2 pairs" in text
    assert "(../results/cpu/shares.png)" in text and "(../results/h200/rows.png)" in text
    assert "failed: ValueError: engine: 'triton'" in text
    for name in benchmark_pages.pictures(measured, page):
        assert (page.parent / name).stat().st_size > 1000

    path = measured / "cpu" / "methods.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["rows"][0]["ms"] += 1.0
    path.write_text(json.dumps(content), encoding="utf-8")
    assert not benchmark_pages.check_benchmarks(page, measured)


def test_the_page_does_without_what_was_not_measured(tmp_path: Path) -> None:
    text = benchmark_pages.page_text(tmp_path, tmp_path / "benchmarks.md")
    assert "## The longest context" in text and "## H200" not in text
