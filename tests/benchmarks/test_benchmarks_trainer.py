"""Whole trainer steps on a tiny model: values, bookkeeping and the page, never times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count as counter
from pathlib import Path
from typing import Any

import pytest
import torch

for name in ("psutil", "trl", "peft", "datasets"):
    pytest.importorskip(name)

from benchmarks import trainer_candidates, trainer_memory  # noqa: E402
from benchmarks.compare import compare as regressions  # noqa: E402
from benchmarks.results import NO_TIME, Results, Row, load  # noqa: E402
from benchmarks.trainer_candidates import EAGER, TRAINERS, Stepper, Taken  # noqa: E402
from benchmarks.trainer_memory import StepMemory, step_memory  # noqa: E402
from benchmarks.trainer_pages import draw_trainer, trainer_table  # noqa: E402
from benchmarks.trainer_setups import (  # noqa: E402
    BETA,
    MEMORY,
    ON_CPU,
    ON_GPU,
    TIME,
    Setup,
    make_features,
    make_model,
)
from benchmarks.trainer_steps import TrainerRun, compare, figures, row_of  # noqa: E402

SMALL = Setup("all", 1, 2, 12, "fp32", rounds=2, hidden_size=64, vocab=97)
OURS, TRL = "ours: PreferenceTrainer", "TRL DPOTrainer"


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No garbage is collected before each measurement."""
    monkeypatch.setattr("benchmarks.trainer_steps.gc.collect", lambda: 0)
    yield


def rows_of(folder: Path, setups: list[Setup], **options: Any) -> dict[tuple[str, str], Row]:
    """What a run leaves on disk, by trainer and what trains."""
    results = Results(folder / "trainer.json", "trainer")
    TrainerRun(results, say=lambda text: None, **options).measure(setups)
    rows = load(folder)["trainer"]["rows"]
    return {(row["candidate"], row["trains"]): row for row in rows}


def test_the_setups_are_the_whole_model_and_both_ways_to_train() -> None:
    for setups in (TIME, MEMORY, ON_GPU):
        assert [setup.trains for setup in setups] == ["all", "adapter"]
    assert set(ON_CPU) == {*TIME, *MEMORY}
    for setup in (*MEMORY, *ON_GPU):
        assert (setup.layers, setup.hidden_size, setup.vocab) == (24, 896, 151_936)
        assert setup.dtype == "bf16" and setup.memory
    assert all(setup.rounds for setup in (*TIME, *ON_GPU))
    assert (SMALL.rows, SMALL.labelled_rows) == (48, 24)


def test_the_eager_trainer_takes_the_loss_of_float64(tmp_path: Path) -> None:
    taken = Stepper(EAGER, SMALL, tmp_path).step(check=True)
    model = make_model(SMALL).double()
    margins = []
    for pair in make_features(SMALL):
        sums = []
        for answer in ("chosen", "rejected"):
            ids = torch.tensor([pair["prompt_ids"] + pair[f"{answer}_ids"]])
            logps = model(ids).logits[0, :-1].log_softmax(-1)
            picked = logps.gather(1, ids[0, 1:, None])[len(pair["prompt_ids"]) - 1 :, 0]
            sums.append(picked.sum() - pair[f"ref_{answer}_logps"])
        margins.append(BETA * (sums[0] - sums[1]))
    loss = -torch.nn.functional.logsigmoid(torch.stack(margins)).mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert taken.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert taken.gradient_norm == pytest.approx(float(norm), rel=1e-5)


def test_every_trainer_takes_the_same_step(tmp_path: Path) -> None:
    setups = [SMALL, replace(SMALL, trains="adapter", rounds=1)]
    rows = rows_of(tmp_path, setups)
    assert len(rows) == 2 * len(TRAINERS)
    for (name, trains), row in rows.items():
        assert (row["status"], row["rounds"]) == ("ok", 2 if trains == "all" else 1)
        assert row["gradient_norm"] > 0 and row["ms"] > 0
        if name != EAGER:
            assert row["distance"] < 1e-5
            assert row["of_eager"] > 0
    assert rows[EAGER, "all"]["of_eager"] == 1.0
    # A wrong batch or rate would show as another loss.
    assert rows[EAGER, "all"]["loss"] != rows[EAGER, "adapter"]["loss"]


def test_wrong_missing_and_failing_trainers_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> Any:
        raise ModuleNotFoundError("No module named 'absent'", name="absent")

    def doubled(setup: Setup, folder: Path, device: str) -> Any:
        trainer = trainer_candidates._eager(setup, folder, device)
        loss_of = trainer.compute_loss
        trainer.compute_loss = lambda *a, **k: 2 * loss_of(*a, **k)
        return trainer

    def full(*_: object) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setitem(TRAINERS, OURS, doubled)
    monkeypatch.setitem(TRAINERS, TRL, missing)
    monkeypatch.setitem(TRAINERS, "full", full)
    rows = rows_of(tmp_path, [SMALL])
    assert rows[EAGER, "all"]["status"] == "ok"
    assert rows[OURS, "all"]["status"] == (
        "wrong: loss off by 1.0e+00, gradient norm off by 1.0e+00"
    )
    assert rows[TRL, "all"]["status"] == "unavailable: needs absent"
    assert "can't allocate memory" in rows["full", "all"]["status"]
    for name in (OURS, TRL, "full"):
        assert (rows[name, "all"]["rounds"], rows[name, "all"]["ms"]) == (0, None)
    text = trainer_table(list(rows.values()))
    assert "| unavailable: needs absent |  |" in text


