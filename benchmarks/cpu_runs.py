"""Measurements on a CPU: the README's candidates, the memory sweep, the grid, and the losses.

The grid holds labelled shares, rows and dtypes, each with a head that trains and a frozen one, and
every peer. What a loss takes of a step is measured for every stateful one and what they extend.
"""

from __future__ import annotations

import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.candidates import (
    CANDIDATES,
    IN_GRID,
    IN_SWEEP,
    ON_ONE_SHAPE,
    OTHER_LOSSES,
    ours_with_room,
    step,
)
from benchmarks.head_points import GridPoint, HeadPoint, about
from benchmarks.measuring import Loop, Pass, Rounds, Timing, quartiles
from benchmarks.memory import Memory, keep_freed_memory, not_measured, peak_memory
from benchmarks.results import NO_TIME, RESULTS, Results, Row
from benchmarks.shapes import DTYPES, LAPTOP, SWEEP_LENGTH, SWEEP_VOCAB, Shape, make_problem
from fused_prefopt import LogpBatch, PreferenceLoss, available_losses
from fused_prefopt.losses import find

# Nothing is begun after these: what is under way by then ends before ten minutes.
CPU_DEADLINE, GRID_DEADLINE = 555.0, 540.0
# Timed twice: with glibc's defaults, and in a process that keeps its freed memory.
_PASSES = (Pass(60.0), Pass(30.0, "reused_", lambda: keep_freed_memory()))

# A quarter of a laptop batch.
QUARTER = replace(LAPTOP, name="quarter laptop", sequences=2)
SHARES = (0.25, 0.5, 1.0)
OF_SHARES = ("ours: stash", "ours: local", "ours: recompute", "TRL: frozen head", "TRL", "eager")
# Labelled rows 2048 and 8192.
ROWS = tuple(Shape("rows", sequences, 512, 256, 16_000) for sequences in (8, 32))

# Pairs of a usual batch, and the share of a step that a method is to stay below.
PAIRS = 32
GOAL = 0.0005
# What the stateful methods extend, to be compared with.
BASELINES = ("dpo", "simpo")
_STEPS = 5


def run_cpu(
    folder: Path = RESULTS / "cpu",
    *,
    count: int = 7,
    seconds: float = CPU_DEADLINE,
    say: Callable[[str], None] = print,
) -> None:
    """Everything that the README shows, in less than ten minutes on two cores.

    Args:
        folder: where the results go.
        count: rounds of the timings, as far as their time allows; the slower half of the
            candidates gets no more than the fewest.
        seconds: nothing is begun after them; rows without figures are named so.
        say: gets a line of progress now and then.
    """
    start = time.monotonic()

    def tell(text: str) -> None:
        say(f"[{time.monotonic() - start:4.0f} s] {text}")

    for dtype in DTYPES:
        left = start + seconds - time.monotonic()
        # What one dtype's process keeps of its freed memory, the next one's must not find.
        _run_alone(partial(_measure_laptop, dtype, folder, count, left))
        tell(f"{dtype}: done")
    sweep_memory(
        {"vocab": SWEEP_VOCAB, "length": SWEEP_LENGTH},
        Results(folder / "sweep.json", "sweep"),
        tell,
        start + seconds - time.monotonic(),
    )


def _measure_laptop(dtype: str, folder: Path, count: int, seconds: float) -> None:
    warnings.simplefilter("ignore")
    candidates = tuple(CANDIDATES[name] for name in ON_ONE_SHAPE)
    loop = Loop(
        Results(folder / f"head-{dtype}.json", "head"),
        count=count,
        spare_slow=True,
        seconds=seconds,
        passes=_PASSES,
        say=partial(print, flush=True),
    )
    loop.measure([HeadPoint(LAPTOP, dtype, candidates)])


def _run_alone(function: Callable[[], None]) -> None:
    child = multiprocessing.get_context("spawn").Process(target=function)
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"the measuring process ended with exit code {child.exitcode}")


