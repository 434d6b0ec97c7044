"""Losses of pairs: composed ones, two anchors, matched quantiles, and scores of reward models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_prefopt.checks import require_floating, require_shape
from fused_prefopt.losses.links import Logistic
from fused_prefopt.losses.margins import ConstantMargin
from fused_prefopt.losses.metrics import REWARD_SHIFT, mean, pairwise_metrics
from fused_prefopt.losses.protocol import (
    JudgedPairs,
    Link,
    Margin,
    Ranking,
    Regulariser,
    Reward,
    Scale,
    Weighting,
    halves,
    needed,
)
from fused_prefopt.losses.rewards import LogRatio, depends_on_side
from fused_prefopt.losses.terms import RewardShift
from fused_prefopt.losses.weights import refuse_weights, weights_of
from fused_prefopt.statistics import JointStatistic, ShiftStatistic, Statistic
from fused_prefopt.types import LogpBatch, LossOutput


@dataclass(frozen=True)
class PairwiseLoss:
    """``reduction over pairs of w · link(ρ (r_w − r_l), ρ γ_i) + Σ regularisers``.

    Any parts go together, but for a ranking that takes no margins, nor links nor scales, or no
    sides. Without a scale ρ = 1, without a weighting w = 1.

    Args:
        reward: implicit reward of a sequence.
        margin: target margin γ_i of a pair.
        link: from reward and target margins to losses.
        regularisers: terms added to each pair's loss.
        scale: ρ, how sharply a pair is judged.
        weighting: w, how much a pair counts.
        reduction: (P,) losses → the batch loss. Where a batch has weights, it is called with them
            as a second argument.
        ranking: what joins the pairs of a list; None judges each on its own.

    Raises:
        ValueError: the ranking has no place for the margin, the link, the scale or the reward.
    """

    reward: Reward
    margin: Margin = field(default_factory=ConstantMargin)
    link: Link = field(default_factory=Logistic)
    regularisers: tuple[Regulariser, ...] = ()
    scale: Scale | None = None
    weighting: Weighting | None = None
    reduction: Callable[..., Tensor] = mean
    ranking: Ranking | None = None
    pairwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.ranking is None:
            return
        kind = type(self.ranking).__name__
        if not self.ranking.takes_margins:
            plain = {"margin": ConstantMargin(), "link": Logistic(), "scale": None}
            for name, wanted in plain.items():
                if getattr(self, name) != wanted:
                    raise ValueError(
                        f"{name}: got {getattr(self, name)} with {kind}, which judges no pairs and"
                        f" has no place for it; needs the default, {wanted}"
                    )
        if depends_on_side(self.reward) and not self.ranking.takes_sides:
            raise ValueError(
                f"reward: got {self.reward} with {kind}, in which a completion has one reward,"
                " whatever it is compared with; needs a reward that is the same on both sides of a"
                " pair"
            )

    @property
    def coupled(self) -> bool:
        """Whether the reduction is no mean, or a regulariser spans the pairs."""
        spanning = any(term.coupled for term in self.regularisers)
        return spanning or self.reduction is not mean

    @property
    def needs(self) -> frozenset[str]:
        """Union of the parts' needs."""
        found = self.reward.needs | self.margin.needs
        for term in self.regularisers:
            found |= term.needs
        for part in (self.scale, self.weighting, self.ranking):
            found |= frozenset() if part is None else part.needs
        return found

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
        if self.scale is None:
            return observed
        return torch.stack([observed, self.scale.observe(batch, reward_margins)])

    def __call__(self, batch: LogpBatch, summary: Any = None) -> LossOutput:
        """The loss of a batch of pairs.

        Args:
            batch: chosen half first.
            summary: what the statistic returned for this batch, where there is one.

        Returns:
            The reduced loss, (P,) losses before the batch's weights, metrics, (S,) rewards and
            (P,) target margins; a batch without pairs has loss 0.

        Raises:
            ValueError: a needed field or the summary is missing, or the number of sequences odd.
        """
        rewards = self.reward(batch)
        reward_margins = self._reward_margins(rewards)
        of_margin, of_scale = summary if isinstance(summary, tuple) else (summary, None)
        target_margins = self.margin(batch, reward_margins, of_margin)
        margins, betas = (reward_margins, target_margins), None
        if self.scale is not None:
            scale = self.scale(batch, reward_margins, of_scale)
            margins = scale * reward_margins, scale * target_margins
            betas = scale * self.reward.beta
        losses = self._judged(batch, rewards, *margins)
        if self.weighting is not None:
            losses = self.weighting(batch) * losses
        loss, losses = self._reduced(batch, losses)
        rewards, target_margins = rewards.detach(), target_margins.detach()
        return LossOutput(
            loss=loss,
            losses=losses,
            metrics=pairwise_metrics(batch, rewards, target_margins, losses, betas),
            rewards=rewards,
            target_margins=target_margins,
        )

    def _reduced(self, batch: LogpBatch, judged: Tensor) -> tuple[Tensor, Tensor]:
        """The batch loss, and (P,) losses with the regularisers."""
        weights = weights_of(batch, pairwise=True)
        terms = [term(batch) for term in self.regularisers]
        losses = judged
        for term in terms:
            losses = losses + term
        if weights is None:
            return self.reduction(losses), losses
        if self.reduction is not mean:
            return self.reduction(losses, weights), losses
        weighted = weights * judged
        for regulariser, term in zip(self.regularisers, terms, strict=True):
            # A term that spans the pairs has weighed them itself.
            weighted = weighted + (term if regulariser.coupled else weights * term)
        return mean(weighted), losses

    def _judged(
        self, batch: LogpBatch, rewards: Tensor, reward_margins: Tensor, target_margins: Tensor
    ) -> Tensor:
        if self.ranking is None:
            return self.link(reward_margins, target_margins)
        return self.ranking(JudgedPairs(batch, rewards, self.link, reward_margins, target_margins))

    @staticmethod
    def _reward_margins(rewards: Tensor) -> Tensor:
        chosen, rejected = halves(rewards)
        return chosen - rejected


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

    Source: BCO (Jung et al. 2024, arXiv:2404.04656), eq. 5 and 6, of rewards that are shifted.
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
    """``mean over pairs of judge(r_w − δ, r_l − δ)``.

    Args:
        reward: implicit reward of a sequence.
        judge: (P,) chosen and (P,) rejected rewards → (P,) losses.
        weight: constant factor on the losses.
        shift: δ, a running level of the rewards; None for 0.
    """

    reward: Reward
    judge: Callable[[Tensor, Tensor], Tensor]
    weight: float = 1.0
    shift: RewardShift | None = None
    pairwise: ClassVar[bool] = True
    wants: ClassVar[frozenset[str]] = frozenset()
    coupled: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """The reward's."""
        return self.reward.needs

    def statistics(self) -> ShiftStatistic | None:
        """The shift's; without one None: each pair stands alone."""
        return None if self.shift is None else self.shift.statistics()

    def observe(self, batch: LogpBatch) -> Tensor:
        """(P,) the reward margins, detached; with a shift (4, P), what its statistic sees."""
        chosen, rejected = halves(self.reward(batch).detach())
        if self.shift is None:
            return chosen - rejected
        ones = torch.ones_like(chosen)
        return torch.stack([chosen, rejected, ones, ones])

    def __call__(self, batch: LogpBatch, summary: Any = None) -> LossOutput:
        """The loss of a batch of pairs.

        Args:
            batch: chosen half first.
            summary: what the statistic returned for this batch, where there is one.

        Returns:
            Mean loss, (P,) losses, metrics (with a shift `delta`), (S,) rewards before the shift
            and target margins of 0.

        Raises:
            ValueError: a needed field or the summary is missing, or the number of sequences odd.
        """
        rewards, level = self.reward(batch), {}
        shifted = rewards
        if self.shift is not None:
            level = {REWARD_SHIFT: self.shift(rewards, summary)}
            shifted = rewards - level[REWARD_SHIFT]
        losses = self.weight * self.judge(*halves(shifted))
        rewards, target_margins = rewards.detach(), torch.zeros_like(losses)
        return LossOutput(
            loss=mean(losses, weights_of(batch, pairwise=True)),
            losses=losses,
            metrics=pairwise_metrics(batch, rewards, target_margins, losses) | level,
            rewards=rewards,
            target_margins=target_margins,
        )


