"""The longest context whose head fits a GPU, by search on the GPU itself.

One pair, half of its tokens labelled, in bf16; no backbone. A length is tried by a whole step under
the allocator, which may take no more than the capacity. Steps run in a process of their own, which
is replaced after any failure that is not a lack of memory: such a failure can leave CUDA unusable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from benchmarks.counts import count
from benchmarks.length_prober import LengthProber, StepFailed
from benchmarks.longest import CAPACITIES, COMPARED, longest
from benchmarks.peers import CANDIDATES
from benchmarks.results import NO_TIME, Results, Row
from benchmarks.shapes import HEADS, Shape

# Candidate, shape, capacity → whether it fits.
Fits = Callable[[str, Shape, int], bool]
_LEAST, _MOST = 16, 2**28
# A search ends where the shortest length that fails is this much longer than the longest that fits.
PRECISION = 1 / 16


@dataclass(frozen=True)
class Found:
    """What a search has seen.

    Attributes:
        fits: the longest length that fits, 0 where none was seen.
        fails: the shortest that does not, None where none was seen.
        probes: lengths that were tried.
    """

    fits: int
    fails: int | None
    probes: int

    @property
    def ended(self) -> bool:
        """Whether the two lengths are as near as they are to be."""
        if self.fails is None:
            return self.fits >= _MOST
        return self.fails <= _LEAST or 0 < self.fails - self.fits <= PRECISION * self.fits


def search(
    fits: Callable[[int], bool | None], start: int, late: Callable[[], bool] = lambda: False
) -> Found:
    """Double from `start` while lengths fit (or halve while none does), then bisect.

    Args:
        fits: whether a length fits, monotone; None ends the search.
        start: the first length.
        late: whether to stop with what is known.
    """
    found, length = Found(0, None, 0), min(max(start, _LEAST), _MOST)
    while not found.ended and not late():
        answer = fits(length)
        if answer is None:
            break
        side = "fits" if answer else "fails"
        found = replace(found, **{side: length}, probes=found.probes + 1)
        if found.fails is None:
            length = min(2 * found.fits, _MOST)
        else:
            length = max(_LEAST, (found.fits + found.fails) // 2)
    return found


@dataclass(frozen=True)
class ContextRun:
    """How contexts are searched for.

    Attributes:
        results: where the rows go.
        seconds: after these no length is tried.
        fits: candidate, shape, capacity → whether a step fits; raises TimeoutError where there is
            no answer in time, StepFailed where the step fails for another reason.
        clock: seconds that go by.
        say: gets a line of progress now and then.
    """

    results: Results
    seconds: float
    fits: Fits
    clock: Callable[[], float] = time.monotonic
    say: Callable[[str], None] = print

    def measure(
        self, heads: Mapping[str, Shape] = HEADS, capacities: Mapping[str, int] = CAPACITIES
    ) -> None:
        """Every candidate, on the first head and the first capacity first."""
        end = self.clock() + self.seconds
        for head in heads.values():
            for capacity in capacities.values():
                for name in COMPARED:
                    about = _about(name, head, capacity)
                    if self.results.done(about):
                        continue
                    row = self._row(about, name, head, capacity, lambda: self.clock() >= end)
                    if row["probes"] or not self.results.holds(about):
                        self.results.put(row)
                    self.say(f"{head.name}, {capacity / 1e9:.0f} GB: {name}: {row['longest']}")

    def _row(
        self, about: Row, name: str, head: Shape, capacity: int, late: Callable[[], bool]
    ) -> Row:
        problems: list[str] = []

        def runs(length: int) -> bool | None:
            shape = replace(head, sequences=2, length=length, labelled=0.5)
            try:
                return self.fits(name, shape, capacity)
            except TimeoutError:
                return None
            except StepFailed as error:
                problems.append(str(error))
                return False

        def fits(length: int) -> bool | None:
            known = len(problems)
            answer = runs(length)
            if len(problems) == 1 > known and not runs(_LEAST):
                # It fails at any length: nothing is to be found.
                return None
            return answer

        predicted = longest(name, head, capacity) if count(name, head, 2) else None
        found = search(fits, (predicted or 2 * _LEAST) * 3 // 4, late)
        status = "ok" if found.ended and found.fits else NO_TIME
        if problems and not found.fits:
            status = problems[-1]
        elif found.fails is not None and found.fails <= _LEAST:
            status = "failed: the shortest length does not fit"
        return {
            **about,
            "longest": found.fits or None,
            "fails_at": found.fails,
            "ended_by": problems[-1] if problems else "memory",
            "probes": found.probes,
            "predicted": predicted,
            "status": status,
        }


def _about(name: str, head: Shape, capacity: int) -> Row:
    """What a row is about."""
    return {
        "candidate": name,
        "shape": head.name,
        "sequences": 2,
        "hidden_size": head.hidden_size,
        "vocab": head.vocab,
        "dtype": "bf16",
        "trains": CANDIDATES[name].trains,
        "capacity_bytes": capacity,
    }


def run_contexts(results: Results, seconds: float, say: Callable[[str], None]) -> None:
    """Search on the first GPU."""
    with LengthProber(time.monotonic() + seconds) as prober:
        ContextRun(results, seconds, prober, say=say).measure()
