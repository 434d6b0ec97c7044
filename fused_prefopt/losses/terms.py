"""Terms beside reward, margin and link: scales, reductions, regularisers, lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fused_prefopt.checks import require_choice, require_integer, require_number, require_shape
from fused_prefopt.losses.metrics import mean
from fused_prefopt.losses.protocol import expect, halves, needed, per_token
from fused_prefopt.losses.weights import weights_of
from fused_prefopt.statistics import (
    BalancedShift,
    BatchwiseShift,
    MarginMeans,
    PooledShift,
    ReferenceMean,
    RewardLevel,
    RunningMean,
    ShiftStatistic,
)
from fused_prefopt.types import LogpBatch, divisors

# What BCO's rewards are measured from.
SHIFTS = ("none", "ema", "mean", "batch_mean")
_WHOLE = "whole_token_mean"
_BASELINES: dict[str, type[RunningMean] | type[ReferenceMean]] = {
    "ema": RunningMean,
    "reference": ReferenceMean,
}


@dataclass(frozen=True, kw_only=True)
class DynamicScale:
    """β-DPO's ``ρ = sg max(ρ₀, 1 + α(M − M₀))``: β becomes ρβ. Works with any reward.

    Args:
        alpha: α >= 0, strength; 0 is the fixed β.
        momentum: of M₀, the running mean of the reward margins.
        level: M is the pair's own margin ("pair") or the mean of the global batch ("batch").
        baseline: M₀ is the bias-corrected average with the current batch ("ema") or the γ-PO
            authors' average from zero of the batches before it ("reference").
        smallest: ρ₀ > 0. The authors bound ρβ: theirs is 1e-3/β.

    Raises:
        ValueError: an option is out of range.

    Source: β-DPO (Wu et al. 2024, arXiv:2407.08639), the scale at β₀ = β.
    """

    alpha: float = 0.1
    momentum: float = 0.9
    level: str = "pair"
    baseline: str = "ema"
    smallest: float = 1e-3
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require_number("alpha", self.alpha, low=0)
        require_number("momentum", self.momentum, low=0, high=1, below=True)
        require_choice("level", self.level, ("pair", "batch"))
        require_choice("baseline", self.baseline, _BASELINES)
        require_number("smallest", self.smallest, low=0, above=True)

    def statistics(self) -> RunningMean | ReferenceMean:
        """The running mean of the reward margins."""
        return _BASELINES[self.baseline](self.momentum)

    def observe(self, batch: LogpBatch, reward_margins: Tensor) -> Tensor:
        """(P,) the reward margins."""
        return reward_margins

    def __call__(
        self, batch: LogpBatch, reward_margins: Tensor, summary: MarginMeans | None
    ) -> Tensor:
        """(P,) ρ, detached."""
        means = expect(summary, MarginMeans)
        margins = reward_margins.detach()
        if self.level == "batch":
            margins = means.batch.to(margins.dtype).expand_as(margins)
        excess = margins - means.average.to(margins.dtype)
        return (1 + self.alpha * excess).clamp(min=self.smallest)


def dynamic_scale(
    *, beta: float, alpha: float, momentum: float, level: str, statistics: str
) -> DynamicScale:
    """A scale for rewards of this β, with the bound of ρ that belongs to the statistics.

    Args:
        beta: β > 0 of the reward.
        alpha, momentum, level: as in `DynamicScale`.
        statistics: its `baseline`.

    Raises:
        ValueError: an option is out of range.
    """
    require_choice("statistics", statistics, _BASELINES)
    scale = DynamicScale(alpha=alpha, momentum=momentum, level=level, baseline=statistics)
    # The code that "reference" follows bounds ρβ.
    return scale if statistics == "ema" else replace(scale, smallest=scale.smallest / beta)


@dataclass(frozen=True, kw_only=True)
class RewardShift:
    """BCO's δ, which all rewards are measured from: a running level of them, not differentiated.

    Args:
        kind: "ema", half the sum of both classes' exponential averages (the paper); "mean", the
            mean of all rewards so far (TRL's `BCOTrainer`); or "batch_mean", the mean of the
            batches' means so far ("bco_pair" of earlier TRLs, of LLaMA-Factory and of ms-swift).
        momentum: ρ of "ema", weight of the past.

    Raises:
        ValueError: an option is out of range.

    Source: BCO (Jung et al. 2024, arXiv:2404.04656), eq. 7.
    """

    kind: str = "ema"
    momentum: float = 0.9

    def __post_init__(self) -> None:
        require_choice("reward_shift", self.kind, SHIFTS[1:])
        require_number("momentum", self.momentum, low=0, high=1, below=True)

    def statistics(self) -> ShiftStatistic:
        """The running level."""
        if self.kind == "ema":
            return BalancedShift(self.momentum)
        return PooledShift() if self.kind == "mean" else BatchwiseShift()

    def __call__(self, rewards: Tensor, summary: RewardLevel | None) -> Tensor:
        """0-d δ in the dtype of the rewards."""
        return expect(summary, RewardLevel).level.to(rewards.dtype)


def reward_shift(kind: str, momentum: float) -> RewardShift | None:
    """The shift of a kind, or None for "none".

    Args:
        kind: one of `SHIFTS`.
        momentum: as in `RewardShift`.

    Raises:
        ValueError: an option is out of range.
    """
    require_choice("reward_shift", kind, SHIFTS)
    shift = RewardShift(kind="ema" if kind == "none" else kind, momentum=momentum)
    return None if kind == "none" else shift


@dataclass(frozen=True, kw_only=True)
class SoftMinimum:
    """Dr. DPO's ``−T log mean exp(−ℓ/T)``: pairs of large loss, probably mislabelled, count less.

    Of several processes the mean is over the pairs of all of them. With weights the mean is
    ``Σ w exp(−ℓ/T) / Σ w``: their scale does not matter.

    Args:
        temperature: T > 0; the mean as T → ∞.

    Raises:
        ValueError: `temperature` is out of range.

    Source: Dr. DPO (Wu et al. 2024, arXiv:2407.07880), β′ the temperature.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        require_number("temperature", self.temperature, low=0, above=True)

    def __call__(self, losses: Tensor, weights: Tensor | None = None) -> Tensor:
        """0-d loss of (P,) losses, with (P,) weights or None; 0 without any."""
        pairs = losses.shape[0]
        if pairs == 0:
            return mean(losses)
        if weights is None:
            total = torch.logsumexp(-losses / self.temperature, dim=0)
            return self.temperature * (math.log(pairs) - total)
        total = weights.sum()
        some = total > 0
        # Where all are 0 their logarithms are -inf, and the gradient of that NaN.
        shares = weights.where(some, 1.0).log()
        total = (total / pairs).where(some, 1.0).log() + math.log(pairs)
        soft = total - torch.logsumexp(shares - losses / self.temperature, dim=0)
        return self.temperature * soft.where(some, 0.0)


@dataclass(frozen=True, kw_only=True)
class ChosenNll:
    """Weighted negative log-likelihood of the chosen completion: keeps its probability up.

    Args:
        weight: λ >= 0.
        nll: "sum" −L_w, "sequence_mean" −L_w/|y_w|, or "token_mean", the mean over all
            chosen tokens of the batch, of all ranks, the same term for every pair, or
            "whole_token_mean", the same over the tokens of their prompts, too, but the first. With
            weights of pairs both are ``Σ w_i · −L_w,i / Σ |y_w,i|``.

    Raises:
        ValueError: an option is out of range.

    Source: CPO (Xu et al. 2024); SLiC-HF (Zhao et al. 2023); ORPO (Hong et al. 2024).
    """

    weight: float = 1.0
    nll: str = "sum"

    def __post_init__(self) -> None:
        require_number("weight", self.weight, low=0)
        require_choice("nll", self.nll, ("sum", "sequence_mean", "token_mean", _WHOLE))

    @property
    def coupled(self) -> bool:
        """Whether the mean is over the batch's tokens."""
        return self.nll in ("token_mean", _WHOLE) and self.weight > 0

    @property
    def needs(self) -> frozenset[str]:
        """The prompts', where their tokens count."""
        return frozenset({"prompt", "prompt_lengths"} if self.nll == _WHOLE else ())

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(P,) terms."""
        sums, lengths, finite = self._taken(batch)
        if self.nll == "sum":
            return -self.weight * sums
        if self.nll == "sequence_mean":
            return -self.weight * (sums / divisors(lengths))
        # A NaN stays in its own pair, whose other terms carry it.
        tokens = divisors(lengths.where(finite, 0).sum())
        sums, weights = sums.where(finite, 0.0), weights_of(batch, pairwise=True)
        if weights is not None:
            sums = weights * sums
        return (-self.weight * sums.sum() / tokens).expand_as(sums)

    def _taken(self, batch: LogpBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(P,) log-probs, their tokens, and whether a mean over tokens has the pair in it."""
        sums, lengths = batch.policy, batch.lengths
        if self.nll == _WHOLE:
            sums = sums + needed(batch, "prompt")
            lengths = lengths + needed(batch, "prompt_lengths")
        chosen = halves(sums)[0]
        return chosen, halves(lengths)[0], chosen.isfinite()


@dataclass(frozen=True, kw_only=True)
class GoldNll(ChosenNll):
    """TPO's behaviour cloning: `ChosenNll` of a third completion, the gold one of each prompt.

    Of the two halves of `gold`, which are the same, the mean is taken.

    Args:
        weight: α > 0.
        nll: "sum" −L_g, "sequence_mean" −L_g/|y_g|, or "token_mean", the mean over all gold tokens
            of the batch, of all ranks.

    Raises:
        ValueError: an option is out of range.

    Source: TPO (Saeidi et al. 2024, arXiv:2405.16681); "token_mean" in the authors' and TRL's code.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gold", "gold_lengths"})

    def __post_init__(self) -> None:
        require_number("weight", self.weight, low=0, above=True)
        require_choice("nll", self.nll, ("sum", "sequence_mean", "token_mean"))

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(P,) terms."""
        gold, _, _ = self._taken(batch)
        # No other term of the pair would carry what is not finite here.
        return super().__call__(batch).where(gold.isfinite(), gold)

    def _taken(self, batch: LogpBatch) -> tuple[Tensor, Tensor, Tensor]:
        """As above; a pair that is not finite elsewhere is left out whole."""
        golds, policies = halves(needed(batch, "gold")), halves(batch.policy)
        tokens = halves(needed(batch, "gold_lengths").to(batch.policy.dtype))
        gold = (golds[0] + golds[1]) / 2
        finite = (gold + policies[0] + policies[1]).isfinite()
        return gold, (tokens[0] + tokens[1]) / 2, finite


@dataclass(frozen=True, kw_only=True)
class CalibratedNll:
    """``−λ L̄_w`` of good chosen completions that became rarer: ``s_w >= τ`` and ``L_w < L_ref,w``.

    Args:
        weight: λ >= 0.
        tau_good: τ, in units of score, which `rewards` are.

    Raises:
        ValueError: a number is out of range.

    Source: Omni-DPO (Peng et al. 2025, arXiv:2506.10054), eq. 11.
    """

    weight: float
    tau_good: float
    coupled: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "rewards"})

    def __post_init__(self) -> None:
        require_number("weight", self.weight, low=0)
        require_number("tau_good", self.tau_good)

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(P,) terms."""
        rarer, _ = halves(batch.policy < needed(batch, "reference"))
        good, _ = halves(needed(batch, "rewards") >= self.tau_good)
        chosen, _ = halves(per_token(batch.policy, batch))
        return -self.weight * chosen.where(rarer & good, 0.0)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Cal-DPO's pull of the log-ratios to ±1/(2β): ``(Δ_w − 1/(2β))² + (Δ_l + 1/(2β))²``.

    Args:
        beta: β > 0.

    Raises:
        ValueError: `beta` is out of range.

    Source: Cal-DPO (Xiao et al. 2024).
    """

    beta: float
    coupled: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})

    def __post_init__(self) -> None:
        require_number("beta", self.beta, low=0, above=True)

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(P,) terms."""
        chosen, rejected = halves(batch.policy - needed(batch, "reference"))
        target = 1 / (2 * self.beta)
        return (chosen - target).square() + (rejected + target).square()


def tail_labels(labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Labels of the tokens by which each completion exceeds the other one of its pair.

    Args:
        labels: (S, T) chosen half first, `ignore_index` everywhere but on completion tokens and in
            the first column.
        ignore_index: what marks a position without a label.

    Returns:
        (S, T) the same labels with the first ``min(|y_w|, |y_l|)`` of each row ignored: what
        `sequence_logps` sums to the tail's log-prob.

    Raises:
        ValueError: the shape or dtype does not fit, or the number of sequences is odd.
    """
    require_shape("labels", labels, ("S", "T"))
    require_integer("labels", labels)
    counted = labels != ignore_index
    chosen, rejected = halves(counted.sum(1))
    shared = chosen.minimum(rejected).repeat(2)
    return labels.masked_fill(counted.cumsum(1) <= shared[:, None], ignore_index)


