"""Point-wise losses: every completion has a target of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_prefopt.checks import require_number
from fused_prefopt.losses.metrics import mean, pointwise_metrics
from fused_prefopt.losses.needs import needed
from fused_prefopt.losses.rewards import LogRatio
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
        groups = batch.groups
        loss = mean(losses) if groups is None else mean_over_groups(losses, groups)
        rewards = rewards.detach()
        metrics = pointwise_metrics(batch, rewards, losses)
        metrics["log_z/mean"] = mean(log_z)
        return LossOutput(loss=loss, losses=losses, metrics=metrics, rewards=rewards)


def _finite_mean(values: Tensor) -> Tensor:
    """Mean of the finite values, 0 without any: a NaN stays in its own completion."""
    finite = values.isfinite()
    return values.where(finite, 0.0).sum() / finite.sum().clamp(min=1)


@dataclass(frozen=True)
class BinaryFeedbackLoss:
    """KTO: desirable completions are to beat the KL of the policy, undesirable ones to stay below.

    ``λ_D (1 − σ(βΔ − z))`` and ``λ_U (1 − σ(z − βΔ))`` with ``z = sg max(0, β·kl)``; without `kl`
    the batch's mean of βΔ stands for β·kl. Mean over the completions.

    Args:
        reward: β and the log-ratio.
        desirable_weight: λ_D >= 0.
        undesirable_weight: λ_U >= 0.

    Raises:
        ValueError: a weight is out of range.

    Source: KTO (Ethayarajh et al. 2024), eq. 8.
    """

    reward: LogRatio
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    pairwise: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "desirable"})

    def __post_init__(self) -> None:
        require_number("desirable_weight", self.desirable_weight, low=0)
        require_number("undesirable_weight", self.undesirable_weight, low=0)

    def statistics(self) -> None:
        """None: the KL comes with the batch."""
        return None

    def observe(self, batch: LogpBatch) -> None:
        """None: there is no statistic."""
        return None

    def __call__(self, batch: LogpBatch, summary: Any = None) -> LossOutput:
        """The loss of a batch of judged completions.

        Args:
            batch: with `reference` and `desirable`, and `kl` where it is known.
            summary: not used.

        Returns:
            Mean loss, (S,) losses, metrics (with `kl`) and (S,) rewards βΔ.

        Raises:
            ValueError: a needed field is missing.
        """
        rewards = self.reward(batch)
        estimate = _finite_mean(rewards) if batch.kl is None else self.reward.beta * batch.kl
        level = estimate.detach().to(rewards.dtype).clamp(min=0)
        desirable = needed(batch, "desirable").bool()
        # 1 − σ(x) = σ(−x), which keeps its digits where x is large.
        losses = torch.where(
            desirable,
            self.desirable_weight * (level - rewards).sigmoid(),
            self.undesirable_weight * (rewards - level).sigmoid(),
        )
        rewards = rewards.detach()
        metrics = pointwise_metrics(batch, rewards, losses)
        metrics["kl"] = level / self.reward.beta
        return LossOutput(loss=mean(losses), losses=losses, metrics=metrics, rewards=rewards)