def paired_quantiles(batch: LogpBatch) -> tuple[Tensor, Tensor]:
    """Samples of "aot": (P,) ``L_w − L_l`` of the policy, which is to dominate the reference's."""
    policy, reference = halves(batch.policy), halves(needed(batch, "reference"))
    return policy[0] - policy[1], reference[0] - reference[1]


def unpaired_quantiles(batch: LogpBatch) -> tuple[Tensor, Tensor]:
    """Samples of "aot-unpaired": (P,) Δ of the chosen, which is to dominate the rejected's."""
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
            batch: chosen half first, with `reference` and without `weights`.
            summary: not used.

        Returns:
            Mean loss, (P,) losses, metrics, (S,) rewards βΔ and target margins of 0.

        Raises:
            ValueError: a needed field is missing, there are weights, or the number of sequences is
                odd.
        """
        refuse_weights(batch, "sorts the pairs")
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


def bradley_terry_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, margin: float | Tensor = 0
) -> Tensor:
    """Negative log-likelihood of the preferences under the scores.

    ``mean over pairs of −log σ(s_w − s_l − margin)``

    Args:
        chosen_scores: (P,) s_w, of the preferred responses.
        rejected_scores: (P,) s_l.
        margin: by how much s_w is to exceed s_l, one number or (P,).

    Returns:
        0-d loss in nats; 0 without pairs.

    Raises:
        ValueError: a shape or dtype does not fit.

    Source: InstructGPT (Ouyang et al. 2022, arXiv:2203.02155), eq. 1; the margin after Llama 2
    (Touvron et al. 2023, arXiv:2307.09288), eq. 2.
    """
    require_shape("chosen_scores", chosen_scores, ("P",))
    require_floating("chosen_scores", chosen_scores)
    require_shape("rejected_scores", rejected_scores, chosen_scores.shape)
    if isinstance(margin, torch.Tensor) and margin.dim():
        require_shape("margin", margin, chosen_scores.shape)
    return mean(-logsigmoid(chosen_scores - rejected_scores - margin))
