"""Whole trainer steps on a tiny model: values, bookkeeping and the page, never times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

for name in ("psutil", "trl", "peft", "datasets"):
    pytest.importorskip(name)

from benchmarks import trainer_steps  # noqa: E402
from benchmarks.measuring import Loop  # noqa: E402
from benchmarks.results import Results, Row, load  # noqa: E402
from benchmarks.tables import trainer_table  # noqa: E402
from benchmarks.trainer_steps import (  # noqa: E402
    StepMemory,
    TrainerPoint,
    beside_eager,
    compared,
    row_of,
    step_memory,
)
from benchmarks.trainers import (  # noqa: E402
    BETA,
    EAGER,
    EVERYWHERE,
    MEMORY,
    ON_CPU,
    ON_GPU,
    TIME,
    TRAINERS,
    Setup,
    Stepper,
    Taken,
    make_features,
    make_model,
)

SMALL = Setup("all", 1, 2, 12, "fp32", rounds=2, hidden_size=64, vocab=97)
OURS, TRL = "ours: PreferenceTrainer", "TRL DPOTrainer"
DEAD = "failed: process ended with code -9"


def rows_of(folder: Path, *points: TrainerPoint) -> dict[tuple[str, str], Row]:
    """What the loop leaves on disk, by trainer and what trains."""
    results = Results(folder / "trainer.json", "trainer")
    Loop(results, say=lambda text: None).measure(points)
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
    setups = SMALL, replace(SMALL, trains="adapter", rounds=1)
    rows = rows_of(tmp_path, *map(TrainerPoint, setups))
    assert len(rows) == 2 * len(EVERYWHERE)
    for (name, trains), row in rows.items():
        assert (row["status"], row["rounds"]) == ("ok", 2 if trains == "all" else 1)
        assert row["gradient_norm"] > 0 and row["ms"] > 0
        assert name == EAGER or (row["distance"] < 1e-5 and row["of_eager"] > 0)
    assert rows[EAGER, "all"]["of_eager"] == 1.0
    # A wrong batch or rate would show as another loss.
    assert rows[EAGER, "all"]["loss"] != rows[EAGER, "adapter"]["loss"]


def test_wrong_missing_and_failing_trainers_are_named(tmp_path: Path, monkeypatch: Any) -> None:
    def missing(*_: object) -> Any:
        raise ModuleNotFoundError("No module named 'absent'", name="absent")

    def doubled(setup: Setup, folder: Path, device: str) -> Any:
        trainer = TRAINERS[EAGER](setup, folder, device)
        loss_of = trainer.compute_loss
        trainer.compute_loss = lambda *a, **k: 2 * loss_of(*a, **k)
        return trainer

    monkeypatch.setitem(TRAINERS, OURS, doubled)
    monkeypatch.setitem(TRAINERS, TRL, missing)
    rows = rows_of(tmp_path, TrainerPoint(SMALL, (EAGER, OURS, TRL)))
    assert {name: row["status"] for (name, _), row in rows.items()} == {
        EAGER: "ok",
        OURS: "wrong: loss off by 1.0e+00, gradient norm off by 1.0e+00",
        TRL: "unavailable: needs absent",
    }
    assert rows[OURS, "all"]["ms"] is rows[TRL, "all"]["ms"] is None
    assert "| unavailable: needs absent |  |" in trainer_table(list(rows.values()))


@pytest.mark.parametrize("dead", [False, True])
def test_memory_without_a_time_is_checked_against_the_eager_step(
    tmp_path: Path, dead: bool
) -> None:
    def memory_of(name: str, *_: object) -> StepMemory:
        if dead and name == EAGER:
            return StepMemory(None, None, None, DEAD)
        loss = {OURS: 0.6, TRL: 0.5004}.get(name, 0.5)
        return StepMemory(7 * 2**20, 2**20, Taken(loss, 1.0), "ok")

    setup = replace(SMALL, rounds=0, memory=True)
    rows = rows_of(tmp_path, TrainerPoint(setup, memory_of=memory_of))
    found = {name: (row["status"], row["distance"]) for (name, _), row in rows.items()}
    if dead:
        assert (found[EAGER], found[OURS]) == ((DEAD, None), ("ok", None))
    else:
        assert rows[EAGER, "all"]["extra_bytes"] == 7 * 2**20
        assert found[OURS] == ("wrong: loss off by 2.0e-01", pytest.approx(0.2))
        assert found[TRL] == ("ok", pytest.approx(8e-4))


def test_memory_beside_a_time_keeps_the_verdict(tmp_path: Path) -> None:
    setup = replace(SMALL, rounds=1, memory=True)
    dead = TrainerPoint(setup, (EAGER,), lambda *_: StepMemory(None, None, None, DEAD))
    row = rows_of(tmp_path, dead)[EAGER, "all"]
    assert (row["status"], row["memory_status"], row["rounds"]) == ("ok", DEAD, 1)
    assert DEAD in trainer_table([row]).splitlines()[2]


def test_a_loss_that_is_not_finite_is_wrong() -> None:
    taken = Taken(float("nan"), 1.0)
    found = compared(taken, None, "fp32")
    assert found["status"] == "wrong: its loss or gradient is not finite"
    eager = {**row_of(EAGER, SMALL), "loss": 1.0, "gradient_norm": 1.0}
    assert compared(taken, eager, "fp32")["status"] == "wrong: loss off by nan"


def test_times_are_paired_with_the_eager_trainers_of_the_round() -> None:
    found = beside_eager([2.0, 6.0, 30.0], [1.0, 2.0, 60.0])
    assert (found["ms"], found["ms_quartiles"]) == (6.0, [4.0, 18.0])
    assert (found["of_eager"], found["rounds"]) == (2.0, 3)
    assert "of_eager" not in beside_eager([1.0], None)


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
    monkeypatch.setattr(trainer_steps, "LIMIT", 10 * 2**20)
    assert step_memory(EAGER, setup).status.startswith("failed: ")
