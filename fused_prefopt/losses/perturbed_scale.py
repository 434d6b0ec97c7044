"""ε-DPO's KL penalty of each pair, from how its log-ratio moves when the penalty is perturbed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fused_prefopt.checks import require_count, require_number
from fused_prefopt.losses.pairwise import PairwiseLoss
from fused_prefopt.losses.protocol import Loss, expect, halves, needed
from fused_prefopt.losses.weighted_sum import WeightedSum
from fused_prefopt.statistics import Penalty, SteppedPenalty
from fused_prefopt.types import LogpBatch


@dataclass(frozen=True, kw_only=True)
class PerturbedScale:
    """ε-DPO's ``ρ = b / (1 + ε s)``: a pair's β becomes ρβ. Works with any reward.

    The pair's step s is 1 where its log-ratio ``L_w − L_l`` grows both ways from the policy with a
    weaker KL penalty, β / (1−ε) to β to β / (1+ε), −1 where it falls both ways, else 0. The
    policies of the other penalties are mixtures of logits: `extrapolated` is the weaker one's,
    `interpolated` the stronger one's. b = β_now / β, which moves with the mean s of the batches
    (`SteppedPenalty`).

    Args:
        epsilon: 0 < ε < 1, size of the perturbation and of a step.
        update_every: batches of training after which b moves: the trainer's
            `gradient_accumulation_steps`, for one move in each step of the optimizer.

    Raises:
        ValueError: an option is out of range.

    Source: ε-DPO (Lee et al. 2025, arXiv:2502.13177), eq. 3–5 and Algorithm 1.
    """

    epsilon: float = 0.01
    update_every: int = 1
    needs: ClassVar[frozenset[str]] = frozenset({"extrapolated", "interpolated"})

    def __post_init__(self) -> None:
        require_number("epsilon", self.epsilon, low=0, high=1, above=True, below=True)
        require_count("update_every", self.update_every, low=1)

    def statistics(self) -> SteppedPenalty:
        """The strength b, of the steps."""
        return SteppedPenalty(self.epsilon, self.update_every)

    def observe(self, batch: LogpBatch, reward_margins: Tensor) -> Tensor:
        """(P,) the steps s; NaN where a log-prob is not finite."""
        return _steps(batch).where(reward_margins.isfinite(), torch.nan)

    def __call__(self, batch: LogpBatch, reward_margins: Tensor, summary: Penalty | None) -> Tensor:
        """(P,) ρ, detached."""
        factor = expect(summary, Penalty).factor
        return factor.to(reward_margins.dtype) / (1 + self.epsilon * _steps(batch))


@torch.no_grad()
def _steps(batch: LogpBatch) -> Tensor:
    fields = needed(batch, "extrapolated"), batch.policy, needed(batch, "interpolated")
    pairs = (halves(field.to(batch.policy.dtype)) for field in fields)
    weaker, own, stronger = (chosen - rejected for chosen, rejected in pairs)
    rising = (weaker > own) & (own > stronger)
    falling = (weaker < own) & (own < stronger)
    steps = rising.to(own.dtype) - falling.to(own.dtype)
    return steps.where((weaker + own + stronger).isfinite(), torch.nan)


def perturbation_of(loss: Loss) -> float | None:
    """ε of the mixtures of logits that a loss needs, or None where it needs none.

    Args:
        loss: a registered one, or a sum.

    Raises:
        ValueError: two terms of a sum need mixtures of different ε: a batch has one.
    """
    losses = [term.loss for term in loss.terms] if isinstance(loss, WeightedSum) else [loss]
    scales = [each.scale for each in losses if isinstance(each, PairwiseLoss)]
    found = {scale.epsilon for scale in scales if isinstance(scale, PerturbedScale)}
    if len(found) > 1:
        raise ValueError(
            f"epsilon: got {sorted(found)} in one sum, wanted one for all terms of ε-DPO"
        )
    return next(iter(found), None)
