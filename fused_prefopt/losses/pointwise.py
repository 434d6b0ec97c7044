"""Point-wise losses: completions with a score (DRO), or desirable and other ones (KTO, BCO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_prefopt.checks import require_number
from fused_prefopt.losses.metrics import (
    LOG_Z_MEAN,
    REWARD_SHIFT,
    average,
    feedback_metrics,
    mean,
    pointwise_metrics,
)
from fused_prefopt.losses.protocol import expect, needed
from fused_prefopt.losses.rewards import LogRatio
from fused_prefopt.losses.terms import RewardShift
from fused_prefopt.losses.weights import weights_of
from fused_prefopt.statistics import BatchMoments, Moments, ShiftStatistic, Statistic
from fused_prefopt.types import LogpBatch, LossOutput


def mean_over_groups(values: Tensor, groups: Tensor) -> Tensor:
    """Mean over the members of each group, then over the groups.

    Args:
        values: (S,).
        groups: (S,) integers, in any order.

    Returns:
        0-d; 0 for no values.
    """
    if values.shape[0] == 0:
        return values.sum()
    # torch.unique would wait for the number of groups on CUDA; sorting does not.
    ordered, order = groups.sort()
    ranks = torch.zeros_like(order)
    ranks[order[1:]] = (ordered[1:] != ordered[:-1]).cumsum(0)
    sizes = torch.zeros_like(order).scatter_add(0, ranks, torch.ones_like(order))
    return (values / sizes[ranks]).sum() / (ranks.max() + 1)


@dataclass(frozen=True)
class DirectRewardLoss:
    """DRO: the policy's implicit reward is regressed on an explicit one.

    ``(s − βΔ − β log Z)²`` with ``Δ = L − L_ref`` and
    ``log Z = sg[L(x∖t₀) − L_ref(x∖t₀)] + log_z0``, the prompt's own log-ratio; mean over the
    responses of a prompt (`groups`), then over prompts. Without `groups` every response counts
    the same.

    Args:
        reward: β and the log-ratio.
        log_z0: log Z of the first token t₀, in nats: larger lowers all implicit rewards.

    Raises:
        ValueError: `log_z0` is not a finite number.

    Source: DRO, eq. 6–8, Algorithm 1.
    """

    reward: LogRatio
    log_z0: float
    pairwise: ClassVar[bool] = False
    coupled: ClassVar[bool] = False
    wants: ClassVar[frozenset[str]] = frozenset({"groups"})
    needs: ClassVar[frozenset[str]] = frozenset(
        {"reference", "rewards", "prompt", "prompt_reference"}
    )

    def __post_init__(self) -> None:
        require_number("log_z0", self.log_z0)

    def statistics(self) -> None:
        """None: each completion stands alone."""
        return None

    def observe(self, batch: LogpBatch) -> None:
        """None: there is no statistic."""
        return None

    def __call__(self, batch: LogpBatch, summary: Any = None) -> LossOutput:
        """The loss of a batch of scored completions.

        Args:
            batch: with `reference`, `rewards`, `prompt` and `prompt_reference`.
            summary: not used.

        Returns:
            Grouped mean loss, (S,) losses, metrics (with `log_z/mean`) and (S,) rewards βΔ.

        Raises:
            ValueError: a needed field is missing.
        """
        rewards = self.reward(batch)
        scores = needed(batch, "rewards").to(rewards.dtype)
        prompt_ratio = needed(batch, "prompt") - needed(batch, "prompt_reference")
        log_z = prompt_ratio.detach() + self.log_z0
        losses = (scores - rewards - self.reward.beta * log_z).square()
        return self.reduced(batch, losses, rewards.detach(), log_z)

    def reduced(
        self, batch: LogpBatch, losses: Tensor, rewards: Tensor, log_z: Tensor
    ) -> LossOutput:
        """The loss of a batch whose (S,) losses, rewards (detached) and log Z are known."""
        weights = weights_of(batch, pairwise=False)
        if batch.groups is None:
            loss = mean(losses, weights)
        else:
            weighted = losses if weights is None else weights * losses
            loss = mean_over_groups(weighted, batch.groups)
        metrics = pointwise_metrics(batch, rewards, losses)
        metrics[LOG_Z_MEAN] = average(log_z, weights)
        return LossOutput(loss=loss, losses=losses, metrics=metrics, rewards=rewards)


@dataclass(frozen=True)
class AnchoredFeedbackLoss:
    """Desirable completions are to become likelier than under the reference, the others rarer.

    ``λ_D judge(r − z)`` where desirable, ``λ_U judge(z − r)`` elsewhere, mean over the completions:
    here with z = 0 and ``judge(x) = 1 − σ(x)``.

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

    def statistics(self) -> Statistic | None:
        """None: each completion stands alone."""
        return None

    def observe(self, batch: LogpBatch) -> Tensor | None:
        """None: there is no statistic."""
        return None

    def level(self, batch: LogpBatch, rewards: Tensor, summary: Any) -> Tensor:
        """0-d z, in units of reward, detached."""
        return rewards.new_zeros(())

    @staticmethod
    def judge(gaps: Tensor) -> Tensor:
        """(S,) losses by how far each reward is on its side of the level."""
        # 1 − σ(x) = σ(−x), which keeps its digits where x is large.
        return (-gaps).sigmoid()

    def level_metric(self, level: Tensor) -> dict[str, Tensor]:
        """`kl`, z/β in nats."""
        return {"kl": level / self.reward.beta}

    def __call__(self, batch: LogpBatch, summary: Any = None) -> LossOutput:
        """The loss of a batch of judged completions.

        Args:
            batch: with `reference` and `desirable`, and `kl` where it is known.
            summary: what the statistic returned for this batch, where there is one.

        Returns:
            Mean loss, (S,) losses, metrics (with the level's) and (S,) rewards βΔ.

        Raises:
            ValueError: a needed field or the summary is missing.
        """
        rewards = self.reward(batch)
        desirable = needed(batch, "desirable").bool()
        level = self.level(batch, rewards.detach(), summary)
        losses = self.judge(torch.where(desirable, rewards - level, level - rewards))
        losses = torch.where(
            desirable, self.desirable_weight * losses, self.undesirable_weight * losses
        )
        rewards = rewards.detach()
        metrics = feedback_metrics(batch, rewards, desirable, losses) | self.level_metric(level)
        loss = mean(losses, weights_of(batch, pairwise=False))
        return LossOutput(loss=loss, losses=losses, metrics=metrics, rewards=rewards)


