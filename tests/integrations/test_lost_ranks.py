"""A rank that dies or raises alone: every other one ends with an error, within the deadline.

A hang fails after a minute; how long an error takes is not tested.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from processes import children, exit_codes, join_group
from tiny_models import pair_features, tiny_llama
from torch.nn.parallel import DistributedDataParallel
from trainers import arguments, pairs_with_reference

import fused_prefopt as fp
from fused_prefopt.data import PairCollator
from fused_prefopt.integrations.metrics import StepMetrics
from fused_prefopt.integrations.transformers import PreferenceTrainer, attach
from fused_prefopt.reference import add_reference_logps
from fused_prefopt.reference_cache import ReferenceCache

pytestmark = pytest.mark.slow

WORLD, DEADLINE = 3, 60


class Lost(Exception):
    """What the lost rank raises where it is not killed."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise Lost


def at(call: int, end: Callable[[], None], lost: int = 1) -> Callable[..., None]:
    """A hook that ends the lost rank at this call of it, from 1."""
    seen: list[int] = []

    def hook(*_: Any) -> None:
        seen.append(1)
        if len(seen) == call and dist.get_rank() == lost:
            end()

    return hook


def step(folder: Path, end: Callable[[], None]) -> None:
    """In the middle of a second step, of a loss that exchanges margins."""
    model = tiny_llama()
    attach(model, fp.PreferenceLoss("gamma-simpo"))
    wrapped = DistributedDataParallel(model)
    model.model.layers[1].register_forward_pre_hook(at(2, end))
    for _ in range(3):
        wrapped(**PairCollator(0)(pair_features(2)))["loss"].backward()


def log(folder: Path, end: Callable[[], None]) -> None:
    metrics = StepMetrics()
    at(1, end)()
    metrics.pop()


def batches(folder: Path, end: Callable[[], None]) -> None:
    """Where a trainer takes its next batch, of a collator that leaves out rows."""
    spoil = at(3, end)

    def collator(features: list[dict]) -> dict[str, Any]:
        spoil()
        return PairCollator(0)(features)

    given = arguments(folder, max_steps=4, per_device_train_batch_size=2)
    loss_fn = fp.PreferenceLoss("simpo")
    PreferenceTrainer(tiny_llama(), given, collator, pair_features(24), loss_fn=loss_fn).train()


def checkpoint(folder: Path, end: Callable[[], None]) -> None:
    """While the first rank saves the loss's statistics, which the others leave to it."""
    loss_fn = fp.PreferenceLoss("alpha-dpo")
    loss_fn.register_state_dict_pre_hook(at(1, end, lost=LOST["checkpoint"]))
    given = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    data = pairs_with_reference(24)
    run = PreferenceTrainer(
        tiny_llama(), arguments(folder, **given), PairCollator(0), data, loss_fn=loss_fn
    )
    run.train()


def reference(folder: Path, end: Callable[[], None], **options: Any) -> None:
    model = tiny_llama()
    model.model.register_forward_pre_hook(at(2, end))
    options |= {"batch_size": 2, "save_every": 1, "progress": False}
    add_reference_logps(model, pair_features(14), PairCollator(0), **options)


def cache(folder: Path, end: Callable[[], None]) -> None:
    """While it keeps what it has computed."""
    spoil, save = at(2, end), ReferenceCache.save_part

    def save_part(*given: Any) -> None:
        spoil()
        save(*given)

    ReferenceCache.save_part = save_part
    reference(folder, lambda: None, cache_dir=folder / "cache")


WHERE = {each.__name__: each for each in (step, log, batches, checkpoint, reference, cache)}
LOST = dict.fromkeys(WHERE, 1) | {"checkpoint": 0}
ENDS = {each.__name__: each for each in (die, fail)}


def work(rank: int, where: str, end: str, folder: str) -> None:
    path = Path(folder)
    join_group(rank, WORLD, path)
    try:
        WHERE[where](path / f"run-{rank}", ENDS[end])
        told = "nothing"
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    (path / f"{rank}.txt").write_text(told)
    # As an uncaught error would: without a goodbye to the others.
    os._exit(1)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("where", WHERE)
def test_no_rank_waits_for_one_that_is_gone(where, end, tmp_path):
    given = [(rank, where, end, str(tmp_path)) for rank in range(WORLD)]
    exit_codes(children(work, given), DEADLINE)
    for rank in set(range(WORLD)) - {LOST[where]}:
        told = (tmp_path / f"{rank}.txt").read_text()
        if end == "fail" and where in ("reference", "cache"):
            assert told.startswith(f"RuntimeError: rank {LOST[where]}: Lost"), told
        else:
            assert told.startswith(("RuntimeError", "DistBackendError")), told
