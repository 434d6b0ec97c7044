"""Relatives of DPO and SimPO that compose from the same parts."""

from __future__ import annotations

from fused_prefopt.checks import require_number
from fused_prefopt.losses.curved_rewards import MeanPower
from fused_prefopt.losses.margins import ConstantMargin
from fused_prefopt.losses.offsets import DropMargin
from fused_prefopt.losses.pairwise import PairwiseLoss
from fused_prefopt.losses.reductions import SoftMinimum
from fused_prefopt.losses.registry import register
from fused_prefopt.losses.rewards import LogRatio, RejectedShare
from fused_prefopt.losses.weighting import OnPolicyWeights


@register("dpo-positive", aliases=("dpop",), paper="Pal et al. 2024 (arXiv:2402.13228)")
def dpo_positive(*, beta: float = 0.3, penalty: float = 50.0) -> PairwiseLoss:
    """``−log σ(m − βλ max(0, −Δ_w))``, ``m = β(Δ_w − Δ_l)``.

    Args:
        beta: β > 0, reward per nat.
        penalty: λ >= 0, of a chosen completion that becomes rarer than under the reference.
    """
    require_number("penalty", penalty, low=0)
    return PairwiseLoss(LogRatio(beta=beta), DropMargin(scale=beta * penalty))


@register("dpo-shift", paper="Yang et al. 2025 (arXiv:2502.07599)")
def dpo_shift(*, beta: float = 0.1, share: float = 0.95) -> PairwiseLoss:
    """``−log σ(βΔ_w − λβΔ_l)``.

    Args:
        beta: β > 0, reward per nat.
        share: 0 < λ <= 1, weight of the rejected completion; 1 is DPO.
    """
    return PairwiseLoss(RejectedShare(reward=LogRatio(beta=beta), share=share))


@register("alpha-po", aliases=("alphapo",), paper="Gupta et al. 2025 (arXiv:2501.03884)")
def alpha_po(*, beta: float = 2.5, gamma: float = 1.0, alpha: float = 0.25) -> PairwiseLoss:
    """``−log σ(r_w − r_l − γ)``, ``r = β (1 − p̄^−α)/α``, ``log p̄ = L̄``.

    Args:
        beta: β > 0, reward per nat per token where p̄ = 1.
        gamma: γ, target margin in units of reward.
        alpha: α, the bend of the reward; 0 is SimPO.
    """
    return PairwiseLoss(MeanPower(beta=beta, alpha=alpha), ConstantMargin(gamma=gamma))


@register("wpo", paper="Zhou et al. 2024 (arXiv:2406.11827), eq. 2")
def wpo(*, beta: float = 0.1) -> PairwiseLoss:
    """``−w log σ(m)``, ``w = sg exp(L̄_w − C̄_w) exp(L̄_l − C̄_l)``, ``m = β(Δ_w − Δ_l)``.

    C is the `collision`, Σ over tokens of ``log Σ_v π(v)²``, which makes a token drawn from the
    policy count 1 on average. `PreferenceLoss` computes it from the hidden states, at the cost of
    an evaluation more. A batch of known log-probs without it has C = 0: w is then the product of
    the completions' mean likelihoods per token, smaller, and pairs count less where the policy
    is unsure of every word.

    Args:
        beta: β > 0, reward per nat.
    """
    return PairwiseLoss(LogRatio(beta=beta), weighting=OnPolicyWeights())


@register("dr-dpo", paper="Wu et al. 2024, Dr. DPO (arXiv:2407.07880)")
def dr_dpo(*, beta: float = 0.1, temperature: float = 1.0) -> PairwiseLoss:
    """``−T log mean over pairs of σ(m)^(1/T)``, ``m = β(Δ_w − Δ_l)``.

    The mean is over the batch, of all ranks.

    Args:
        beta: β > 0, reward per nat.
        temperature: T > 0, the paper's β′; the mean of the pairs' losses as T → ∞.
    """
    return PairwiseLoss(LogRatio(beta=beta), reduction=SoftMinimum(temperature=temperature))