def sweep_memory(
    axes: dict[str, Sequence[Shape]],
    results: Results,
    say: Callable[[str], None],
    seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Extra peak memory in fp32 while one size of the shape grows, the largest shapes first; a
    shape that two axes share is measured once, and nothing is begun after `seconds` on `clock`."""
    end = clock() + seconds
    measured: dict[tuple[Shape, str], Memory] = {}
    pairs = [(axis, shape) for axis, shapes in axes.items() for shape in shapes]
    for axis, shape in sorted(pairs, key=lambda pair: -pair[1].rows * pair[1].vocab):
        for name in IN_SWEEP:
            key, memory = (replace(shape, name="any"), name), Memory(None, None, NO_TIME)
            if clock() < end:
                memory = measured.get(key) or peak_memory(CANDIDATES[name], shape, "fp32")
                measured[key] = memory
            known = about(CANDIDATES[name], shape, "fp32")
            results.put({**known, "axis": axis, "status": memory.status, **_bytes(memory)})
            say(f"sweep: {shape.name}: {name}: {_mib(memory)}")


def _bytes(memory: Memory) -> Row:
    return {"extra_bytes": memory.extra, "gradient_bytes": memory.gradients}


def _mib(memory: Memory) -> str:
    if memory.extra is None:
        return memory.status
    return f"{memory.extra / 2**20:.0f} MiB extra"


def cpu_points() -> dict[str, list[GridPoint]]:
    """File → its points, the most telling first."""
    shares = tuple(CANDIDATES[name] for name in OF_SHARES)
    roomy = replace(CANDIDATES["ours: local"], forward=partial(ours_with_room, "local", "auto"))
    rows = tuple(roomy if c.name == roomy.name else c for c in shares)
    both = ("ours: local", "ours: recompute", "Liger", "cut-cross-entropy", "eager")
    single = tuple(CANDIDATES[name] for name in (*both, *IN_GRID, *OTHER_LOSSES))
    narrow = tuple(CANDIDATES[name] for name in (*both, *IN_GRID))
    return {
        "shares": [GridPoint(replace(QUARTER, labelled=share), "fp32", shares) for share in SHARES],
        "rows": [GridPoint(shape, dtype, rows, not_measured) for shape in ROWS for dtype in DTYPES],
        "peers": [GridPoint(QUARTER, "fp32", single), GridPoint(QUARTER, "bf16", narrow)],
    }


def run_grid(
    folder: Path,
    count: int,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Measure every file of the grid, in less than ten minutes on two cores."""
    end = clock() + GRID_DEADLINE
    for name, points in cpu_points().items():
        results, seconds = Results(folder / f"{name}.json", "grid"), max(0.0, end - clock())
        Loop(
            results,
            count=count,
            spare_slow=True,
            seconds=seconds,
            passes=(Pass(10.0),),
            clock=clock,
            say=say,
        ).measure(points)


def measured_losses() -> list[str]:
    """The baselines, then every stateful loss."""
    stateful = [name for name, info in available_losses().items() if info.stateful]
    return [*BASELINES, *stateful]


def usual_batch(name: str, pairs: int = PAIRS) -> LogpBatch:
    """Log-probs of answers of 100 to 500 tokens, with every field that a loss may need."""
    generator = torch.Generator().manual_seed(0)
    size = 2 * pairs
    lengths = torch.randint(100, 500, (size,), generator=generator)
    policy = -lengths * (1 + torch.rand(size, generator=generator))
    noise = torch.randn(size, generator=generator)
    fields: dict[str, Any] = {
        "reference": policy + 4 * noise,
        "rewards": noise,
        "desirable": torch.arange(size) < pairs,
        "kl": torch.tensor(1.0),
        "prompt": policy / 2,
        "prompt_reference": policy / 2 + noise,
        "groups": torch.arange(size) % pairs,
        "sequence_kl": noise.abs(),
        "extrapolated": policy - noise,
        "interpolated": policy + noise,
        "gold": policy / 3,
        "gold_lengths": lengths // 2,
    }
    needs = find(name).info().needs
    needed = {field: value for field, value in fields.items() if field in needs}
    return LogpBatch(policy.requires_grad_(), lengths, **needed)


def loss_step(loss_fn: PreferenceLoss, batch: LogpBatch) -> None:
    """Loss and statistics, forward and backward, as far as the log-probs."""
    batch.policy.grad = None
    loss_fn.from_logps(batch).loss.backward()


def run_methods(
    folder: Path = RESULTS / "cpu",
    say: Callable[[str], None] = print,
    shape: Shape = LAPTOP,
    calls: int = 50,
) -> None:
    """Every loss on this CPU, as a share of the step of the op that trains the head, in fp32.

    Args:
        folder: gets methods.json.
        say: gets a line of progress now and then.
        shape: of the step.
        calls: of each loss.
    """
    results = Results(folder / "methods.json", "method")
    run = partial(step, CANDIDATES["ours: local"], make_problem(shape, torch.float32))
    whole = _timed(run, _STEPS).median_ms
    for name in measured_losses():
        timing = _timed(partial(loss_step, PreferenceLoss(name), usual_batch(name)), calls)
        results.put(_method_row(name, shape, timing, whole))
        say(f"{name}: {timing.median_ms:.3f} ms of {whole:.0f} ms")


def _timed(run: Callable[[], object], count: int) -> Timing:
    """After a first call. Collecting garbage would take longer than a loss."""
    run()
    *_, timings = Rounds(count, collect=False).time({"it": run})
    return timings["it"]


def _method_row(name: str, shape: Shape, timing: Timing, whole: float) -> Row:
    info = available_losses()[name]
    share = timing.median_ms / whole if whole else math.nan
    return {
        "candidate": name,
        "shape": shape.name,
        "sequences": shape.sequences,
        "length": shape.length,
        "labelled_rows": shape.labelled_rows,
        "dtype": "fp32",
        "pairs": PAIRS,
        "stateful": info.stateful,
        "engine": "torch",
        "ms": round(timing.median_ms, 4),
        "ms_quartiles": quartiles(timing.ms, 4),
        "step_ms": round(whole, 2),
        "share": round(share, 7),
        "status": "ok",
    }
