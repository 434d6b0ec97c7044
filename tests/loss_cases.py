"""What the tests of the losses share: random batches and one training step."""

from __future__ import annotations

import dataclasses

import torch

from fused_prefopt.types import LogpBatch, LossOutput


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_batch(size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> LogpBatch:
    """A batch with every field."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> torch.Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype)

    policy = -draw(20).abs() - 1
    return LogpBatch(
        policy=policy.requires_grad_(),
        lengths=torch.randint(1, 30, (size,), generator=generator),
        reference=policy.detach() + draw(3),
        rewards=draw(2),
        desirable=draw(1) > 0,
        kl=draw(1).abs().mean(),
        prompt=-draw(10).abs(),
        prompt_reference=-draw(10).abs(),
        groups=torch.arange(size) // 3,
        sequence_kl=draw(2).abs(),
    )


def compute(loss, batch: LogpBatch, statistics=None) -> LossOutput:
    """One training step of a loss, with a fresh statistic unless one is given."""
    if statistics is None:
        statistics = loss.statistics()
    return loss(batch, None if statistics is None else statistics(loss.observe(batch)))


@dataclasses.dataclass(frozen=True)
class GivenMargin:
    """Target margins from outside: what a stopped gradient sees."""

    values: torch.Tensor
    needs: frozenset[str] = frozenset()

    def __call__(self, batch, reward_margins, summary=None):
        return self.values
