"""What the tests of the losses share: random batches and one training step."""

from __future__ import annotations

import dataclasses

import torch

from fused_prefopt.losses import PairwiseLoss, available_losses
from fused_prefopt.types import LogpBatch, LossOutput

# Options beyond the defaults that have a value or a gradient of their own.
VARIANTS = [(name, {}) for name in available_losses()] + [
    ("dpo", {"label_smoothing": 0.2}),
    ("simpo", {"label_smoothing": 0.2}),
    ("alpha-dpo", {"stop_gradient": False}),
    ("alpha-dpo", {"normalize": False, "length_normalized": False, "beta": 0.1}),
    ("alpha-dpo", {"normalize": False, "stop_gradient": False}),
    ("alpha-dpo", {"implicit_reference": "sequence_kl"}),
    ("alpha-dpo", {"implicit_reference": "policy"}),
    ("alpha-dpo", {"implicit_reference": "reference"}),
    ("alpha-dpo", {"implicit_reference": "inverse_reference"}),
    ("alpha-dpo", {"margin_scale": "unit"}),
    ("alpha-dpo", {"statistics": "batch"}),
    ("alpha-dpo", {"statistics": "reference"}),
    ("alpha-dpo", {"statistics": "dataset", "mean": 0.1, "std": 2.0}),
    ("gamma-dpo", {"solver": "exact"}),
    ("gamma-dpo", {"centered": True, "label_smoothing": 0.2}),
    ("gamma-simpo", {"queue": False}),
    ("gamma-simpo", {"queue_size": 8, "sample_size": 6, "steps": 5}),
    ("robust-dpo", {"unbiased": True}),
    ("robust-simpo", {"unbiased": True, "gamma": 0.5}),
    ("ipo", {"length_normalized": True}),
    ("cpo", {"nll": "sum"}),
    ("cpo", {"nll": "sequence_mean"}),
    ("odpo", {"offset": "identity"}),
    ("kto", {"desirable_weight": 1.3, "undesirable_weight": 0.7}),
    ("beta-dpo", {"level": "batch", "gamma": 0.3}),
    ("beta-simpo", {"level": "batch", "beta": 2.5}),
    ("beta-dpo", {"statistics": "reference", "level": "batch", "gamma": 0.3}),
    ("beta-simpo", {"statistics": "reference", "beta": 2.5}),
    ("aot", {"label_smoothing": 0.2}),
    ("sft", {"nll": "sequence_mean"}),
    ("sft", {"nll": "sum"}),
    ("f-dpo", {"divergence": "forward_kl"}),
    ("f-dpo", {"divergence": "alpha_divergence"}),
    ("alpha-po", {"alpha": -0.5}),
]


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
        collision=-draw(10).abs(),
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

    def statistics(self):
        return None

    def observe(self, batch, reward_margins):
        return reward_margins


@dataclasses.dataclass(frozen=True)
class GivenFactors:
    """Scales or weights from outside, as `GivenMargin`."""

    values: torch.Tensor

    def __call__(self, *_):
        return self.values


def held(loss, batch: LogpBatch, summary=None):
    """The loss with its stopped parts as constants: what finite differences should see."""
    if not isinstance(loss, PairwiseLoss):
        return loss
    margins, scale, weighting = loss.margin, loss.scale, loss.weighting
    joint = summary if isinstance(summary, tuple) else (summary, None)
    chosen, rejected = loss.reward(batch).detach().chunk(2)
    targets = margins(batch, chosen - rejected, joint[0])
    if not targets.requires_grad:
        margins = GivenMargin(targets)
    if scale is not None:
        scale = GivenFactors(scale(chosen - rejected, joint[1]))
    if weighting is not None:
        weighting = GivenFactors(weighting(batch))
    return dataclasses.replace(loss, margin=margins, scale=scale, weighting=weighting)
