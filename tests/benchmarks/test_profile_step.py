"""A profile's arithmetic, and what it shows of a path."""

from __future__ import annotations

from benchmarks.profile_step import Span, Timeline, lines_of, run_profile


def test_a_timeline_tells_shares_and_gaps() -> None:
    spans = (Span("a", 0, 4), Span("b", 3, 6), Span("a", 10, 12), Span("c", 13, 20))
    timeline = Timeline(spans)
    assert timeline.whole == 20
    assert timeline.gaps() == [(4, "a"), (1, "c")]
    assert timeline.shares() == [("c", 7, 1), ("a", 6, 2), ("b", 3, 1)]
    first, *others = lines_of(timeline, unit_ms=0.01)
    assert first == "0.020 ms (2.00 P of 0.010 ms), 4 launches, idle 25.0% in 2 gaps"
    assert others[0].split() == ["35.0%", "0.007", "ms", "1", "x", "c"]
    assert Timeline(()).whole == 0 and Timeline(()).gaps() == []


def test_the_profile_shows_matmuls_of_the_path() -> None:
    said: list[str] = []
    assert run_profile(["gemma-2:stash"], said.append, "cpu") == 0
    assert said[0] == "gemma-2:stash, 24 labelled rows, bf16, cpu:"
    assert any("aten::addmm" in line for line in said)
    assert run_profile(["gemma-2:none"], said.append, "cpu") == 2
    assert "wanted HEAD:PATH of llama-3, gemma-2" in said[-1]
