"""The search for the longest context, with memory that is made up."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import count as counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("psutil")

from benchmarks.context_search import (  # noqa: E402
    COMPARED,
    PRECISION,
    SEARCHED,
    ContextRun,
    LengthProber,
    StepFailed,
    longest,
    needed,
    search,
)
from benchmarks.results import NO_TIME, Results, Row, load  # noqa: E402
from benchmarks.shapes import HEADS, TINY, Shape, make_problem  # noqa: E402
from benchmarks.tables import context_sections, context_table  # noqa: E402

LLAMA = {"llama-3": HEADS["llama-3"]}
GB = 10**9


def rows_of(folder: Path, fits: Any, seconds: float = 1e9, **options: Any) -> dict[str, Row]:
    """What a search leaves that begins with what is on disk."""
    results = Results.resumed(folder / "context.json", "context")
    run = ContextRun(results, seconds, fits, say=lambda text: None, **options)
    run.measure(LLAMA, {"80 GB": 80 * GB})
    return {row["candidate"]: row for row in load(folder)["context"]["rows"]}


@pytest.mark.parametrize("start", [1, 16, 900, 10**6])
@pytest.mark.parametrize("limit", [16, 17, 100, 12_345, 10**6])
def test_the_search_finds_the_limit(limit: int, start: int) -> None:
    found = search(lambda length: length <= limit, start)
    assert found.fails is not None
    assert found.fits <= limit < found.fails <= (1 + PRECISION) * found.fits
    assert found.probes < 40


def test_the_search_ends_where_nothing_and_where_everything_fits() -> None:
    nothing = search(lambda length: False, 5000)
    assert (nothing.fits, nothing.fails) == (0, 16)
    everything = search(lambda length: True, 5000)
    assert (everything.fits, everything.fails) == (2**28, None)


def test_a_search_stops_with_what_it_knows() -> None:
    answers = iter([True, True, None])
    found = search(lambda length: next(answers), 100)
    assert (found.fits, found.fails, found.probes, found.ended) == (200, None, 2, False)
    late = iter([False, True])
    assert search(lambda length: True, 100, lambda: next(late)).fits == 100


def test_every_candidate_is_searched_for_by_its_memory(tmp_path: Path) -> None:
    def fits(name: str, shape: Shape, capacity: int) -> bool:
        assert shape.sequences == 2 and shape.labelled == 0.5
        return needed(name, shape) <= capacity

    rows = rows_of(tmp_path, fits)
    assert list(rows) == list(COMPARED)
    for name, row in rows.items():
        wanted = longest(name, HEADS["llama-3"], 80 * GB)
        assert (row["status"], row["predicted"], row["ended_by"]) == ("ok", wanted, "memory")
        assert row["longest"] <= wanted <= (1 + PRECISION) * row["longest"] + 2


def test_other_failures_end_a_search_by_name(tmp_path: Path) -> None:
    tried: list[int] = []

    def fits(name: str, shape: Shape, capacity: int) -> bool:
        if name == "TRL":
            tried.append(shape.length)
            raise StepFailed("unavailable: needs trl")
        if name == "Liger" and shape.length > 3000:
            raise StepFailed("failed: RuntimeError: index overflow")
        return needed(name, shape) <= capacity

    rows = rows_of(tmp_path, fits)
    assert rows["TRL"]["status"] == "unavailable: needs trl"
    assert rows["TRL"]["longest"] is None
    assert tried[1:] == [16]
    liger = rows["Liger"]
    assert (liger["status"], liger["ended_by"]) == ("ok", "failed: RuntimeError: index overflow")
    assert 2800 < liger["longest"] <= 3000
    text = context_table(list(rows.values()))
    assert "| unavailable: needs trl |" in text and "index overflow" in text


def test_what_no_time_is_left_for_is_named(tmp_path: Path) -> None:
    ticks = counter()
    rows = rows_of(tmp_path, lambda *_: True, seconds=3.0, clock=lambda: float(next(ticks)))
    first, *others = rows.values()
    assert first["longest"] > 0 and first["status"] == NO_TIME
    assert {row["status"] for row in others} == {NO_TIME}
    assert {row["longest"] for row in others} == {None}
    assert f"({NO_TIME})" in context_table([first])

    def slow(*_: object) -> bool:
        raise TimeoutError

    # No answer in time is no length that fails.
    row = rows_of(tmp_path / "slow", slow)["ours: recompute"]
    assert (row["status"], row["longest"], row["fails_at"]) == (NO_TIME, None, None)


def test_the_sections_show_what_was_searched(tmp_path: Path) -> None:
    rows_of(tmp_path, lambda name, shape, capacity: shape.length <= 10_000)
    content = load(tmp_path)["context"]
    parts = context_sections({"H200": content})
    assert "### Searched on an H200" in parts
    assert "| ours: recompute | llama-3 | 80 |" in parts[-1]
    assert len(context_sections({})) == 2


def test_local_is_searched_with_the_room_for_its_probabilities() -> None:
    shape = replace(TINY, sequences=2)
    problem = make_problem(shape, torch.float32)
    sums, _ = SEARCHED["ours: local"].forward(problem)
    wanted, _ = SEARCHED["eager"].forward(problem)
    torch.testing.assert_close(sums, wanted)
    assert set(COMPARED) <= set(SEARCHED)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the step would run")
def test_the_prober_tells_failure_and_delay() -> None:
    end = time.monotonic() + 300
    with LengthProber(end) as prober, pytest.raises(StepFailed, match="failed: "):
        prober("eager", TINY, GB)
    with LengthProber(0.0) as prober, pytest.raises(TimeoutError):
        prober("eager", TINY, GB)


@pytest.mark.parametrize("name", COMPARED)
def test_the_longest_context_fits_and_one_more_token_does_not(name: str) -> None:
    head, capacity = HEADS["llama-3"], 80 * GB
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


def test_contexts_that_are_known_are_not_searched_again(tmp_path: Path) -> None:
    tried: list[str] = []

    def fits(name: str, shape: object, capacity: int) -> bool:
        tried.append(name)
        return name != "eager"

    first = rows_of(tmp_path, fits)
    assert set(tried) == set(COMPARED) and first["eager"]["status"] != "ok"
    tried.clear()
    assert rows_of(tmp_path, fits) == first
    assert set(tried) == {"eager"}
