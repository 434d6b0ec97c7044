"""Point-wise losses of binary feedback: completions that are desirable or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_prefopt.checks import require_number
from fused_prefopt.losses.metrics import feedback_metrics, mean
from fused_prefopt.losses.needs import needed
from fused_prefopt.losses.rewards import LogRatio
from fused_prefopt.statistics import BatchMoments, Moments
from fused_prefopt.types import LogpBatch, LossOutput


def against_level(
    rewards: Tensor,
    level: Tensor,
    desirable: Tensor,
    *,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """``λ_D (1 − σ(r − z))`` where desirable, ``λ_U (1 − σ(z − r))`` elsewhere.

    Args:
        rewards: (S,) r.
        level: 0-d z.
        desirable: (S,) bool.
        desirable_weight: λ_D.
        undesirable_weight: λ_U.

    Returns:
        (S,) losses.

    Source: KTO (Ethayarajh et al. 2024, arXiv:2402.01306), eq. 7.
    """
    # 1 − σ(x) = σ(−x), which keeps its digits where x is large.
    return torch.where(
        desirable,
        desirable_weight * (level - rewards).sigmoid(),
        undesirable_weight * (rewards - level).sigmoid(),
    )


@dataclass(frozen=True)
class AnchoredFeedbackLoss:
    """Desirable completions are to become likelier than under the reference, the others rarer.

    `against_level` with z = 0, mean over the completions.

    Args:
        reward: β and the log-ratio.
        desirable_weight: λ_D >= 0.
        undesirable_weight: λ_U >= 0.

    Raises:
        ValueError: a weight is out of range.

    Source: APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266), eq. 7, unpaired as in TRL.
    """

    reward: LogRatio
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    pairwise: ClassVar[bool] = False
    coupled: ClassVar[bool] = False
    wants: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "desirable"})

    def __post_init__(self) -> None:
        require_number("desirable_weight", self.desirable_weight, low=0)
        require_number("undesirable_weight", self.undesirable_weight, low=0)

    def statistics(self) -> BatchMoments | None:
        """None: each completion stands alone."""
        return None

    def observe(self, batch: LogpBatch) -> Tensor | None:
        """None: there is no statistic."""
        return None

    def level(self, batch: LogpBatch, rewards: Tensor, summary: Any) -> Tensor:
        """0-d z, in units of reward, detached."""
        return rewards.new_zeros(())

    def __call__(self, batch: LogpBatch, summary: Any = None) -> LossOutput:
        """The loss of a batch of judged completions.

        Args:
            batch: with `reference` and `desirable`, and `kl` where it is known.
            summary: what the statistic returned for this batch, where there is one.

        Returns:
            Mean loss, (S,) losses, metrics (with `kl`, z/β in nats) and (S,) rewards βΔ.

        Raises:
            ValueError: a needed field or the summary is missing.
        """
        rewards = self.reward(batch)
        desirable = needed(batch, "desirable").bool()
        level = self.level(batch, rewards.detach(), summary)
        losses = against_level(
            rewards,
            level,
            desirable,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        rewards = rewards.detach()
        metrics = feedback_metrics(batch, rewards, desirable, losses)
        metrics["kl"] = level / self.reward.beta
        return LossOutput(loss=mean(losses), losses=losses, metrics=metrics, rewards=rewards)


@dataclass(frozen=True)
class BinaryFeedbackLoss(AnchoredFeedbackLoss):
    """KTO: desirable completions are to beat the KL of the policy, undesirable ones to stay below.

    `against_level` with ``z = max(0, β·kl)``, not differentiated; without `kl` the mean of βΔ
    over the batch of all ranks stands for β·kl.

    Args:
        reward: β and the log-ratio.
        desirable_weight: λ_D >= 0.
        undesirable_weight: λ_U >= 0.

    Raises:
        ValueError: a weight is out of range.

    Source: KTO (Ethayarajh et al. 2024, arXiv:2402.01306), eq. 7.
    """

    wants: ClassVar[frozenset[str]] = frozenset({"kl"})

    def statistics(self) -> BatchMoments:
        """The mean reward of the batch; nothing is remembered."""
        return BatchMoments()

    def observe(self, batch: LogpBatch) -> Tensor:
        """(S,) the rewards, detached."""
        return self.reward(batch).detach()

    def level(self, batch: LogpBatch, rewards: Tensor, summary: Any) -> Tensor:
        """0-d z, in units of reward, detached."""
        if batch.kl is not None:
            estimate = self.reward.beta * batch.kl
        elif isinstance(summary, Moments):
            estimate = summary.mean
        else:
            raise ValueError(
                f"summary: got {type(summary).__name__}, wanted the Moments that"
                " `loss.statistics()` returns for `loss.observe(batch)`, or a batch with `kl`"
            )
        return estimate.detach().to(rewards.dtype).clamp(min=0)
