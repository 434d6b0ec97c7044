"""All registered losses, by reward: one function and one registration each.

One file, as long as the methods are many: whoever looks for one, or a relative, finds it here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fused_prefopt.checks import require_choice, require_number
from fused_prefopt.losses import links, margins, rewards, terms
from fused_prefopt.losses.adaptive_margin import (
    IMPLICIT_REFERENCES,
    AdaptiveMargin,
    Normalisation,
    gap_of,
)
from fused_prefopt.losses.dynamic_margin import DynamicMargin
from fused_prefopt.losses.pairwise import (
    AnchoredLoss,
    PairwiseLoss,
    TransportLoss,
    binary,
    lower_both,
    noise_contrastive,
    paired_quantiles,
    raise_chosen,
    self_play,
    unpaired_quantiles,
)
from fused_prefopt.losses.pointwise import (
    AnchoredFeedbackLoss,
    BinaryFeedbackLoss,
    DirectRewardLoss,
)
from fused_prefopt.losses.protocol import Link, Reward
from fused_prefopt.losses.registry import register

# Log-ratios to a reference, r = β(L − L_ref)


@register("dpo", aliases=("sigmoid",), paper="Rafailov et al. 2023 (arXiv:2305.18290), eq. 7")
def dpo(*, beta: float = 0.1, label_smoothing: float = 0.0) -> PairwiseLoss:
    """``−(1−ε) log σ(m) − ε log σ(−m)``, ``m = β(Δ_w − Δ_l)``.

    Args:
        beta: β > 0, reward per nat.
        label_smoothing: 0 <= ε <= 0.5, probability that a label is flipped.
    """
    return PairwiseLoss(
        rewards.LogRatio(beta=beta), link=links.Logistic(label_smoothing=label_smoothing)
    )


def _robust(reward: Reward, epsilon: float, gamma: float, unbiased: bool) -> PairwiseLoss:
    link = links.UnbiasedRobust(epsilon=epsilon) if unbiased else links.Robust(epsilon=epsilon)
    return PairwiseLoss(reward, margins.ConstantMargin(gamma=gamma), link)


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
    return _robust(rewards.LogRatio(beta=beta), epsilon, gamma, unbiased)


@register("ipo", paper="Azar et al. 2023 (arXiv:2310.12036), eq. 17")
def ipo(*, tau: float = 0.1, length_normalized: bool = False) -> PairwiseLoss:
    """``(Δ_w − Δ_l − 1/(2τ))²``.

    Args:
        tau: τ > 0, strength of the KL regularisation.
        length_normalized: log-ratios per token, as TRL reads it.
    """
    require_number("tau", tau, low=0, above=True)
    reward = rewards.MeanLogRatio(beta=1.0) if length_normalized else rewards.LogRatio(beta=1.0)
    return PairwiseLoss(reward, margins.ConstantMargin(gamma=1 / (2 * tau)), links.Squared())


@register("sigmoid-norm", paper="Rafailov et al. 2023 (arXiv:2305.18290) on mean log-ratios, TRL")
def sigmoid_norm(*, beta: float = 0.1, label_smoothing: float = 0.0) -> PairwiseLoss:
    """``−(1−ε) log σ(m) − ε log σ(−m)``, ``m = β(Δ_w/|y_w| − Δ_l/|y_l|)``.

    Args:
        beta: β > 0, reward per nat per token.
        label_smoothing: 0 <= ε <= 0.5, probability that a label is flipped.
    """
    return PairwiseLoss(
        rewards.MeanLogRatio(beta=beta), link=links.Logistic(label_smoothing=label_smoothing)
    )


@register("f-dpo", paper="Wang et al. 2023 (arXiv:2309.16240), Table 1")
def f_dpo(
    *,
    beta: float = 0.1,
    divergence: str = "js_divergence",
    alpha: float = 0.5,
    link: str = "logistic",
    label_smoothing: float = 0.0,
    temperature: float = 0.05,
    length_normalized: bool = False,
) -> PairwiseLoss:
    """``−log σ(β f'(e^Δ_w) − β f'(e^Δ_l))``, f the generator of a divergence, or another link.

    Args:
        beta: β > 0, reward per nat where the policy is the reference.
        divergence: "reverse_kl" (f'(e^Δ) = Δ, DPO), "forward_kl" (1 − e^−Δ), "js_divergence"
            (log 2 + log σ(Δ)) or "alpha_divergence" ((e^((α−1)Δ) − 1)/(α−1)).
        alpha: α of the last, TRL's `f_alpha_divergence_coef`; 1 is DPO.
        link: of the reward margin: "logistic" (dpo), "hinge", "exact" (exo-pair), "robust"
            (robust-dpo, unbiased), "blended" (discopop), or "squared" (ipo, with β for its τ).
        label_smoothing: ε of "logistic", "exact" and "robust".
        temperature: T of "blended".
        length_normalized: f'(e^Δ)/|y| in place of f'(e^Δ), as TRL's ipo and sigmoid_norm.
    """
    require_number("beta", beta, low=0, above=True)
    # IPO's β is in its margin.
    scale = 1.0 if link == "squared" else beta
    curves: dict[str, Reward] = {
        "reverse_kl": rewards.LogRatio(beta=scale),
        "forward_kl": rewards.ForwardKlRatio(beta=scale),
        "js_divergence": rewards.JensenShannonRatio(beta=scale),
        "alpha_divergence": rewards.AlphaRatio(beta=scale, alpha=alpha),
    }
    require_choice("divergence", divergence, curves)
    blended = links.Blended(temperature=temperature)
    of_link: dict[str, Callable[[], Link]] = {
        "logistic": lambda: links.Logistic(label_smoothing=label_smoothing),
        "hinge": links.Hinge,
        "exact": lambda: links.Exact(label_smoothing=label_smoothing),
        "robust": lambda: links.UnbiasedRobust(epsilon=label_smoothing),
        "blended": lambda: blended,
        "squared": links.Squared,
    }
    require_choice("link", link, of_link)
    if label_smoothing and link not in ("logistic", "exact", "robust"):
        raise ValueError(f"label_smoothing: got {label_smoothing} with {link!r}, wanted 0")
    if temperature != 0.05 and link != "blended":
        raise ValueError(f"temperature: got {temperature} with link {link!r}, needs 'blended'")
    if alpha != 0.5 and divergence != "alpha_divergence":
        raise ValueError(
            f"alpha: got {alpha} with divergence {divergence!r}, needs 'alpha_divergence'"
        )
    reward = curves[divergence]
    return PairwiseLoss(
        rewards.PerToken(reward=reward) if length_normalized else reward,
        margins.ConstantMargin(gamma=1 / (2 * beta) if link == "squared" else 0.0),
        of_link[link](),
    )


@register(
    "length-dpo", aliases=("r-dpo",), paper="Park et al. 2024 (arXiv:2403.19159), γ-PO Table 6"
)
def length_dpo(*, beta: float = 0.1, alpha: float = 0.05) -> PairwiseLoss:
    """``−log σ(m − α(|y_w| − |y_l|))``, ``m = β(Δ_w − Δ_l)``.

    Args:
        beta: β > 0, reward per nat.
        alpha: α, reward per token of length.
    """
    return PairwiseLoss(rewards.LogRatio(beta=beta), margins.LengthMargin(alpha=alpha))


@register("odpo", paper="Amini et al. 2024 (arXiv:2402.10571)")
def odpo(*, beta: float = 0.1, alpha: float = 1.0, offset: str = "log") -> PairwiseLoss:
    """``−log σ(m − α f(s_w − s_l))``, ``m = β(Δ_w − Δ_l)``, s the `rewards`.

    Args:
        beta: β > 0, reward per nat.
        alpha: α, strength of the offset.
        offset: f, "log" or "identity" of the difference, which is taken as at least 1e-6.
    """
    return PairwiseLoss(
        rewards.LogRatio(beta=beta), margins.OffsetMargin(alpha=alpha, offset=offset)
    )


@register("reward-distillation", aliases=("rpo",), paper="Fisch et al. 2024 (arXiv:2405.19316)")
def reward_distillation(*, beta: float = 0.1) -> PairwiseLoss:
    """``((s_w − s_l) − m)²``, ``m = β(Δ_w − Δ_l)``, s the `rewards`.

    Args:
        beta: β > 0, reward per nat.
    """
    return PairwiseLoss(rewards.LogRatio(beta=beta), margins.ScoreMargin(), links.Squared())


@register("cal-dpo", paper="Xiao et al. 2024 (arXiv:2412.14516)")
def cal_dpo(*, beta: float = 0.1) -> PairwiseLoss:
    """``−log σ(Δ_w − Δ_l) + (Δ_w − 1/(2β))² + (Δ_l + 1/(2β))²``.

    Args:
        beta: β > 0; the log-ratios are drawn to ±1/(2β).
    """
    return PairwiseLoss(rewards.LogRatio(beta=1.0), regularisers=(terms.Calibration(beta=beta),))


@register("tdpo1", paper="Zeng et al. 2024 (arXiv:2404.11999), α-DPO eq. 17–18")
def tdpo1(*, beta: float = 0.1) -> PairwiseLoss:
    """``−log σ(m − β(K_l − K_w))``, ``m = β(Δ_w − Δ_l)``, K the `sequence_kl`.

    Args:
        beta: β > 0, reward per nat.
    """
    return PairwiseLoss(rewards.LogRatio(beta=beta), margins.SequenceKlMargin(scale=beta))


@register("tdpo2", paper="Zeng et al. 2024 (arXiv:2404.11999)")
def tdpo2(*, beta: float = 0.1, alpha: float = 0.5) -> PairwiseLoss:
    """``−log σ(m − αβ(K_l − sg K_w))``, ``m = β(Δ_w − Δ_l)``, K the `sequence_kl`.

    Args:
        beta: β > 0, reward per nat.
        alpha: α, weight of the divergence.
    """
    require_number("alpha", alpha)
    reward = rewards.LogRatio(beta=beta)
    return PairwiseLoss(reward, margins.SequenceKlMargin(scale=alpha * beta, stop_chosen=True))


def _scale(
    beta: float, alpha: float, momentum: float, level: str, statistics: str
) -> terms.DynamicScale:
    require_choice("statistics", statistics, ("ema", "reference"))
    scale = terms.DynamicScale(alpha=alpha, momentum=momentum, level=level, baseline=statistics)
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
    reward = rewards.LogRatio(beta=beta)
    scale = _scale(beta, alpha, momentum, level, statistics)
    return PairwiseLoss(reward, margins.ConstantMargin(gamma=gamma), scale=scale)


@register(
    "gamma-dpo", paper="Sun et al. 2025, γ-PO (arXiv:2506.03690), eq. 9–11, 22–25, Algorithm 2"
)
def gamma_dpo(
    *,
    beta: float = 0.1,
    gamma: float = 0.5,
    tau: float = 10.0,
    solver: str = "mirror",
    steps: int = 20,
    queue: bool = True,
    queue_size: int = 2048,
    sample_size: int = 256,
    seed: int = 0,
    centered: bool = False,
    label_smoothing: float = 0.0,
) -> PairwiseLoss:
    """``−(1−ε) log σ(m − γ_i) − ε log σ(γ_i − m)``, ``m = β(Δ_w − Δ_l)``, γ_i of mean γ₀.

    ``γ_i = γ₀ n p_i``, larger for larger m, where p minimises
    ``mean_i −log σ(m_i − γ_i) + τ Σ p_i log(n p_i)`` over the simplex: n pairs, of the batch of all
    ranks and a sample of past ones.

    The authors' code departs from the paper: it subtracts γ_i − γ₀ (``centered=True``) and takes
    the γ_i before the last update (``steps=19``). Its queue is one per rank and starts with eight
    standard normal numbers, ours starts empty and is that of all ranks.

    Args:
        beta: β > 0, reward per nat.
        gamma: γ₀ >= 0, mean target margin in units of reward.
        tau: τ > 0, pull towards equal margins.
        solver: "mirror" (the paper's descent) or "exact" (the minimum, for γ₀/τ <= 10).
        steps: mirror-descent updates.
        queue: fill the pool with past margins (Algorithm 2), or not (Algorithm 1).
        queue_size: past margins remembered.
        sample_size: the pool is filled up to this size.
        seed: of the sampling.
        centered: subtract γ_i − γ₀, of mean 0, as the authors' code does, instead of γ_i.
        label_smoothing: 0 <= ε <= 0.5, probability that a label is flipped.
    """
    margin = DynamicMargin(
        gamma=gamma,
        tau=tau,
        solver=solver,
        steps=steps,
        queue=queue,
        queue_size=queue_size,
        sample_size=sample_size,
        seed=seed,
        centered=centered,
    )
    return PairwiseLoss(
        rewards.LogRatio(beta=beta), margin, links.Logistic(label_smoothing=label_smoothing)
    )


@register("hinge", paper="Liu et al. 2024, RSO (arXiv:2309.06657), the SLiC loss on log-ratios")
def hinge(*, beta: float = 0.1) -> PairwiseLoss:
    """``max(0, 1 − m)``, ``m = β(Δ_w − Δ_l)``.

    Args:
        beta: β > 0, reward per nat.
    """
    return PairwiseLoss(rewards.LogRatio(beta=beta), link=links.Hinge())


@register("exo-pair", paper="Ji et al. 2024 (arXiv:2402.00856), eq. 16")
def exo_pair(*, beta: float = 0.1, label_smoothing: float = 1e-3) -> PairwiseLoss:
    """``σ(m) (log σ(m) − log(1−ε)) + σ(−m) (log σ(−m) − log ε)``, ``m = β(Δ_w − Δ_l)``.

    Args:
        beta: β > 0, reward per nat.
        label_smoothing: 0 < ε <= 0.5, probability that a label is flipped.
    """
    return PairwiseLoss(
        rewards.LogRatio(beta=beta), link=links.Exact(label_smoothing=label_smoothing)
    )


@register("discopop", paper="Lu et al. 2024 (arXiv:2406.08414), eq. 5")
def discopop(*, beta: float = 0.1, temperature: float = 0.05) -> PairwiseLoss:
    """``−(1−s) log σ(m) + s e^−m``, ``s = σ(m/T)``, ``m = β(Δ_w − Δ_l)``.

    Args:
        beta: β > 0, reward per nat.
        temperature: 0 < T <= 1, TRL's `discopop_tau`.
    """
    return PairwiseLoss(rewards.LogRatio(beta=beta), link=links.Blended(temperature=temperature))


@register("dpo-positive", aliases=("dpop",), paper="Pal et al. 2024 (arXiv:2402.13228)")
def dpo_positive(*, beta: float = 0.3, penalty: float = 50.0) -> PairwiseLoss:
    """``−log σ(m − βλ max(0, −Δ_w))``, ``m = β(Δ_w − Δ_l)``.

    Args:
        beta: β > 0, reward per nat.
        penalty: λ >= 0, of a chosen completion that becomes rarer than under the reference.
    """
    require_number("penalty", penalty, low=0)
    return PairwiseLoss(rewards.LogRatio(beta=beta), margins.DropMargin(scale=beta * penalty))


@register("dpo-shift", paper="Yang et al. 2025 (arXiv:2502.07599)")
def dpo_shift(*, beta: float = 0.1, share: float = 0.95) -> PairwiseLoss:
    """``−log σ(βΔ_w − λβΔ_l)``.

    Args:
        beta: β > 0, reward per nat.
        share: 0 < λ <= 1, weight of the rejected completion; 1 is DPO.
    """
    return PairwiseLoss(rewards.RejectedShare(reward=rewards.LogRatio(beta=beta), share=share))


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
    return PairwiseLoss(rewards.LogRatio(beta=beta), weighting=terms.OnPolicyWeights())


@register("dr-dpo", paper="Wu et al. 2024, Dr. DPO (arXiv:2407.07880)")
def dr_dpo(*, beta: float = 0.1, temperature: float = 1.0) -> PairwiseLoss:
    """``−T log mean over pairs of σ(m)^(1/T)``, ``m = β(Δ_w − Δ_l)``.

    The mean is over the batch, of all ranks.

    Args:
        beta: β > 0, reward per nat.
        temperature: T > 0, the paper's β′; the mean of the pairs' losses as T → ∞.
    """
    return PairwiseLoss(
        rewards.LogRatio(beta=beta), reduction=terms.SoftMinimum(temperature=temperature)
    )


# Log-ratios, each completion or each quantile against an anchor


@register("nca-pair", paper="Chen et al. 2024 (arXiv:2402.05369), for two responses")
def nca_pair(*, beta: float = 0.1) -> AnchoredLoss:
    """``−log σ(βΔ_w) − ½ log σ(−βΔ_w) − ½ log σ(−βΔ_l)``.

    Args:
        beta: β > 0, reward per nat.
    """
    return AnchoredLoss(rewards.LogRatio(beta=beta), noise_contrastive)


@register("bco-pair", paper="Jung et al. 2024 (arXiv:2404.04656), without the reward shift")
def bco_pair(*, beta: float = 0.1) -> AnchoredLoss:
    """``−log σ(βΔ_w) − log σ(−βΔ_l)``.

    Args:
        beta: β > 0, reward per nat.
    """
    return AnchoredLoss(rewards.LogRatio(beta=beta), binary)


@register("sppo-hard", paper="Wu et al. 2024 (arXiv:2405.00675), eq. 4.7 with certain preferences")
def sppo_hard(*, beta: float = 0.1) -> AnchoredLoss:
    """``(Δ_w − 1/(2β))² + (Δ_l + 1/(2β))²``.

    Args:
        beta: β > 0; the log-ratios are drawn to ±1/(2β).
    """
    return AnchoredLoss(rewards.LogRatio(beta=beta), self_play, weight=1 / beta**2)


@register("apo-zero", paper="D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7")
def apo_zero(*, beta: float = 0.1) -> AnchoredLoss:
    """``1 − σ(βΔ_w) + σ(βΔ_l)``.

    Args:
        beta: β > 0, reward per nat.
    """
    return AnchoredLoss(rewards.LogRatio(beta=beta), raise_chosen)


@register("apo-down", paper="D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 8")
def apo_down(*, beta: float = 0.1) -> AnchoredLoss:
    """``σ(βΔ_w) + 1 − σ(β(Δ_w − Δ_l))``.

    Args:
        beta: β > 0, reward per nat.
    """
    return AnchoredLoss(rewards.LogRatio(beta=beta), lower_both)


@register("aot", paper="Melnyk et al. 2024 (arXiv:2406.05882), paired")
def aot(*, beta: float = 0.1, label_smoothing: float = 0.0) -> TransportLoss:
    """``−(1−ε) log σ(βd₍ᵢ₎) − ε log σ(−βd₍ᵢ₎)``, ``d₍ᵢ₎ = a₍ᵢ₎ − b₍ᵢ₎``, paired.

    ``a = L_w − L_l`` of the policy, b the same of the reference; ₍ᵢ₎ is the i-th smallest of the
    batch, of all ranks: the two are compared as distributions.

    Args:
        beta: β > 0, reward per nat.
        label_smoothing: 0 <= ε <= 0.5, probability that a label is flipped.
    """
    link = links.Logistic(label_smoothing=label_smoothing)
    return TransportLoss(rewards.LogRatio(beta=beta), paired_quantiles, link)


@register("aot-unpaired", paper="Melnyk et al. 2024 (arXiv:2406.05882), unpaired")
def aot_unpaired(*, beta: float = 0.1, label_smoothing: float = 0.0) -> TransportLoss:
    """``−(1−ε) log σ(βd₍ᵢ₎) − ε log σ(−βd₍ᵢ₎)``, ``d₍ᵢ₎ = a₍ᵢ₎ − b₍ᵢ₎``, unpaired.

    a is Δ_w, b is Δ_l; ₍ᵢ₎ is the i-th smallest of the batch, of all ranks: who is paired with
    whom does not matter.

    Args:
        beta: β > 0, reward per nat.
        label_smoothing: 0 <= ε <= 0.5, probability that a label is flipped.
    """
    link = links.Logistic(label_smoothing=label_smoothing)
    return TransportLoss(rewards.LogRatio(beta=beta), unpaired_quantiles, link)


# Mean log-probs, r = β L/|y|, or a curve of them


@register("simpo", paper="Meng et al. 2024 (arXiv:2405.14734), eq. 6")
def simpo(*, beta: float = 2.5, gamma: float = 1.0, label_smoothing: float = 0.0) -> PairwiseLoss:
    """``−(1−ε) log σ(m − γ) − ε log σ(γ − m)``, ``m = β(L̄_w − L̄_l)``.

    Args:
        beta: β > 0, reward per nat per token.
        gamma: γ, target margin in units of reward.
        label_smoothing: 0 <= ε <= 0.5, probability that a label is flipped.
    """
    return PairwiseLoss(
        rewards.MeanLogp(beta=beta),
        margins.ConstantMargin(gamma=gamma),
        links.Logistic(label_smoothing=label_smoothing),
    )


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
    return _robust(rewards.MeanLogp(beta=beta), epsilon, gamma, unbiased)


@register("alpha-po", aliases=("alphapo",), paper="Gupta et al. 2025 (arXiv:2501.03884)")
def alpha_po(*, beta: float = 2.5, gamma: float = 1.0, alpha: float = 0.25) -> PairwiseLoss:
    """``−log σ(r_w − r_l − γ)``, ``r = β (1 − p̄^−α)/α``, ``log p̄ = L̄``.

    Args:
        beta: β > 0, reward per nat per token where p̄ = 1.
        gamma: γ, target margin in units of reward.
        alpha: α, the bend of the reward; 0 is SimPO.
    """
    return PairwiseLoss(
        rewards.MeanPower(beta=beta, alpha=alpha), margins.ConstantMargin(gamma=gamma)
    )


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
    reward = rewards.MeanLogp(beta=beta)
    scale = _scale(beta, alpha, momentum, level, statistics)
    return PairwiseLoss(reward, margins.ConstantMargin(gamma=gamma), scale=scale)


@register(
    "gamma-simpo",
    paper="Sun et al. 2025, γ-PO (arXiv:2506.03690), eq. 9–10, 12, 22–25, Algorithm 2",
)
def gamma_simpo(
    *,
    beta: float = 10.0,
    gamma: float = 4.0,
    tau: float = 10.0,
    solver: str = "mirror",
    steps: int = 20,
    queue: bool = True,
    queue_size: int = 2048,
    sample_size: int = 256,
    seed: int = 0,
) -> PairwiseLoss:
    """``−log σ(m − γ_i)``, ``m = β(L̄_w − L̄_l)``, γ_i of mean γ₀, larger for larger m.

    ``γ_i = γ₀ n p_i``, where p minimises ``mean_i −log σ(m_i − γ_i) + τ Σ p_i log(n p_i)`` over
    the simplex: n pairs, of the batch of all ranks and a sample of past ones.

    The authors' code takes the γ_i before the last update (``steps=19``). Its queue is one per
    rank and starts with eight standard normal numbers, ours starts empty and is that of all ranks.

    Args:
        beta: β > 0, reward per nat per token.
        gamma: γ₀ >= 0, mean target margin in units of reward.
        tau: τ > 0, pull towards equal margins.
        solver: "mirror" (the paper's descent) or "exact" (the minimum, for γ₀/τ <= 10).
        steps: mirror-descent updates.
        queue: fill the pool with past margins (Algorithm 2), or not (Algorithm 1).
        queue_size: past margins remembered.
        sample_size: the pool is filled up to this size.
        seed: of the sampling.
    """
    margin = DynamicMargin(
        gamma=gamma,
        tau=tau,
        solver=solver,
        steps=steps,
        queue=queue,
        queue_size=queue_size,
        sample_size=sample_size,
        seed=seed,
    )
    return PairwiseLoss(rewards.MeanLogp(beta=beta), margin)


@register("alpha-dpo", paper="Wu et al. 2025, α-DPO (arXiv:2410.10148), eq. 8–12, Table 2, C.4")
def alpha_dpo(
    *,
    beta: float = 10.0,
    gamma: float = 4.0,
    alpha: float = 0.05,
    length_normalized: bool = True,
    implicit_reference: str = "ratio",
    margin_scale: str = "beta",
    normalize: bool = True,
    stop_gradient: bool = True,
    statistics: str = "ema",
    momentum: float = 0.9,
    mean: float | None = None,
    std: float | None = None,
) -> PairwiseLoss:
    """``−log σ(u − sg[γ + α s z])``, ``u = β(L̄_w − L̄_l)``, ``z = (gap − μ)/σ``.

    ``gap = (L̄_w − L̄_ref,w) − (L̄_l − L̄_ref,l)``; μ and σ are its mean and standard deviation.

    The authors' code, ``statistics="reference"``, makes σ NaN for good on a single pair, updates μ
    and σ in evaluation too and does not save them; here none of that happens.

    Args:
        beta: β > 0, reward per nat (per token).
        gamma: γ, mean target margin in units of reward.
        alpha: α; 0 is SimPO.
        length_normalized: log-probs are means per token; False uses sums.
        implicit_reference: what the gap compares: "ratio" L̄ − L̄_ref (the method), "policy" L̄,
            "reference" L̄_ref, "inverse_reference" −L̄_ref, "sequence_kl" TDPO's K_l − K_w.
        margin_scale: "beta" for s = β (the authors' code), "unit" for s = 1 (eq. 12 as printed).
        normalize: False uses the margin γ + αβ gap (eq. 9 with M of eq. 10).
        stop_gradient: False lets the gap's gradient pass.
        statistics: source of μ and σ: "ema" (bias-corrected averages over the batches of all
            ranks), "batch" (the current one alone), "dataset" (given) or "reference" (the
            authors' recipe, averages from zero).
        momentum: weight of the past in "ema" and "reference".
        mean: μ of the gap over the training set, for "dataset".
        std: σ of the gap over the training set, for "dataset".
    """
    require_choice("implicit_reference", implicit_reference, IMPLICIT_REFERENCES)
    require_choice("margin_scale", margin_scale, ("beta", "unit"))
    # Eq. 10's M carries β itself; only its z-score loses the unit.
    scale = 1.0 if normalize and margin_scale == "unit" else beta
    source = Normalisation(statistics=statistics, momentum=momentum, mean=mean, std=std)
    return PairwiseLoss(
        rewards.MeanLogp(beta=beta) if length_normalized else rewards.SumLogp(beta=beta),
        AdaptiveMargin(
            gap=gap_of(implicit_reference, length_normalized=length_normalized),
            gamma=gamma,
            alpha=alpha,
            scale=scale,
            normalisation=source if normalize else None,
            stop_gradient=stop_gradient,
        ),
    )


@register("orpo", paper="Hong et al. 2024 (arXiv:2403.07691), eq. 6–7")
def orpo(*, weight: float = 0.1, nll: str = "sequence_mean") -> PairwiseLoss:
    """``NLL − λ log σ(o_w − o_l)``, ``o = L̄ − log(1 − e^L̄)``, NLL = −L̄_w by default.

    o is the log-odds of the mean token, finite also as its probability reaches 1.

    Args:
        weight: λ >= 0.
        nll: NLL is "sequence_mean" −L̄_w, "sum" −L_w, "token_mean", the mean of −log π over all
            chosen tokens of the batch, of all ranks, or "whole_token_mean" (TRL's), the same with
            the tokens of the chosen ones' prompts.
    """
    term = terms.ChosenNll(nll=nll)
    return PairwiseLoss(rewards.LogOdds(), link=links.Weighted(weight=weight), regularisers=(term,))


# Summed log-probs, r = β L


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
    term = terms.ChosenNll(weight=nll_weight, nll=nll)
    return PairwiseLoss(rewards.SumLogp(beta=beta), regularisers=(term,))


@register("slic-hf", paper="Zhao et al. 2023 (arXiv:2305.10425)")
def slic_hf(*, delta: float = 1.0, nll_weight: float = 0.1) -> PairwiseLoss:
    """``max(0, δ − (L_w − L_l)) − λ L_w``.

    Args:
        delta: δ, margin in nats.
        nll_weight: λ >= 0.
    """
    require_number("nll_weight", nll_weight, low=0)
    nll = terms.ChosenNll(weight=nll_weight)
    return PairwiseLoss(
        rewards.SumLogp(beta=1.0), link=links.Hinge(delta=delta), regularisers=(nll,)
    )


@register("sft", aliases=("nll",), paper="maximum likelihood of the chosen completions")
def sft(*, nll: str = "token_mean") -> PairwiseLoss:
    """``NLL`` of the chosen completions, ``−Σ L_w / Σ |y_w|`` over the batch by default.

    Args:
        nll: NLL is "token_mean" (TRL's), the mean of −log π over all chosen tokens of the batch,
            of all ranks, "sequence_mean" −L̄_w, or "sum" −L_w.
    """
    term = terms.ChosenNll(nll=nll)
    return PairwiseLoss(rewards.SumLogp(beta=1.0), link=links.Indifferent(), regularisers=(term,))


# Single completions


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
    return BinaryFeedbackLoss(rewards.LogRatio(beta=beta), desirable_weight, undesirable_weight)


@register("apo-zero-unpaired", paper="D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7")
def apo_zero_unpaired(
    *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> AnchoredFeedbackLoss:
    """``λ_D (1 − σ(βΔ))`` or ``λ_U σ(βΔ)``, point-wise.

    Args:
        beta: β > 0, reward per nat.
        desirable_weight: λ_D >= 0.
        undesirable_weight: λ_U >= 0.
    """
    return AnchoredFeedbackLoss(rewards.LogRatio(beta=beta), desirable_weight, undesirable_weight)


@register("dro", paper="Direct Reward Optimization (DRO), eq. 6–8, Algorithm 1")
def dro(*, beta: float = 0.1, log_z0: float = 50.0) -> DirectRewardLoss:
    """``(s − βΔ − β log Z)²``, ``log Z = sg[L(x∖t₀) − L_ref(x∖t₀)] + log_z0``, point-wise.

    s are the `rewards`, x∖t₀ the prompt without its first token. The mean is over the responses
    of a prompt (`groups`; each its own without them), then over the prompts of this process.

    Args:
        beta: β > 0, reward per nat.
        log_z0: offset of all targets, in nats; larger lowers the implicit rewards.
    """
    return DirectRewardLoss(rewards.LogRatio(beta=beta), log_z0)
