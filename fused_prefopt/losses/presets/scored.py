"""Losses of pairs whose completions come with scores, the `rewards`, on log-ratios."""

from __future__ import annotations

import math

from fused_prefopt.checks import require_number
from fused_prefopt.losses import links, margins, rewards, terms, weightings
from fused_prefopt.losses.pairwise import PairwiseLoss
from fused_prefopt.losses.registry import register


@register("odpo", paper="Amini et al. 2024 (arXiv:2402.10571)")
def odpo(
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    offset: str = "log",
    length_normalized: bool = False,
) -> PairwiseLoss:
    """``−log σ(m − α f(s_w − s_l))``, ``m = β(Δ_w − Δ_l)``, s the `rewards`.

    Args:
        beta: β > 0, reward per nat.
        alpha: α, strength of the offset.
        offset: f, "log" or "identity" of the difference, which is taken as at least 1e-6.
        length_normalized: Δ/|y| in place of Δ; β is then per nat per token.
    """
    reward = rewards.log_ratio(beta=beta, length_normalized=length_normalized)
    return PairwiseLoss(reward, margins.OffsetMargin(alpha=alpha, offset=offset))


@register("reward-distillation", aliases=("rpo",), paper="Fisch et al. 2024 (arXiv:2405.19316)")
def reward_distillation(*, beta: float = 0.1) -> PairwiseLoss:
    """``((s_w − s_l) − m)²``, ``m = β(Δ_w − Δ_l)``, s the `rewards`.

    Args:
        beta: β > 0, reward per nat.
    """
    return PairwiseLoss(rewards.LogRatio(beta=beta), margins.ScoreMargin(), links.Squared())


@register("madpo", paper="Rho 2025 (arXiv:2510.05342), the weights as in its author's code")
def madpo(
    *,
    beta: float = 0.1,
    largest: float = 2.0,
    smallest: float = 0.5,
    slope: float = 1.0,
    tau: float = math.log(999),
    length_normalized: bool = False,
) -> PairwiseLoss:
    """``−w log σ(m)``, ``w = σ(c h)/σ(h)``, 1 for ``h <= −τ``, ``m = β(Δ_w − Δ_l)``.

    ``h = s_w − s_l``, s the `rewards`, a reward model's log-odds, and
    ``c = c₀ + (c₁ − c₀)/(1 + K e^(λ(|h| − τ)))``, ``K = (c₁ − 1)/(1 − c₀)``. Where they hold and
    ``|h| < τ``, the best m is c h.

    Args:
        beta: β > 0, reward per nat.
        largest: c₁ > 1, of pairs whose scores hardly differ.
        smallest: 0 <= c₀ < 1, of pairs whose scores differ by far more than τ.
        slope: λ > 0, how fast c falls, per unit of score.
        tau: τ >= 0, the difference of scores where c = 1; the default is where σ(τ) = 0.999.
        length_normalized: Δ/|y| in place of Δ; β is then per nat per token.
    """
    reward = rewards.log_ratio(beta=beta, length_normalized=length_normalized)
    weighting = weightings.ScoreMarginWeights(
        largest=largest, smallest=smallest, slope=slope, tau=tau
    )
    return PairwiseLoss(reward, weighting=weighting)


@register(
    "omni-dpo", aliases=("uni-dpo",), paper="Peng et al. 2025 (arXiv:2506.10054), eq. 4, 5, 10, 11"
)
def omni_dpo(
    *,
    beta: float = 2.0,
    eta: float = 0.7,
    tau_ref: float = 0.8,
    focus: float = 3.0,
    nll_weight: float = 0.001,
    tau_good: float = 3.2,
) -> PairwiseLoss:
    """``−w log σ(m) − λ 1[s_w >= τ_good, L_w < L_ref,w] L̄_w``, ``m = β(Δ_w/|y_w| − Δ_l/|y_l|)``.

    ``w = σ(η(s_w − s_l)) (1 − σ(β(L̄_w − L̄_l) − τ_ref))^γ``, s the `rewards`. A gradient flows
    through w, as in the authors' code. The published name is Uni-DPO.

    Args:
        beta: β > 0, reward per nat per token.
        eta: η >= 0, how much pairs of clearer scores count more, per unit of score.
        tau_ref: τ_ref, the policy's margin from which a pair is taken for learnt.
        focus: γ >= 0, how little learnt pairs count.
        nll_weight: λ >= 0.
        tau_good: τ_good, the score from which a chosen completion is kept from becoming rarer. The
            paper's 3.2 is the median of its scores.
    """
    require_number("nll_weight", nll_weight, low=0)
    quality = weightings.QualityWeights(eta=eta)
    performance = weightings.PerformanceWeights(beta=beta, tau_ref=tau_ref, focus=focus)
    return PairwiseLoss(
        rewards.MeanLogRatio(beta=beta),
        regularisers=(terms.CalibratedNll(weight=nll_weight, tau_good=tau_good),),
        weighting=weightings.Product((quality, performance)),
    )
