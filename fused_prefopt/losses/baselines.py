"""The methods that the papers compare with, as compositions."""

from __future__ import annotations

from dataclasses import replace

from fused_prefopt.checks import require_choice, require_number
from fused_prefopt.losses.feedback import BinaryFeedbackLoss
from fused_prefopt.losses.links import Hinge, Robust, Squared, UnbiasedRobust, Weighted
from fused_prefopt.losses.margins import ConstantMargin
from fused_prefopt.losses.offsets import LengthMargin, OffsetMargin, ScoreMargin, SequenceKlMargin
from fused_prefopt.losses.pairwise import PairwiseLoss
from fused_prefopt.losses.protocol import Reward
from fused_prefopt.losses.registry import register
from fused_prefopt.losses.regularisers import Calibration, ChosenNll
from fused_prefopt.losses.rewards import LogOdds, LogRatio, MeanLogp, MeanLogRatio, SumLogp
from fused_prefopt.losses.scaling import DynamicScale


def _robust(reward: Reward, epsilon: float, gamma: float, unbiased: bool) -> PairwiseLoss:
    link = UnbiasedRobust(epsilon=epsilon) if unbiased else Robust(epsilon=epsilon)
    return PairwiseLoss(reward, ConstantMargin(gamma=gamma), link)


@register(
    "robust-dpo",
    aliases=("rdpo",),
    paper="Chowdhury et al. 2024 (arXiv:2403.00409), γ-PO Table 6",
)
def robust_dpo(
    *, beta: float = 0.1, epsilon: float = 0.1, gamma: float = 0.0, unbiased: bool = False
) -> PairwiseLoss:
    """``−(1−ε) log σ(m−γ) − ε log σ(−m−γ)``, or its unbiased form, ``m = β(Δ_w − Δ_l)``.

    Args:
        beta: β > 0, reward per nat.
        epsilon: 0 <= ε <= 0.5, probability that a label is flipped.
        gamma: γ, target margin in units of reward.
        unbiased: ``[−(1−ε) log σ(m−γ) + ε log σ(−m−γ)] / (1−2ε)`` instead.
    """
    return _robust(LogRatio(beta=beta), epsilon, gamma, unbiased)


@register(
    "robust-simpo", aliases=("rsimpo",), paper="Chowdhury et al. 2024 on SimPO, as in γ-PO Table 4"
)
def robust_simpo(
    *, beta: float = 2.5, epsilon: float = 0.1, gamma: float = 0.0, unbiased: bool = False
) -> PairwiseLoss:
    """``−(1−ε) log σ(m−γ) − ε log σ(−m−γ)``, or its unbiased form, ``m = β(L̄_w − L̄_l)``.

    Args:
        beta: β > 0, reward per nat per token.
        epsilon: 0 <= ε <= 0.5, probability that a label is flipped.
        gamma: γ, target margin in units of reward.
        unbiased: ``[−(1−ε) log σ(m−γ) + ε log σ(−m−γ)] / (1−2ε)`` instead.
    """
    return _robust(MeanLogp(beta=beta), epsilon, gamma, unbiased)


@register("ipo", paper="Azar et al. 2023 (arXiv:2310.12036), eq. 17")
def ipo(*, tau: float = 0.1, length_normalized: bool = False) -> PairwiseLoss:
    """``(Δ_w − Δ_l − 1/(2τ))²``.

    Args:
        tau: τ > 0, strength of the KL regularisation.
        length_normalized: log-ratios per token, as TRL reads it.
    """
    require_number("tau", tau, low=0, above=True)
    reward = MeanLogRatio(beta=1.0) if length_normalized else LogRatio(beta=1.0)
    return PairwiseLoss(reward, ConstantMargin(gamma=1 / (2 * tau)), Squared())


@register("cpo", paper="Xu et al. 2024 (arXiv:2401.08417), γ-PO Table 6")
def cpo(*, beta: float = 0.1, nll_weight: float = 1.0, nll: str = "token_mean") -> PairwiseLoss:
    """``−log σ(β(L_w − L_l)) + λ·NLL``.

    Args:
        beta: β > 0, reward per nat.
        nll_weight: λ >= 0.
        nll: NLL is "sum" −L_w, "sequence_mean" −L̄_w, or "token_mean" (TRL's), the mean of
            −log π over all chosen tokens of the batch, of all ranks.
    """
    require_number("nll_weight", nll_weight, low=0)
    term = ChosenNll(weight=nll_weight, nll=nll)
    return PairwiseLoss(SumLogp(beta=beta), regularisers=(term,))


