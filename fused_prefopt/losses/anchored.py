"""Losses that judge a pair's two completions against anchors instead of against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_prefopt.losses.metrics import mean, pairwise_metrics
from fused_prefopt.losses.needs import halves
from fused_prefopt.losses.protocol import Reward
from fused_prefopt.types import LogpBatch, LossOutput


def noise_contrastive(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``−log σ(r_w) − ½ log σ(−r_w) − ½ log σ(−r_l)``.

    Args:
        chosen: (P,) r_w.
        rejected: (P,) r_l.

    Returns:
        (P,) losses in nats.

    Source: NCA (Chen et al. 2024, arXiv:2402.05369), for two responses.
    """
    return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))


def binary(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``−log σ(r_w) − log σ(−r_l)``.

    Args:
        chosen: (P,) r_w.
        rejected: (P,) r_l.

    Returns:
        (P,) losses in nats.

    Source: BCO (Jung et al. 2024, arXiv:2404.04656), without its reward shift, as in TRL.
    """
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def self_play(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``(r_w − ½)² + (r_l + ½)²``.

    Args:
        chosen: (P,) r_w.
        rejected: (P,) r_l.

    Returns:
        (P,) losses.

    Source: SPPO (Wu et al. 2024, arXiv:2405.00675), eq. 4.7 with certain preferences.
    """
    return (chosen - 0.5).square() + (rejected + 0.5).square()


def raise_chosen(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``1 − σ(r_w) + σ(r_l)``: the chosen completion goes up, the rejected one down.

    Args:
        chosen: (P,) r_w.
        rejected: (P,) r_l.

    Returns:
        (P,) losses.

    Source: APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266), eq. 7.
    """
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def lower_both(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``σ(r_w) + 1 − σ(r_w − r_l)``: both completions go down, the rejected one further.

    Args:
        chosen: (P,) r_w.
        rejected: (P,) r_l.

    Returns:
        (P,) losses.

    Source: APO-down (D'Oosterlinck et al. 2024, arXiv:2408.06266), eq. 8.
    """
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


@dataclass(frozen=True)
class AnchoredLoss:
    """``mean over pairs of judge(r_w, r_l)``.

    Args:
        reward: implicit reward of a sequence.
        judge: (P,) chosen and (P,) rejected rewards → (P,) losses.
        weight: constant factor on the losses.
    """

    reward: Reward
    judge: Callable[[Tensor, Tensor], Tensor]
    weight: float = 1.0
    pairwise: ClassVar[bool] = True
    wants: ClassVar[frozenset[str]] = frozenset()
    coupled: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """The reward's."""
        return self.reward.needs

    def statistics(self) -> None:
        """None: each pair stands alone."""
        return None

    def observe(self, batch: LogpBatch) -> Tensor:
        """(P,) the reward margins, detached."""
        chosen, rejected = halves(self.reward(batch).detach())
        return chosen - rejected

    def __call__(self, batch: LogpBatch, summary: Any = None) -> LossOutput:
        """The loss of a batch of pairs.

        Args:
            batch: chosen half first.
            summary: not used.

        Returns:
            Mean loss, (P,) losses, metrics, (S,) rewards and target margins of 0.

        Raises:
            ValueError: a needed field is missing, or the number of sequences odd.
        """
        rewards = self.reward(batch)
        losses = self.weight * self.judge(*halves(rewards))
        rewards, target_margins = rewards.detach(), torch.zeros_like(losses)
        return LossOutput(
            loss=mean(losses),
            losses=losses,
            metrics=pairwise_metrics(batch, rewards, target_margins, losses),
            rewards=rewards,
            target_margins=target_margins,
        )
