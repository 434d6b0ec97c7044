"""Pairwise losses: scale × (reward − margin) through a link, weighted, plus regularisers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_prefopt.losses.links import Logistic
from fused_prefopt.losses.margins import ConstantMargin
from fused_prefopt.losses.metrics import mean, pairwise_metrics
from fused_prefopt.losses.needs import halves
from fused_prefopt.losses.protocol import Link, Margin, Regulariser, Reward, Scale, Weighting
from fused_prefopt.statistics import JointStatistic, Statistic
from fused_prefopt.types import LogpBatch, LossOutput


@dataclass(frozen=True)
class PairwiseLoss:
    """``reduction over pairs of w · link(ρ (r_w − r_l), ρ γ_i) + Σ regularisers``.

    Any parts go together. Without a scale ρ = 1, without a weighting w = 1.

    Args:
        reward: implicit reward of a sequence.
        margin: target margin γ_i of a pair.
        link: from reward and target margins to losses.
        regularisers: terms added to each pair's loss.
        scale: ρ, how sharply a pair is judged.
        weighting: w, how much a pair counts.
        reduction: (P,) losses → the batch loss.
    """

    reward: Reward
    margin: Margin = field(default_factory=ConstantMargin)
    link: Link = field(default_factory=Logistic)
    regularisers: tuple[Regulariser, ...] = ()
    scale: Scale | None = None
    weighting: Weighting | None = None
    reduction: Callable[[Tensor], Tensor] = mean
    pairwise: ClassVar[bool] = True

    @property
    def coupled(self) -> bool:
        """Whether the reduction is no mean, or a regulariser spans the pairs."""
        spanning = any(term.coupled for term in self.regularisers)
        return spanning or self.reduction is not mean

    @property
    def needs(self) -> frozenset[str]:
        """What the parts need, together."""
        return self.reward.needs.union(
            self.margin.needs, *(term.needs for term in self.regularisers)
        )

    @property
    def wants(self) -> frozenset[str]:
        """The weighting's."""
        return frozenset() if self.weighting is None else self.weighting.wants

    def statistics(self) -> Statistic | None:
        """A fresh statistic: the margin's, with a scale both, or None."""
        margin = self.margin.statistics()
        return margin if self.scale is None else JointStatistic(margin, self.scale.statistics())

    def observe(self, batch: LogpBatch) -> Tensor:
        """(P,) detached values that the statistic sees; with a scale (2, P), its own second."""
        reward_margins = self._reward_margins(self.reward(batch)).detach()
        observed = self.margin.observe(batch, reward_margins)
        return observed if self.scale is None else torch.stack([observed, reward_margins])

    def __call__(self, batch: LogpBatch, summary: Any = None) -> LossOutput:
        """The loss of a batch of pairs.

        Args:
            batch: chosen half first.
            summary: what the statistic returned for this batch, where there is one.

        Returns:
            The reduced loss, (P,) losses, metrics, (S,) rewards and (P,) target margins; a batch
            without pairs has loss 0.

        Raises:
            ValueError: a needed field or the summary is missing, or the number of sequences odd.
        """
        rewards = self.reward(batch)
        reward_margins = self._reward_margins(rewards)
        of_margin, of_scale = summary if isinstance(summary, tuple) else (summary, None)
        target_margins = self.margin(batch, reward_margins, of_margin)
        losses = self._judged(reward_margins, target_margins, of_scale)
        if self.weighting is not None:
            losses = self.weighting(batch) * losses
        for term in self.regularisers:
            losses = losses + term(batch)
        rewards, target_margins = rewards.detach(), target_margins.detach()
        return LossOutput(
            loss=self.reduction(losses),
            losses=losses,
            metrics=pairwise_metrics(batch, rewards, target_margins, losses),
            rewards=rewards,
            target_margins=target_margins,
        )

    def _judged(self, reward_margins: Tensor, target_margins: Tensor, summary: Any) -> Tensor:
        if self.scale is None:
            return self.link(reward_margins, target_margins)
        scale = self.scale(reward_margins, summary)
        return self.link(scale * reward_margins, scale * target_margins)

    @staticmethod
    def _reward_margins(rewards: Tensor) -> Tensor:
        chosen, rejected = halves(rewards)
        return chosen - rejected
