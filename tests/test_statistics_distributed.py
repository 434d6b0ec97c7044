"""Two processes with unequal batches against one process with the whole batch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fused_prefopt.losses import find
from fused_prefopt.types import LogpBatch

# Pairs per rank and step: unequal, and none on one of the ranks.
SPLITS = [(3, 1), (2, 4), (0, 3), (5, 0), (1, 1)]
DISTRIBUTED = {
    "alpha-dpo": [{}, {"statistics": "batch"}, {"statistics": "reference"}],
    "gamma-simpo": [{"queue_size": 16, "sample_size": 8}, {"queue": False}],
}


def distributed_batches() -> list[LogpBatch]:
    """One global batch of pairs for each entry of SPLITS; the second holds a NaN pair."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for step, split in enumerate(SPLITS):
        size = 2 * sum(split)
        policy = -20 * torch.rand(size, generator=generator, dtype=torch.float64)
        reference = policy + torch.randn(size, generator=generator, dtype=torch.float64)
        if step == 1:
            policy[4] = math.nan
        lengths = torch.randint(1, 30, (size,), generator=generator)
        batches.append(LogpBatch(policy=policy, lengths=lengths, reference=reference))
    return batches


def part(batch: LogpBatch, pairs: slice) -> LogpBatch:
    def cut(values: torch.Tensor) -> torch.Tensor:
        chosen, rejected = values.chunk(2)
        return torch.cat([chosen[pairs], rejected[pairs]])

    return LogpBatch(
        policy=cut(batch.policy), lengths=cut(batch.lengths), reference=cut(batch.reference)
    )


def losses_of(rank: int | None) -> list[torch.Tensor]:
    """Losses of each configuration and step; of one rank's pairs, or of all."""
    results = []
    for name, configurations in DISTRIBUTED.items():
        for options in configurations:
            loss = find(name).build(**options)
            statistics = loss.statistics()
            for batch, (first, second) in zip(distributed_batches(), SPLITS, strict=True):
                if rank is not None:
                    pairs = slice(0, first) if rank == 0 else slice(first, first + second)
                    batch = part(batch, pairs)
                results.append(loss(batch, statistics(loss.observe(batch))).losses)
            results.append(statistics.nonfinite)
    return results


def _work(rank: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/init", rank=rank, world_size=2)
    torch.save(losses_of(rank), f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    mp.spawn(_work, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for whole, first, second in zip(losses_of(None), *ranks, strict=True):
        if whole.dim() == 0:
            assert whole == first == second == 1
        else:
            torch.testing.assert_close(
                torch.cat([first, second]), whole, rtol=1e-12, atol=1e-12, equal_nan=True
            )
            assert whole.isnan().sum() <= 1
