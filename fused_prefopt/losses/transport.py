"""Alignment via optimal transport: preferences between distributions, pair by sorted pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_prefopt.losses.links import Logistic
from fused_prefopt.losses.metrics import mean, pairwise_metrics
from fused_prefopt.losses.needs import halves, needed
from fused_prefopt.losses.protocol import Link
from fused_prefopt.losses.rewards import LogRatio
from fused_prefopt.types import LogpBatch, LossOutput


def paired_quantiles(batch: LogpBatch) -> tuple[Tensor, Tensor]:
    """What is to dominate in "aot": (P,) ``L_w − L_l`` of the policy and of the reference."""
    policy, reference = halves(batch.policy), halves(needed(batch, "reference"))
    return policy[0] - policy[1], reference[0] - reference[1]


def unpaired_quantiles(batch: LogpBatch) -> tuple[Tensor, Tensor]:
    """What is to dominate in "aot-unpaired": (P,) Δ of the chosen and of the rejected."""
    return halves(batch.policy - needed(batch, "reference"))


def matched(upper: Tensor, lower: Tensor) -> Tensor:
    """Difference of equal quantiles: each of `upper` less what has its rank in `lower`.

    Args:
        upper: (P,) in nats.
        lower: (P,) in nats; entries next to a non-finite one take no part either.

    Returns:
        (P,) in the order of `upper`; NaN where a pair is not finite.
    """
    # Both sides drop the same pairs: NaN sorts last, and the ranks of the others stay matched.
    nonfinite = (upper + lower).isfinite().logical_not()
    upper = upper.masked_fill(nonfinite, torch.nan)
    lower = lower.masked_fill(nonfinite, torch.nan)
    ordered, order = upper.sort()
    return torch.empty_like(ordered).scatter(0, order, ordered - lower.sort().values)


@dataclass(frozen=True)
class TransportLoss:
    """``mean over places i of link(β (upper₍ᵢ₎ − lower₍ᵢ₎), 0)``, both sorted within the batch.

    The loss of a place in the order is reported at the pair whose upper value has it. Several
    processes sort the pairs of all of them as one batch.

    Args:
        reward: β and the log-ratio.
        quantiles: the two (P,) samples of which the first is to dominate the second.
        link: from differences to losses.

    Source: AOT (Melnyk et al. 2024, arXiv:2406.05882).
    """

    reward: LogRatio
    quantiles: Callable[[LogpBatch], tuple[Tensor, Tensor]]
    link: Link = field(default_factory=Logistic)
    pairwise: ClassVar[bool] = True
    wants: ClassVar[frozenset[str]] = frozenset()
    coupled: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})

    def statistics(self) -> None:
        """None: ranks are within the batch."""
        return None

    def observe(self, batch: LogpBatch) -> Tensor:
        """(P,) the differences, detached."""
        return matched(*self.quantiles(batch)).detach()

    def __call__(self, batch: LogpBatch, summary: Any = None) -> LossOutput:
        """The loss of a batch of pairs.

        Args:
            batch: chosen half first, with `reference`.
            summary: not used.

        Returns:
            Mean loss, (P,) losses, metrics, (S,) rewards βΔ and target margins of 0.

        Raises:
            ValueError: a needed field is missing, or the number of sequences odd.
        """
        differences = self.reward.beta * matched(*self.quantiles(batch))
        target_margins = torch.zeros_like(differences)
        losses = self.link(differences, target_margins)
        rewards = self.reward(batch).detach()
        return LossOutput(
            loss=mean(losses),
            losses=losses,
            metrics=pairwise_metrics(batch, rewards, target_margins, losses),
            rewards=rewards,
            target_margins=target_margins,
        )
