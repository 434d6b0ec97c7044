"""What is measured on a CPU: the points of its grid, its deadline, and batches for every loss."""

from __future__ import annotations

import math
import pickle
from functools import partial
from itertools import count
from pathlib import Path

import pytest

pytest.importorskip("psutil")

from benchmarks import cpu_runs, memory  # noqa: E402
from benchmarks.candidates import (  # noqa: E402
    CANDIDATES,
    HEAD,
    HIDDEN,
    IN_GRID,
    ON_ONE_SHAPE,
    OTHER_LOSSES,
)
from benchmarks.cpu_runs import BASELINES, cpu_points, measured_losses, usual_batch  # noqa: E402
from benchmarks.head_points import GridPoint  # noqa: E402
from benchmarks.memory import Memory  # noqa: E402
from benchmarks.results import NO_TIME, load  # noqa: E402
from benchmarks.shapes import TINY  # noqa: E402
from fused_prefopt import PreferenceLoss, available_losses  # noqa: E402


def test_the_grid_holds_shares_rows_and_every_peer() -> None:
    points = cpu_points()
    assert [point.shape.labelled for point in points["shares"]] == [0.25, 0.5, 1.0]
    rows = {(point.shape.labelled_rows, point.dtype) for point in points["rows"]}
    assert rows == {(2048, "fp32"), (2048, "bf16"), (8192, "fp32"), (8192, "bf16")}
    for point in points["rows"]:
        assert {candidate.trains for candidate in point.candidates} == {HIDDEN, HEAD}
        (local,) = (c for c in point.candidates if c.name == "ours: local")
        assert local.forward != CANDIDATES["ours: local"].forward
    single, narrow = points["peers"]
    assert (single.dtype, narrow.dtype) == ("fp32", "bf16")
    names = {candidate.name for candidate in single.candidates}
    assert {*IN_GRID, *OTHER_LOSSES} < names
    # What is not measured on one shape is in the grid.
    assert set(CANDIDATES) <= names | {*ON_ONE_SHAPE, "ours: auto"}


def test_the_files_of_the_grid_share_one_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = GridPoint(TINY, "fp32", (CANDIDATES["ours: local"], CANDIDATES["eager"]))
    monkeypatch.setattr(cpu_runs, "cpu_points", lambda: {"shares": [point], "rows": [point]})
    monkeypatch.setattr(cpu_runs, "GRID_DEADLINE", 100.0)
    monkeypatch.setattr(memory, "peak_memory", lambda *_: Memory(1, 1, "ok"))
    now = [0.0]

    def say(text: str) -> None:
        now[0] += 200.0 * text.endswith("done")

    cpu_runs.run_grid(tmp_path, 1, say, clock=lambda: now[0])
    found = {
        name: [row["status"] for row in content["rows"]] for name, content in load(tmp_path).items()
    }
    assert found == {"shares": ["ok", "ok"], "rows": [NO_TIME, NO_TIME]}


def test_what_a_process_of_its_own_runs_can_be_sent_to_it(tmp_path: Path) -> None:
    work = partial(cpu_runs._measure_laptop, "fp32", tmp_path, 1, 1.0)
    found = pickle.loads(pickle.dumps(work))
    assert (found.func, found.args) == (work.func, work.args)


def test_every_stateful_loss_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = measured_losses()
    assert names[: len(BASELINES)] == list(BASELINES)
    assert {name for name, info in available_losses().items() if info.stateful} < set(names)
    seconds = count()
    monkeypatch.setattr("benchmarks.measuring.time.perf_counter", lambda: float(next(seconds)))
    cpu_runs.run_methods(tmp_path, lambda text: None, TINY, calls=3)
    rows = load(tmp_path)["methods"]["rows"]
    assert [row["candidate"] for row in rows] == names
    for row in rows:
        assert (row["ms"], row["step_ms"], row["share"]) == (1000.0, 1000.0, 1.0)
        assert row["ms_quartiles"] == [1000.0, 1000.0]


@pytest.mark.parametrize("name", available_losses())
def test_a_usual_batch_fits_every_loss(name: str) -> None:
    batch = usual_batch(name, pairs=4)
    loss = PreferenceLoss(name).from_logps(batch).loss
    loss.backward()
    assert math.isfinite(loss.item())
    assert batch.policy.grad is not None and batch.policy.grad.abs().sum() > 0