def remembered(name: str, setup: Setup, device: str) -> StepMemory:
    if name == EAGER:
        return StepMemory(None, None, None, "failed: process ended with code -9")
    return StepMemory(7 * 2**20, 2**20, Taken(0.5, 1.0), "ok")


def test_memory_without_a_time_is_checked_against_the_eager_step(tmp_path: Path) -> None:
    setup = replace(SMALL, rounds=0, memory=True)

    def other(name: str, *_: object) -> StepMemory:
        loss = {OURS: 0.6, TRL: 0.5004}.get(name, 0.5)
        return StepMemory(7 * 2**20, 2**20, Taken(loss, 1.0), "ok")

    rows = rows_of(tmp_path, [setup], memory=other)
    assert rows[EAGER, "all"]["extra_bytes"] == 7 * 2**20
    assert rows[OURS, "all"]["status"] == "wrong: loss off by 2.0e-01"
    assert rows[TRL, "all"]["status"] == "ok"
    assert rows[TRL, "all"]["distance"] == pytest.approx(8e-4)


def test_a_dead_eager_trainer_leaves_the_others_uncompared(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [replace(SMALL, rounds=0, memory=True)], memory=remembered)
    assert rows[EAGER, "all"]["status"] == "failed: process ended with code -9"
    assert (rows[OURS, "all"]["status"], rows[OURS, "all"]["distance"]) == ("ok", None)


def test_memory_beside_a_time_keeps_the_verdict(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [replace(SMALL, rounds=1, memory=True)], memory=remembered)
    assert rows[EAGER, "all"]["status"] == "ok"
    assert rows[EAGER, "all"]["memory_status"] == "failed: process ended with code -9"
    assert rows[OURS, "all"]["loss"] != 0.5
    line = trainer_table([rows[EAGER, "all"]]).splitlines()[2]
    assert "failed: process ended with code -9" in line


def test_a_loss_that_is_not_finite_is_wrong() -> None:
    row = row_of(EAGER, SMALL)
    compare(row, Taken(float("nan"), 1.0), row)
    assert row["status"] == "wrong: its loss or gradient is not finite"
    eager, row = {**row, "status": "ok", "loss": 1.0, "gradient_norm": 1.0}, row_of(OURS, SMALL)
    compare(row, Taken(float("nan"), 1.0), eager)
    assert row["status"] == "wrong: loss off by nan"


def test_what_no_time_is_left_for_is_named(tmp_path: Path) -> None:
    ticks = counter()
    # Readings: the end, then one before each trainer.
    rows = rows_of(tmp_path, [SMALL], seconds=3.0, clock=lambda: float(next(ticks)))
    found = [row["status"] for row in rows.values()]
    assert found == ["ok", "ok", NO_TIME, NO_TIME]


def test_figures_pair_the_rounds() -> None:
    found = figures([2.0, 6.0, 30.0], [1.0, 2.0, 60.0])
    assert (found["ms"], found["ms_quartiles"]) == (6.0, [4.0, 18.0])
    assert (found["of_eager"], found["rounds"]) == (2.0, 3)
    assert "of_eager" not in figures([1.0], None)


def test_more_memory_is_a_regression() -> None:
    row = {**row_of(OURS, SMALL), "status": "ok", "extra_bytes": 10 * 2**20}
    worse = {**row, "extra_bytes": 30 * 2**20}
    (change,) = regressions({"rows": [row]}, {"rows": [worse]})
    assert change.field == "extra_bytes"


@pytest.mark.slow
def test_a_child_measures_the_step_and_dies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup("all", 1, 2, 64, "fp32", memory=True, hidden_size=64, vocab=40_000)
    logits = 4 * setup.rows * setup.vocab
    eager, ours = (step_memory(name, setup) for name in (EAGER, OURS))
    assert eager.extra is not None and ours.extra is not None
    assert ours.gradients == eager.gradients and eager.gradients is not None
    assert eager.extra - eager.gradients > 1.9 * logits
    assert ours.extra < eager.extra - logits
    assert eager.taken is not None and ours.taken is not None
    assert eager.taken.loss == pytest.approx(ours.taken.loss, rel=1e-4)
    monkeypatch.setattr(trainer_memory, "LIMIT", 10 * 2**20)
    assert step_memory(EAGER, setup).status.startswith("failed: ")


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    timed = {**row_of(OURS, SMALL), "status": "ok", "ms": 5.0}
    kept = {**row_of(OURS, replace(SMALL, layers=2)), "status": "ok", "extra_bytes": 2**30}
    draw_trainer([timed, kept], tmp_path / "trainer.png")
    assert (tmp_path / "trainer.png").stat().st_size > 1000