def length_desensitized(
    batch: LogpBatch, tail: Tensor, tail_reference: Tensor | None, *, alpha: float
) -> LogpBatch:
    """The batch with the tails' log-probs weighted: any loss of it is length-desensitised.

    ``L ← L − (1−α) L_tail``, and the same for the reference. WPO's weights stay those of the whole
    completions, as TRL's.

    Args:
        batch: pairs.
        tail: (S,) log-probs of `tail_labels` under the policy, in nats, differentiable.
        tail_reference: (S,) the same under the reference; None where there is no reference, or
            its tails are weighted already.
        alpha: 0 <= α <= 1, weight of the tails; 1 changes nothing.

    Returns:
        A new batch.

    Raises:
        ValueError: a field is missing, or a shape or α does not fit.

    Source: LD-DPO (Liu et al. 2024, arXiv:2409.06411), TRL's `ld_alpha`.
    """
    require_number("alpha", alpha, low=0, high=1)
    require_shape("tail", tail, batch.policy.shape)
    reference, collision = batch.reference, -(1 - alpha) * tail.detach()
    if tail_reference is not None:
        require_shape("tail_reference", tail_reference, batch.policy.shape)
        reference = needed(batch, "reference") - (1 - alpha) * tail_reference
    return replace(
        batch,
        policy=batch.policy - (1 - alpha) * tail,
        reference=reference,
        # What the weights subtract from the policy's log-probs.
        collision=collision if batch.collision is None else batch.collision + collision,
    )