@register("orpo", paper="Hong et al. 2024 (arXiv:2403.07691), eq. 6–7")
def orpo(*, weight: float = 0.1) -> PairwiseLoss:
    """``−L̄_w − λ log σ(o_w − o_l)``, ``o = L̄ − log(1 − e^L̄)``.

    o is the log-odds of the mean token, finite also as its probability reaches 1.

    Args:
        weight: λ >= 0.
    """
    nll = ChosenNll(nll="sequence_mean")
    return PairwiseLoss(LogOdds(), link=Weighted(weight=weight), regularisers=(nll,))


@register(
    "length-dpo", aliases=("r-dpo",), paper="Park et al. 2024 (arXiv:2403.19159), γ-PO Table 6"
)
def length_dpo(*, beta: float = 0.1, alpha: float = 0.05) -> PairwiseLoss:
    """``−log σ(m − α(|y_w| − |y_l|))``, ``m = β(Δ_w − Δ_l)``.

    Args:
        beta: β > 0, reward per nat.
        alpha: α, reward per token of length.
    """
    return PairwiseLoss(LogRatio(beta=beta), LengthMargin(alpha=alpha))


@register("slic-hf", paper="Zhao et al. 2023 (arXiv:2305.10425)")
def slic_hf(*, delta: float = 1.0, nll_weight: float = 0.1) -> PairwiseLoss:
    """``max(0, δ − (L_w − L_l)) − λ L_w``.

    Args:
        delta: δ, margin in nats.
        nll_weight: λ >= 0.
    """
    require_number("nll_weight", nll_weight, low=0)
    nll = ChosenNll(weight=nll_weight)
    return PairwiseLoss(SumLogp(beta=1.0), link=Hinge(delta=delta), regularisers=(nll,))


@register("odpo", paper="Amini et al. 2024 (arXiv:2402.10571)")
def odpo(*, beta: float = 0.1, alpha: float = 1.0, offset: str = "log") -> PairwiseLoss:
    """``−log σ(m − α f(s_w − s_l))``, ``m = β(Δ_w − Δ_l)``, s the `rewards`.

    Args:
        beta: β > 0, reward per nat.
        alpha: α, strength of the offset.
        offset: f, "log" or "identity" of the difference, which is taken as at least 1e-6.
    """
    return PairwiseLoss(LogRatio(beta=beta), OffsetMargin(alpha=alpha, offset=offset))


@register("reward-distillation", aliases=("rpo",), paper="Fisch et al. 2024 (arXiv:2405.19316)")
def reward_distillation(*, beta: float = 0.1) -> PairwiseLoss:
    """``((s_w − s_l) − m)²``, ``m = β(Δ_w − Δ_l)``, s the `rewards`.

    Args:
        beta: β > 0, reward per nat.
    """
    return PairwiseLoss(LogRatio(beta=beta), ScoreMargin(), Squared())


@register("cal-dpo", paper="Xiao et al. 2024 (arXiv:2412.14516)")
def cal_dpo(*, beta: float = 0.1) -> PairwiseLoss:
    """``−log σ(Δ_w − Δ_l) + (Δ_w − 1/(2β))² + (Δ_l + 1/(2β))²``.

    Args:
        beta: β > 0; the log-ratios are drawn to ±1/(2β).
    """
    return PairwiseLoss(LogRatio(beta=1.0), regularisers=(Calibration(beta=beta),))


@register("tdpo1", paper="Zeng et al. 2024 (arXiv:2404.11999), α-DPO eq. 17–18")
def tdpo1(*, beta: float = 0.1) -> PairwiseLoss:
    """``−log σ(m − β(K_l − K_w))``, ``m = β(Δ_w − Δ_l)``, K the `sequence_kl`.

    Args:
        beta: β > 0, reward per nat.
    """
    return PairwiseLoss(LogRatio(beta=beta), SequenceKlMargin(scale=beta))


@register("tdpo2", paper="Zeng et al. 2024 (arXiv:2404.11999)")
def tdpo2(*, beta: float = 0.1, alpha: float = 0.5) -> PairwiseLoss:
    """``−log σ(m − αβ(K_l − sg K_w))``, ``m = β(Δ_w − Δ_l)``, K the `sequence_kl`.

    Args:
        beta: β > 0, reward per nat.
        alpha: α, weight of the divergence.
    """
    require_number("alpha", alpha)
    reward = LogRatio(beta=beta)
    return PairwiseLoss(reward, SequenceKlMargin(scale=alpha * beta, stop_chosen=True))


