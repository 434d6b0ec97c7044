"""Pairwise losses: reward × margin × link, plus regularisers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from fused_prefopt.losses.links import Logistic
from fused_prefopt.losses.margins import ConstantMargin
from fused_prefopt.losses.metrics import mean, pairwise_metrics
from fused_prefopt.losses.needs import halves
from fused_prefopt.losses.protocol import Link, Margin, Regulariser, Reward
from fused_prefopt.statistics import Statistic
from fused_prefopt.types import LogpBatch, LossOutput


@dataclass(frozen=True)
class PairwiseLoss:
    """``mean over pairs of link(r_w − r_l, γ_i) + Σ regularisers``; any parts go together.

    Args:
        reward: implicit reward of a sequence.
        margin: target margin γ_i of a pair.
        link: from reward and target margins to losses.
        regularisers: terms added to each pair's loss.
    """

    reward: Reward
    margin: Margin = field(default_factory=ConstantMargin)
    link: Link = field(default_factory=Logistic)
    regularisers: tuple[Regulariser, ...] = ()
    pairwise: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        """What the parts need, together."""
        return self.reward.needs.union(
            self.margin.needs, *(term.needs for term in self.regularisers)
        )

    def statistics(self) -> Statistic | None:
        """A fresh statistic for the margin, or None."""
        return self.margin.statistics()

    def observe(self, batch: LogpBatch) -> Tensor:
        """(P,) detached values that the statistic sees."""
        return self.margin.observe(batch, self._reward_margins(self.reward(batch)).detach())

    def __call__(self, batch: LogpBatch, summary: Any = None) -> LossOutput:
        """The loss of a batch of pairs.

        Args:
            batch: chosen half first.
            summary: what the statistic returned for this batch, where there is one.

        Returns:
            Mean loss, (P,) losses, metrics, (S,) rewards and (P,) target margins; a batch
            without pairs has loss 0.

        Raises:
            ValueError: a needed field or the summary is missing, or the number of sequences odd.
        """
        rewards = self.reward(batch)
        reward_margins = self._reward_margins(rewards)
        target_margins = self.margin(batch, reward_margins, summary)
        losses = self.link(reward_margins, target_margins)
        for term in self.regularisers:
            losses = losses + term(batch)
        rewards, target_margins = rewards.detach(), target_margins.detach()
        return LossOutput(
            loss=mean(losses),
            losses=losses,
            metrics=pairwise_metrics(batch, rewards, target_margins, losses),
            rewards=rewards,
            target_margins=target_margins,
        )

    @staticmethod
    def _reward_margins(rewards: Tensor) -> Tensor:
        chosen, rejected = halves(rewards)
        return chosen - rejected
