"""Time in ms and in P, measured in interleaved rounds."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median

import torch

FEWEST_ROUNDS = 3
Step = Callable[[], object]

# Written before each CUDA measurement, so that no step finds its inputs in the last-level cache.
_CACHE_BYTES = 2**28


@dataclass(frozen=True)
class Timing:
    """Rounds of one step; `unit_ms[i]` is the P measured right before `ms[i]`."""

    ms: tuple[float, ...]
    unit_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return median(self.ms)

    @property
    def ratios(self) -> list[float]:
        return [ms / unit for ms, unit in zip(self.ms, self.unit_ms, strict=True)]

    @property
    def in_p(self) -> float:
        """Median over the rounds of time / P."""
        return median(self.ratios)


def stopwatch(device: str) -> Callable[[Step], float]:
    """A function that runs a step once and returns the ms it took on the device."""
    return _CudaStopwatch() if device == "cuda" else _cpu_ms


def rounds(
    steps: Mapping[str, Step],
    unit: Step,
    count: int,
    device: str = "cpu",
    seconds: float = math.inf,
    spare_slow: bool = False,
) -> Iterator[dict[str, Timing]]:
    """Run every step once a round, P right before each, and yield all timings after each round.

    Run each step once before: what first touches memory, compiles or loads is not to be timed.

    Args:
        steps: name → step.
        unit: the step that takes 1 P.
        count: rounds.
        device: "cpu" or "cuda".
        seconds: start no round after these, but make `FEWEST_ROUNDS`.
        spare_slow: whether the slower half of the steps stops after `FEWEST_ROUNDS`.
    """
    measure = stopwatch(device)
    ms: dict[str, list[float]] = {name: [] for name in steps}
    units: dict[str, list[float]] = {name: [] for name in steps}
    measure(unit)
    end = time.monotonic() + seconds
    for number in range(count):
        if number >= FEWEST_ROUNDS and time.monotonic() > end:
            return
        if spare_slow and number == FEWEST_ROUNDS:
            known = {name: median(values) for name, values in ms.items()}
            steps = {n: step for n, step in steps.items() if known[n] <= median(known.values())}
        for name, step in steps.items():
            gc.collect()
            units[name].append(measure(unit))
            ms[name].append(measure(step))
        yield {name: Timing(tuple(ms[name]), tuple(units[name])) for name in ms}


def _cpu_ms(step: Step) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


class _CudaStopwatch:
    def __init__(self) -> None:
        self._cache = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._cache.zero_()
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
