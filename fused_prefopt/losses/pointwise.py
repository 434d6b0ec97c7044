"""Point-wise losses with a score: every completion has a target of its own."""

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
        groups = batch.groups
        loss = mean(losses) if groups is None else mean_over_groups(losses, groups)
        rewards = rewards.detach()
        metrics = pointwise_metrics(batch, rewards, losses)
        metrics["log_z/mean"] = mean(log_z)
        return LossOutput(loss=loss, losses=losses, metrics=metrics, rewards=rewards)
