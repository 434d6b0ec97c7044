"""The kernels of one step by `torch.profiler`: their share of its time, and where the device waits.

On a CPU the operations of the same path on a tiny head, so that the command can be tried anywhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.candidates import CANDIDATES, step
from benchmarks.shapes import DTYPES, HEADS, TINY, Shape, bare_matmul, make_problem
from fused_prefopt.ops.plan import PATHS

TELLING = ("llama-3:recompute", "qwen2.5-0.5b:evaluate")
_MOST_NAMES, _MOST_GAPS = 12, 5


@dataclass(frozen=True)
class Span:
    """A kernel, or on a CPU an operation of torch: name, start and end in µs."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Spans of a step, in their order."""

    spans: tuple[Span, ...]

    @property
    def whole(self) -> float:
        """µs from the first start to the last end."""
        if not self.spans:
            return 0.0
        return max(span.end for span in self.spans) - self.spans[0].start

    def gaps(self) -> list[tuple[float, str]]:
        """(µs in which nothing ran, the name of what ran then), the longest first."""
        found, busy_until = [], self.spans[0].start if self.spans else 0.0
        for span in self.spans:
            if span.start > busy_until:
                found.append((span.start - busy_until, span.name))
            busy_until = max(busy_until, span.end)
        return sorted(found, reverse=True)

    def shares(self) -> list[tuple[str, float, int]]:
        """(name, µs, calls), the longest first."""
        taken: dict[str, list[float]] = defaultdict(list)
        for span in self.spans:
            taken[span.name].append(span.end - span.start)
        found = [(name, sum(each), len(each)) for name, each in taken.items()]
        return sorted(found, key=lambda entry: -entry[1])


def read_case(case: str) -> tuple[Shape, str]:
    """Head and path of `head:path`.

    Raises:
        ValueError: there is no such head or path.
    """
    head, _, path = case.partition(":")
    if head not in HEADS or path not in PATHS:
        heads, paths = ", ".join(HEADS), ", ".join(PATHS)
        raise ValueError(f"CASE: got {case!r}, wanted HEAD:PATH of {heads} and {paths}")
    return HEADS[head], path


def timeline_of(run: Callable[[], object], device: str) -> Timeline:
    """A timeline of one call on a device; call it once before, so that nothing compiles here."""
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events: Sequence[Any] = recorded.events() or ()
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == kind
        and not event.is_user_annotation
        and (on_gpu or _outermost(event))
    ]
    return Timeline(tuple(sorted(spans, key=lambda span: span.start)))


def _outermost(event: Any) -> bool:
    """Whether an event is an operation of torch that no other one has called."""
    parent = event.cpu_parent
    return event.name.startswith("aten::") and not (parent and parent.name.startswith("aten::"))


def lines_of(timeline: Timeline, unit_ms: float) -> list[str]:
    """The report: whole time, idle time, the longest kernels and the longest gaps."""
    whole, gaps = timeline.whole, timeline.gaps()
    idle = sum(length for length, _ in gaps)
    share = idle / whole if whole else 0.0
    found = [
        f"{whole / 1e3:.3f} ms ({whole / 1e3 / unit_ms:.2f} P of {unit_ms:.3f} ms),"
        f" {len(timeline.spans)} launches, idle {share:.1%} in {len(gaps)} gaps"
    ]
    for name, taken, calls in timeline.shares()[:_MOST_NAMES]:
        found.append(f"{taken / whole:7.1%} {taken / 1e3:10.3f} ms {calls:6d} x  {name[:90]}")
    for length, before in gaps[:_MOST_GAPS]:
        found.append(f"gap of {length:.0f} us before {before[:90]}")
    return found


def run_profile(cases: Sequence[str], say: Callable[[str], None], device: str | None = None) -> int:
    """Profile one step of each case, `TELLING` by default; returns the exit status.

    Args:
        cases: each `HEAD:PATH`, of `HEADS` and the op's paths.
        say: gets the lines of the report.
        device: "cpu" or "cuda"; the GPU if there is one, by default.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        known = [(case, *read_case(case)) for case in cases or TELLING]
    except ValueError as error:
        say(str(error))
        return 2
    for case, shape, path in known:
        if device == "cpu":
            shape = replace(TINY, name=shape.name, softcap=shape.softcap)
        problem = make_problem(shape, DTYPES["bf16"], device)
        candidate, unit = CANDIDATES[f"ours: {path}"], bare_matmul(problem)
        for _ in range(2):
            step(candidate, problem)
            unit()
        problem.clear()
        unit_ms = timeline_of(unit, device).whole / 1e3
        say(f"{case}, {shape.labelled_rows} labelled rows, bf16, {device}:")
        for line in lines_of(timeline_of(partial(step, candidate, problem), device), unit_ms):
            say(f"  {line}")
        problem.clear()
    return 0