@dataclass(frozen=True)
class BinaryFeedbackLoss(AnchoredFeedbackLoss):
    """KTO: desirable completions are to beat the KL of the policy, undesirable ones to stay below.

    `AnchoredFeedbackLoss` with ``z = max(0, β·kl)``, not differentiated; without `kl` the mean of
    βΔ over the batch of all ranks stands for β·kl.

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
        else:
            estimate = expect(summary, Moments, ", or a batch with `kl`").mean
        return estimate.detach().to(rewards.dtype).clamp(min=0)


@dataclass(frozen=True)
class ClassifierFeedbackLoss(AnchoredFeedbackLoss):
    """BCO: rewards as the logits of a classifier that tells desirable completions from the others.

    `AnchoredFeedbackLoss` with ``judge(x) = −log σ(x)`` and z = δ, a running level of the rewards,
    not differentiated.

    Args:
        reward: β and the log-ratio.
        desirable_weight: λ_D >= 0.
        undesirable_weight: λ_U >= 0.
        shift: δ; None for 0.

    Raises:
        ValueError: a weight is out of range.

    Source: BCO (Jung et al. 2024, arXiv:2404.04656), eq. 7 and 8.
    """

    shift: RewardShift | None = None

    def statistics(self) -> ShiftStatistic | None:
        """The shift's; without one None: each completion stands alone."""
        return None if self.shift is None else self.shift.statistics()

    def observe(self, batch: LogpBatch) -> Tensor | None:
        """(4, S) what the shift's statistic sees, detached; without one None."""
        if self.shift is None:
            return None
        rewards = self.reward(batch).detach()
        desirable = needed(batch, "desirable").bool()
        members = torch.stack([desirable, desirable.logical_not()])
        return torch.cat([rewards.where(members, 0.0), members.to(rewards.dtype)])

    def level(self, batch: LogpBatch, rewards: Tensor, summary: Any) -> Tensor:
        """0-d δ, in units of reward, detached."""
        return rewards.new_zeros(()) if self.shift is None else self.shift(rewards, summary)

    @staticmethod
    def judge(gaps: Tensor) -> Tensor:
        """(S,) ``−log σ(gap)``, in nats."""
        return -logsigmoid(gaps)

    def level_metric(self, level: Tensor) -> dict[str, Tensor]:
        """`delta`, δ in units of reward."""
        return {REWARD_SHIFT: level}
