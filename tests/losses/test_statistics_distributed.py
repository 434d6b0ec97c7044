"""Several processes with unequal batches against one process with the whole batch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fused_prefopt.losses import (
    DynamicMargin,
    DynamicScale,
    MeanLogp,
    PairwiseLoss,
    available_losses,
    find,
)
from fused_prefopt.losses.protocol import Loss
from fused_prefopt.statistics import Statistic
from fused_prefopt.types import LogpBatch

# Pairs per rank and step: unequal, and none on one of the ranks.
SPLITS = {
    2: [(3, 1), (2, 4), (0, 3), (5, 0), (1, 1)],
    3: [(3, 1, 0), (2, 1, 3), (0, 0, 3), (1, 3, 1), (1, 0, 1)],
}
DISTRIBUTED = {
    "alpha-dpo": [
        {},
        {"statistics": "batch"},
        {"statistics": "reference"},
        {"statistics": "dataset", "mean": 0.1, "std": 2.0},
    ],
    "gamma-dpo": [
        {"queue_size": 16, "sample_size": 8, "solver": "exact"},
        {"queue_size": 16, "sample_size": 8, "centered": True},
    ],
    "gamma-simpo": [{"queue_size": 16, "sample_size": 8}, {"queue": False}],
    "beta-dpo": [
        {},
        {"level": "batch", "alpha": 0.5},
        {"level": "batch", "alpha": 0.5, "statistics": "reference"},
    ],
    "beta-simpo": [{}],
    "kto": [{}],
}
STATEFUL = {name for name, info in available_losses().items() if info.stateful}
# Those with nothing of their own above, with their defaults.
DISTRIBUTED |= {name: [{}] for name in sorted(STATEFUL - DISTRIBUTED.keys())}
FURTHER = ("rewards", "prompt", "prompt_reference", "sequence_kl", "collision")
JOINT = PairwiseLoss(
    MeanLogp(beta=2.5),
    DynamicMargin(gamma=0.5, queue_size=16, sample_size=8),
    scale=DynamicScale(alpha=0.3),
)


def all_losses() -> list[Loss]:
    named = [
        find(name).build(**options)
        for name, configurations in DISTRIBUTED.items()
        for options in configurations
    ]
    return [*named, JOINT]


def distributed_batches(world: int) -> list[LogpBatch]:
    """One global batch of pairs for each split; the second holds a NaN pair."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for step, split in enumerate(SPLITS[world]):
        size = 2 * sum(split)
        policy = -20 * torch.rand(size, generator=generator, dtype=torch.float64)
        reference = policy + torch.randn(size, generator=generator, dtype=torch.float64)
        if step == 1:
            policy[4] = math.nan
        lengths = torch.randint(1, 30, (size,), generator=generator)
        desirable = torch.rand(size, generator=generator) > 0.5
        further = {name: torch.linspace(-1 - step, 2, size).double().sin() for name in FURTHER}
        batches.append(
            LogpBatch(policy, lengths, reference=reference, desirable=desirable, **further)
        )
    return batches


def part(batch: LogpBatch, pairs: slice) -> LogpBatch:
    def cut(values: torch.Tensor) -> torch.Tensor:
        chosen, rejected = values.chunk(2)
        return torch.cat([chosen[pairs], rejected[pairs]])

    return LogpBatch(**{name: cut(getattr(batch, name)) for name in batch.given})


def local(batch: LogpBatch, split: tuple[int, ...], rank: int | None) -> LogpBatch:
    """The pairs of a rank; all of them for None."""
    if rank is None:
        return batch
    start = sum(split[:rank])
    return part(batch, slice(start, start + split[rank]))


def step_losses(loss: Loss, statistics: Statistic, batch: LogpBatch) -> torch.Tensor:
    """(1, P) losses of pairs, or (2, P) of completions."""
    losses = loss(batch, statistics(loss.observe(batch))).losses
    return losses.reshape(1 if loss.pairwise else 2, batch.size // 2)


def losses_of(rank: int | None, world: int) -> list[torch.Tensor]:
    """Losses of each configuration and step; of one rank's pairs, or of all."""
    results = []
    for loss in all_losses():
        statistics = loss.statistics()
        steps = zip(distributed_batches(world), SPLITS[world], strict=True)
        for step, (batch, split) in enumerate(steps):
            batch = local(batch, split, rank)
            if rank is not None and step == rank + 1:
                # One rank alone evaluates: nothing is communicated, and nothing remembered.
                statistics.eval()
                step_losses(loss, statistics, batch)
                statistics.train()
            results.append(step_losses(loss, statistics, batch))
        results.append(statistics.nonfinite)
    return results


def _start(rank: int, world: int, folder: str, name: str) -> None:
    file = f"file://{folder}/{name}"
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=world)


def _work(rank: int, world: int, folder: str) -> None:
    _start(rank, world, folder, "init")
    torch.save(losses_of(rank, world), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def assert_same(whole: torch.Tensor, parts: list[torch.Tensor]) -> None:
    """(2, P) or (1, P) losses of all ranks side by side, or counts that all ranks agree on."""
    if whole.dim() == 0:
        assert all(part == whole == 1 for part in parts)
        return
    torch.testing.assert_close(
        torch.cat(parts, dim=1), whole, rtol=1e-12, atol=1e-12, equal_nan=True
    )
    assert whole.isnan().sum() <= 1


def test_every_loss_that_remembers_is_among_them():
    assert set(DISTRIBUTED) == STATEFUL


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_equal_one(world, tmp_path):
    mp.spawn(_work, args=(world, str(tmp_path)), nprocs=world)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for whole, *parts in zip(losses_of(None, world), *ranks, strict=True):
        assert_same(whole, parts)


def continued(rank: int | None, states: list[dict]) -> list[torch.Tensor]:
    """Losses after restoring what two ranks saved."""
    results = []
    for loss, state in zip(all_losses(), states, strict=True):
        statistics = loss.statistics()
        statistics.load_state_dict(state)
        for batch, split in zip(distributed_batches(3), SPLITS[3], strict=True):
            results.append(step_losses(loss, statistics, local(batch, split, rank)))
    return results


def _save(rank: int, folder: str) -> None:
    _start(rank, 2, folder, "save")
    states = []
    for loss in all_losses():
        statistics = loss.statistics()
        for batch, split in zip(distributed_batches(2), SPLITS[2], strict=True):
            step_losses(loss, statistics, local(batch, split, rank))
        states.append(statistics.state_dict())
    torch.save(states, f"{folder}/states{rank}.pt")
    dist.destroy_process_group()


def _restore(rank: int, folder: str) -> None:
    _start(rank, 3, folder, "restore")
    states = torch.load(f"{folder}/states0.pt")
    torch.save(continued(rank, states), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_what_two_processes_save_one_and_three_restore(tmp_path):
    mp.spawn(_save, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"states{rank}.pt") for rank in range(2))
    for one, other in zip(first, second, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=0, atol=0, equal_nan=True)
    # The queue holds what one process would have remembered.
    queues = 0
    for loss, state in zip(all_losses(), first, strict=True):
        statistics = loss.statistics()
        for batch in distributed_batches(2):
            step_losses(loss, statistics, batch)
        places = state.get("margins", torch.empty(0)).numel()
        if places:
            queues += 1
            assert state["margins"].isfinite().sum() == min(places, 19)
        for name, value in statistics.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert queues >= 3

    mp.spawn(_restore, args=(str(tmp_path),), nprocs=3)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for whole_losses, *parts in zip(continued(None, first), *ranks, strict=True):
        assert_same(whole_losses, parts)
