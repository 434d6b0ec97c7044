"""What the loss and its statistics take of a step, for every stateful loss and what they extend."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.peers import CANDIDATES, step
from benchmarks.results import RESULTS, Results, Row
from benchmarks.shapes import LAPTOP, Shape, make_problem
from fused_prefopt import LogpBatch, PreferenceLoss, available_losses
from fused_prefopt.losses import find

# Pairs of a usual batch, and the share of a step that a method is to stay below.
PAIRS = 32
GOAL = 0.0005
# What the stateful methods extend, to be compared with.
BASELINES = ("dpo", "simpo")
_STEPS, _CALLS = 5, 50


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
    }
    needs = find(name).info().needs
    needed = {field: value for field, value in fields.items() if field in needs}
    return LogpBatch(policy.requires_grad_(), lengths, **needed)


def loss_step(loss_fn: PreferenceLoss, batch: LogpBatch) -> None:
    """Loss and statistics, forward and backward, as far as the log-probs."""
    batch.policy.grad = None
    loss_fn.from_logps(batch).loss.backward()


def measure_methods(
    results: Results,
    shape: Shape = LAPTOP,
    say: Callable[[str], None] = print,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Every loss, as a share of the step of the op that trains the head on a shape, in fp32."""
    problem = make_problem(shape, torch.float32)
    run = partial(step, CANDIDATES["ours: local"], problem)
    run()
    whole = 1e3 * median(_seconds(run, _STEPS, clock))
    for name in measured_losses():
        loss_fn, batch = PreferenceLoss(name), usual_batch(name)
        loss_step(loss_fn, batch)
        ms = [1e3 * value for value in _seconds(partial(loss_step, loss_fn, batch), _CALLS, clock)]
        quarters = quantiles(ms, n=4, method="inclusive")
        results.put(_row(name, shape, median(ms), [quarters[0], quarters[2]], whole))
        say(f"{name}: {median(ms):.3f} ms of {whole:.0f} ms")


def run_methods(folder: Path = RESULTS / "cpu", say: Callable[[str], None] = print) -> None:
    """Measure on this CPU."""
    measure_methods(Results(folder / "methods.json", "method"), say=say)


def _seconds(run: Callable[[], object], calls: int, clock: Callable[[], float]) -> list[float]:
    found = []
    for _ in range(calls):
        start = clock()
        run()
        found.append(clock() - start)
    return found


def _row(name: str, shape: Shape, ms: float, quartiles: list[float], whole: float) -> Row:
    info = available_losses()[name]
    share = ms / whole if whole else math.nan
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
        "ms": round(ms, 4),
        "ms_quartiles": [round(value, 4) for value in quartiles],
        "step_ms": round(whole, 2),
        "share": round(share, 7),
        "status": "ok",
    }