@register("kto", paper="Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 7")
def kto(
    *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> BinaryFeedbackLoss:
    """``λ_D (1 − σ(βΔ − z))`` or ``λ_U (1 − σ(z − βΔ))``, ``z = sg max(0, β·kl)``, point-wise.

    Without `kl` the mean of βΔ over the batch, of all ranks, stands for β·kl.

    Args:
        beta: β > 0, reward per nat.
        desirable_weight: λ_D >= 0.
        undesirable_weight: λ_U >= 0.
    """
    return BinaryFeedbackLoss(LogRatio(beta=beta), desirable_weight, undesirable_weight)


def _scale(beta: float, alpha: float, momentum: float, level: str, statistics: str) -> DynamicScale:
    require_choice("statistics", statistics, ("ema", "reference"))
    scale = DynamicScale(alpha=alpha, momentum=momentum, level=level, baseline=statistics)
    # The code that "reference" follows bounds ρβ.
    return scale if statistics == "ema" else replace(scale, smallest=scale.smallest / beta)


@register("beta-dpo", paper="Wu et al. 2024, β-DPO (arXiv:2407.08639), γ-PO Table 6")
def beta_dpo(
    *,
    beta: float = 0.1,
    gamma: float = 0.0,
    alpha: float = 0.1,
    momentum: float = 0.9,
    level: str = "pair",
    statistics: str = "ema",
) -> PairwiseLoss:
    """``−log σ(ρ(m − γ))``, ``ρ = sg max(1e-3, 1 + α(M − M₀))``, ``m = β(Δ_w − Δ_l)``.

    γ-PO's code of β-DPO is ``statistics="reference", level="batch"``: M₀ starts from 0, is not
    corrected and is updated after use, and ρβ, not ρ, is at least 1e-3. There M is the mean of
    pairs drawn at random, 80 % of them; the draw is not offered, M is the mean of all. β-DPO's own
    code updates M₀ before use, drops the pairs that are not drawn, and has M in nats: its a is our
    αβ.

    Args:
        beta: β > 0, reward per nat.
        gamma: γ, target margin in units of reward.
        alpha: α >= 0; 0 is DPO.
        momentum: of M₀, the running mean of m.
        level: M is m of the pair ("pair") or its mean over the batch ("batch").
        statistics: M₀ is the bias-corrected average with the current batch ("ema"), or as in γ-PO's
            code, with its bound of ρβ ("reference").
    """
    reward = LogRatio(beta=beta)
    scale = _scale(beta, alpha, momentum, level, statistics)
    return PairwiseLoss(reward, ConstantMargin(gamma=gamma), scale=scale)


@register("beta-simpo", paper="Wu et al. 2024, β-DPO (arXiv:2407.08639), γ-PO Table 6, on SimPO")
def beta_simpo(
    *,
    beta: float = 0.1,
    gamma: float = 0.0,
    alpha: float = 0.1,
    momentum: float = 0.9,
    level: str = "pair",
    statistics: str = "ema",
) -> PairwiseLoss:
    """``−log σ(ρ(m − γ))``, ``ρ = sg max(1e-3, 1 + α(M − M₀))``, ``m = β(L̄_w − L̄_l)``.

    γ-PO's code of β-SimPO is ``statistics="reference", level="batch"``, as in beta-dpo: M₀ starts
    from 0, is not corrected and is updated after use, and ρβ, not ρ, is at least 1e-3. There M is
    the mean of pairs drawn at random, 80 % of them; the draw is not offered, M is the mean of all.

    Args:
        beta: β > 0, reward per nat per token.
        gamma: γ, target margin in units of reward.
        alpha: α >= 0; 0 is SimPO.
        momentum: of M₀, the running mean of m.
        level: M is m of the pair ("pair") or its mean over the batch ("batch").
        statistics: M₀ is the bias-corrected average with the current batch ("ema"), or as in γ-PO's
            code, with its bound of ρβ ("reference").
    """
    reward = MeanLogp(beta=beta)
    scale = _scale(beta, alpha, momentum, level, statistics)
    return PairwiseLoss(reward, ConstantMargin(gamma=gamma), scale=scale)
