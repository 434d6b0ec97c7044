"""The measuring loop on points that compute nothing: order, deadlines, failures, arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count as counter
from typing import Any

import pytest
import torch

from benchmarks.measuring import Loop, Pass, Rounds, Step, Timing, figures, quartiles, verdict
from benchmarks.results import NO_TIME, Row


@dataclass
class Log:
    """A sink, a point and its session, all of whose calls are noted."""

    names: tuple[str, ...] = ("a", "b", "c")
    rounds: int | None = None
    has_memory: bool = True
    statuses: Mapping[str, str] = field(default_factory=dict)
    full: bool = False
    calls: list[str] = field(default_factory=list)
    disk: dict[str, Row] = field(default_factory=dict)
    name: str = "point"
    unit: Step | None = None

    def put(self, row: Row) -> None:
        self.disk[row["candidate"]] = dict(row)

    def rows(self) -> dict[str, Row]:
        empty = {"status": NO_TIME, "memory_status": "not measured", "extra_bytes": None}
        return {name: {"candidate": name, **empty, **figures(None)} for name in self.names}

    def open(self, device: str, rows: Mapping[str, Row]) -> Log:
        if self.full:
            raise MemoryError("no room")
        self.unit = partial(self.calls.append, "P")
        return self

    def check(self, name: str) -> Row:
        # Whoever was checked before is on disk.
        done = [each for each, row in self.disk.items() if row["status"] != NO_TIME]
        self.calls.append(f"check {name} after {''.join(done)}")
        if self.statuses.get(name) == "raises":
            raise RuntimeError("broken")
        return {"status": self.statuses.get(name, "ok")}

    def steps(self, name: str) -> dict[str, Step]:
        return {name: partial(self.calls.append, name)}

    def figures(self, name: str, timings: Mapping[str, Timing], prefix: str) -> Row:
        return figures(timings[name], prefix)

    def release(self) -> None:
        self.calls.append("release")

    def memory(self, name: str) -> Row:
        self.calls.append(f"memory {name}")
        return {"extra_bytes": 2**20, "memory_status": "ok", "status": "ok"}


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.measuring.gc.collect", lambda: 0)


def run(log: Log, **options: Any) -> dict[str, Row]:
    Loop(log, count=2, say=lambda text: None, **options).measure([log])
    return log.disk


def statuses(rows: Mapping[str, Row], name: str = "status") -> list[str]:
    return [row[name] for row in rows.values()]


def test_errors_come_before_times_and_times_before_memory() -> None:
    log = Log(statuses={"b": "wrong: all of it", "c": "raises"}, names=tuple("abcd"))
    rows = run(log)
    assert log.calls == [
        *("check a after ", "check b after a", "check c after ab", "check d after abc"),
        *("P", "P", "a", "P", "d", "P", "a", "P", "d"),
        *("release", "memory a", "memory d"),
    ]
    assert statuses(rows) == ["ok", "wrong: all of it", "failed: RuntimeError: broken", "ok"]
    assert [row["rounds"] for row in rows.values()] == [2, 0, 0, 2]
    assert [row["extra_bytes"] for row in rows.values()] == [2**20, None, None, 2**20]


def test_passes_fill_fields_of_their_own() -> None:
    log = Log(names=("a",), has_memory=False)
    prepared: list[int] = []
    passes = (Pass(), Pass(prefix="reused_", prepare=lambda: prepared.append(len(log.calls))))
    row = run(log, passes=passes)["a"]
    assert row["rounds"] == row["reused_rounds"] == 2
    assert prepared == [1 + 5] and "memory a" not in log.calls


@pytest.mark.parametrize(
    ("seconds", "found", "memory"),
    [
        # Readings: the end, the point, then one before each thing that is begun.
        (1.0, [NO_TIME] * 3, "not measured"),
        (4.0, ["ok", "ok", NO_TIME], NO_TIME),
        (5.0, ["ok"] * 3, NO_TIME),
    ],
)
def test_what_no_time_is_left_for_is_named(seconds: float, found: list[str], memory: str) -> None:
    log, ticks = Log(), counter()
    rows = run(log, seconds=seconds, clock=lambda: float(next(ticks)))
    assert statuses(rows) == found
    assert rows["a"]["memory_status"] == memory
    assert {row["rounds"] for row in rows.values()} == {0}


def test_a_point_that_does_not_fit_is_named() -> None:
    assert statuses(run(Log(full=True))) == ["failed: MemoryError: no room"] * 3


def test_memory_alone_is_measured_where_nothing_is_timed() -> None:
    log = Log(rounds=0)
    assert statuses(run(log), "memory_status") == ["ok"] * 3
    assert log.calls == ["release", "memory a", "memory b", "memory c"]


def test_rounds_pair_each_step_with_the_unit_before_it() -> None:
    calls: list[str] = []
    steps: dict[str, Step] = {name: partial(calls.append, name) for name in "ab"}
    yielded = list(Rounds(2).time(steps, lambda: calls.append("P")))
    assert calls == ["P", *"PaPbPaPb"]
    assert [len(timed["a"].ms) for timed in yielded] == [1, 2]
    calls.clear()
    (timed,) = Rounds(1).time(steps)
    assert calls == ["a", "b"] and timed["a"].unit_ms == ()


def test_rounds_stop_in_time_but_not_before_the_fewest() -> None:
    assert len(list(Rounds(50, seconds=0.0).time({"a": int}, int))) == 3


def test_the_slower_half_is_spared_after_the_fewest_rounds(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("benchmarks.measuring.time.perf_counter", lambda: now[0])

    def taking(seconds: float) -> Callable[[], None]:
        return lambda: now.__setitem__(0, now[0] + seconds)

    steps = {name: taking(seconds) for name, seconds in {"a": 1.0, "b": 5.0, "c": 9.0}.items()}
    *_, timed = Rounds(6, spare_slow=True).time(steps, taking(0.5))
    assert {name: len(timing.ms) for name, timing in timed.items()} == {"a": 6, "b": 6, "c": 3}
    assert {name: timing.in_p for name, timing in timed.items()} == {"a": 2.0, "b": 10.0, "c": 18.0}


def test_figures_are_medians_of_ratios_with_their_quartiles() -> None:
    timing = Timing((2.0, 9.0, 40.0), (1.0, 3.0, 10.0))
    values = {"rounds": 3, "ms": 9.0, "p_ms": 3.0, "in_p": 3.0, "in_p_quartiles": [2.5, 3.5]}
    assert figures(timing, "reused_") == {f"reused_{name}": x for name, x in values.items()}
    assert quartiles([1.25], 1) == [1.2, 1.2]


def test_errors_beyond_rounding_are_wrong_and_so_is_a_nan() -> None:
    errors = {"log-probs": 1e-2, "gradient": float("nan")}
    assert verdict(errors, torch.bfloat16) == "wrong: gradient off by nan"
    assert verdict(errors, torch.float32) == "wrong: log-probs off by 1.0e-02, gradient off by nan"
