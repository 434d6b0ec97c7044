"""Losses of pairs on log-ratios to a reference, r = β(L − L_ref), or a curve of them.

One file of more than 450 lines, as all that are built on one reward are found in one place.
"""

from __future__ import annotations

from collections.abc import Callable

from fused_prefopt.checks import require_choice, require_number
from fused_prefopt.losses import links, margins, rewards, terms, weightings
from fused_prefopt.losses.dynamic_margin import DynamicMargin
from fused_prefopt.losses.pairwise import (
    PairwiseLoss,
)
from fused_prefopt.losses.perturbed_scale import PerturbedScale
from fused_prefopt.losses.protocol import Link, Reward
from fused_prefopt.losses.registry import register


@register("dpo", aliases=("sigmoid",), paper="Rafailov et al. 2023 (arXiv:2305.18290), eq. 7")
def dpo(
    *, beta: float = 0.1, label_smoothing: float = 0.0, length_normalized: bool = False
) -> PairwiseLoss:
    """``−(1−ε) log σ(m) − ε log σ(−m)``, ``m = β(Δ_w − Δ_l)``.

    Args:
        beta: β > 0, reward per nat.
        label_smoothing: 0 <= ε <= 0.5, probability that a label is flipped.
        length_normalized: Δ/|y| in place of Δ; β is then per nat per token.
    """
    reward = rewards.log_ratio(beta=beta, length_normalized=length_normalized)
    return PairwiseLoss(reward, link=links.Logistic(label_smoothing=label_smoothing))


@register("focal-po", aliases=("focalpo",), paper="Liu et al. 2025 (arXiv:2501.06645)")
def focal_po(
    *, beta: float = 0.1, focus: float = 0.05, length_normalized: bool = False
) -> PairwiseLoss:
    """``−σ(m)^κ log σ(m)``, ``m = β(Δ_w − Δ_l)``: pairs that are ranked wrongly count less.

    The factor has its gradient. A pair with ``log σ(m) < −1/κ`` is given up: its loss rises with m.

    Args:
        beta: β > 0, reward per nat.
        focus: κ >= 0, the paper's γ; 0 is DPO.
        length_normalized: Δ/|y| in place of Δ; β is then per nat per token.
    """
    reward = rewards.log_ratio(beta=beta, length_normalized=length_normalized)
    return PairwiseLoss(reward, link=links.Focal(focus=focus))


@register(
    "chi-po", aliases=("chipo",), paper="Huang et al. 2024, χPO (arXiv:2407.13399), Algorithm 1"
)
def chi_po(
    *,
    beta: float = 0.1,
    power: float = 1.0,
    kl_weight: float = 1.0,
    smallest: float = -88.0,
    largest: float = 20.0,
    r_max: float | None = None,
) -> PairwiseLoss:
    """``−log σ(clip(β φ_w − β φ_l))``, ``φ = exp clip(αΔ) + κΔ``: φ(z) = z + log z of the ratio z.

    The outer clip, to ±2R_max, is the algorithm's; the inner one, of the paper's experiments, keeps
    the exponential finite. Beyond a clip there is no gradient.

    Args:
        beta: β > 0, reward per unit of φ.
        power: α > 0, power of the ratio in the paper's φ̃.
        kl_weight: κ > 0, weight of the log-ratio in it, the paper's γ.
        smallest: lower end of the inner clip, in nats.
        largest: upper end of the inner clip, at most 80.
        r_max: R_max > 0, bound of the rewards; None leaves the outer clip out.
    """
    reward = rewards.ChiSquaredRatio(
        beta=beta, power=power, kl_weight=kl_weight, smallest=smallest, largest=largest
    )
    if r_max is None:
        return PairwiseLoss(reward)
    require_number("r_max", r_max, low=0, above=True)
    return PairwiseLoss(reward, link=links.Clipped(limit=2 * r_max))


@register(
    "robust-dpo",
    aliases=("rdpo",),
    paper="Chowdhury et al. 2024 (arXiv:2403.00409), γ-PO Table 6",
)
def robust_dpo(
    *,
    beta: float = 0.1,
    epsilon: float = 0.1,
    gamma: float = 0.0,
    unbiased: bool = False,
    length_normalized: bool = False,
) -> PairwiseLoss:
    """``−(1−ε) log σ(m−γ) − ε log σ(−m−γ)``, or its unbiased form, ``m = β(Δ_w − Δ_l)``.

    Args:
        beta: β > 0, reward per nat.
        epsilon: 0 <= ε <= 0.5, probability that a label is flipped.
        gamma: γ, target margin in units of reward.
        unbiased: ``[−(1−ε) log σ(m−γ) + ε log σ(−m−γ)] / (1−2ε)`` instead.
        length_normalized: Δ/|y| in place of Δ; β is then per nat per token.
    """
    reward = rewards.log_ratio(beta=beta, length_normalized=length_normalized)
    link = links.robust(epsilon=epsilon, unbiased=unbiased)
    return PairwiseLoss(reward, margins.ConstantMargin(gamma=gamma), link)


@register("ipo", paper="Azar et al. 2023 (arXiv:2310.12036), eq. 17")
def ipo(*, tau: float = 0.1, length_normalized: bool = False) -> PairwiseLoss:
    """``(Δ_w − Δ_l − 1/(2τ))²``.

    Args:
        tau: τ > 0, strength of the KL regularisation.
        length_normalized: log-ratios per token, as TRL reads it.
    """
    require_number("tau", tau, low=0, above=True)
    reward = rewards.log_ratio(beta=1.0, length_normalized=length_normalized)
    return PairwiseLoss(reward, margins.ConstantMargin(gamma=1 / (2 * tau)), links.Squared())


@register("sigmoid-norm", paper="Rafailov et al. 2023 (arXiv:2305.18290) on mean log-ratios, TRL")
def sigmoid_norm(*, beta: float = 0.1, label_smoothing: float = 0.0) -> PairwiseLoss:
    """``−(1−ε) log σ(m) − ε log σ(−m)``, ``m = β(Δ_w/|y_w| − Δ_l/|y_l|)``.

    Args:
        beta: β > 0, reward per nat per token.
        label_smoothing: 0 <= ε <= 0.5, probability that a label is flipped.
    """
    return dpo(beta=beta, label_smoothing=label_smoothing, length_normalized=True)


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


@register("beta-dpo", paper="Wu et al. 2024, β-DPO (arXiv:2407.08639), γ-PO Table 6")
def beta_dpo(
    *,
    beta: float = 0.1,
    gamma: float = 0.0,
    alpha: float = 0.1,
    momentum: float = 0.9,
    level: str = "pair",
    statistics: str = "ema",
    length_normalized: bool = False,
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
        length_normalized: Δ/|y| in place of Δ; β is then per nat per token.
    """
    reward = rewards.log_ratio(beta=beta, length_normalized=length_normalized)
    scale = terms.dynamic_scale(
        beta=beta, alpha=alpha, momentum=momentum, level=level, statistics=statistics
    )
    return PairwiseLoss(reward, margins.ConstantMargin(gamma=gamma), scale=scale)


@register(
    "epsilon-dpo",
    aliases=("eps-dpo", "e-dpo"),
    paper="Lee et al. 2025, ε-DPO (arXiv:2502.13177), eq. 3–5 and Algorithm 1",
)
def epsilon_dpo(*, beta: float = 0.1, epsilon: float = 0.01, update_every: int = 1) -> PairwiseLoss:
    """``−log σ(ρm)``, ``ρ = b / (1 + εs)``, ``m = β(Δ_w − Δ_l)``, s ∈ {−1, 0, 1} of the pair.

    s is 1 where L_w − L_l rises from the `interpolated` policy over the policy to the
    `extrapolated` one, −1 where it falls: those of a stronger and a weaker KL penalty, β/(1−ε) and
    β/(1+ε). b starts from 1, and ``b ← b / (1 + ε mean(s))`` after use. That is the authors' code;
    it moves b once in a step of the optimizer. Rewards are logged with the first β.

    In training it takes the reference's model: one pass over both heads gives all log-probs and,
    with the gradient, costs 5 P whatever the workspace, where "dpo" costs 4 P on `local` (3 P, and
    1 P for the reference).

    Args:
        beta: β > 0, reward per nat, at the start.
        epsilon: 0 < ε < 1, size of the perturbation and of a step.
        update_every: batches after which b moves; give the `gradient_accumulation_steps`.
    """
    scale = PerturbedScale(epsilon=epsilon, update_every=update_every)
    return PairwiseLoss(rewards.LogRatio(beta=beta), scale=scale)


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
    length_normalized: bool = False,
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
        length_normalized: Δ/|y| in place of Δ; β is then per nat per token.
    """
    reward = rewards.log_ratio(beta=beta, length_normalized=length_normalized)
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
    return PairwiseLoss(reward, margin, links.Logistic(label_smoothing=label_smoothing))


@register("hinge", paper="Liu et al. 2024, RSO (arXiv:2309.06657), the SLiC loss on log-ratios")
def hinge(*, beta: float = 0.1, length_normalized: bool = False) -> PairwiseLoss:
    """``max(0, 1 − m)``, ``m = β(Δ_w − Δ_l)``.

    Args:
        beta: β > 0, reward per nat.
        length_normalized: Δ/|y| in place of Δ; β is then per nat per token.
    """
    reward = rewards.log_ratio(beta=beta, length_normalized=length_normalized)
    return PairwiseLoss(reward, link=links.Hinge())


@register("exo-pair", paper="Ji et al. 2024 (arXiv:2402.00856), eq. 16")
def exo_pair(
    *, beta: float = 0.1, label_smoothing: float = 1e-3, length_normalized: bool = False
) -> PairwiseLoss:
    """``σ(m) (log σ(m) − log(1−ε)) + σ(−m) (log σ(−m) − log ε)``, ``m = β(Δ_w − Δ_l)``.

    Args:
        beta: β > 0, reward per nat.
        label_smoothing: 0 < ε <= 0.5, probability that a label is flipped.
        length_normalized: Δ/|y| in place of Δ; β is then per nat per token.
    """
    reward = rewards.log_ratio(beta=beta, length_normalized=length_normalized)
    return PairwiseLoss(reward, link=links.Exact(label_smoothing=label_smoothing))


@register("discopop", paper="Lu et al. 2024 (arXiv:2406.08414), eq. 5")
def discopop(
    *, beta: float = 0.1, temperature: float = 0.05, length_normalized: bool = False
) -> PairwiseLoss:
    """``−(1−s) log σ(m) + s e^−m``, ``s = σ(m/T)``, ``m = β(Δ_w − Δ_l)``.

    Args:
        beta: β > 0, reward per nat.
        temperature: 0 < T <= 1, TRL's `discopop_tau`.
        length_normalized: Δ/|y| in place of Δ; β is then per nat per token.
    """
    reward = rewards.log_ratio(beta=beta, length_normalized=length_normalized)
    return PairwiseLoss(reward, link=links.Blended(temperature=temperature))


@register("bpo", aliases=("sba",), paper="Kim et al. 2025 (arXiv:2505.19601), eq. 10, Table 2")
def bpo(
    *,
    beta: float = 0.1,
    power: float = -0.5,
    scale: float = 4.0,
    smallest_ratio: float = 0.01,
    largest_ratio: float | None = None,
) -> PairwiseLoss:
    """``[e^(−(λ+1)m) / (λ+1) − e^(λm) / λ] / s``, ``m = β(Δ_w − Δ_l)``; ``R = e^−m`` is bounded.

    What the paper calls SBA; its logistic divergence is `dpo`. For λ = 0 it is ``(e^−m − m)/s``.
    λ = −½ is the paper's but for dialogue (HH), where λ = 1.2 won most, with β 0.1 and R >= 0.01;
    TL;DR had β 0.5 and R >= 0.025, Mistral-7B-Base R >= 0.003.

    Args:
        beta: β > 0, reward per nat.
        power: λ > −1; larger ones train on pairs far from m = 0.
        scale: s > 0; 4 gives DPO's gradient at m = 0, 1/(λ+1) the paper's BA (λ = 0: KLIEP, 1:
            LSIF).
        smallest_ratio: R >= this number, which is >= 0: pairs won by more do not train.
        largest_ratio: R <= this number, or None: pairs lost by more do not train.
    """
    link = links.BasuPower(
        power=power, scale=scale, smallest_ratio=smallest_ratio, largest_ratio=largest_ratio
    )
    return PairwiseLoss(rewards.LogRatio(beta=beta), link=link)


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
def dpo_shift(
    *, beta: float = 0.1, share: float = 0.95, length_normalized: bool = False
) -> PairwiseLoss:
    """``−log σ(βΔ_w − λβΔ_l)``.

    Args:
        beta: β > 0, reward per nat.
        share: 0 < λ <= 1, weight of the rejected completion; 1 is DPO.
        length_normalized: Δ/|y| in place of Δ; β is then per nat per token.
    """
    reward = rewards.log_ratio(beta=beta, length_normalized=length_normalized)
    return PairwiseLoss(rewards.RejectedShare(reward=reward, share=share))


@register("bdpo", paper="Cho et al. 2025 (arXiv:2506.12725), §4")
def bdpo(*, beta: float = 0.1, mixture: float = 0.5) -> PairwiseLoss:
    """``−log σ(βΔ_w − β log(λ e^Δ_l + 1 − λ))``: the rejected completion's reward is bounded below.

    Args:
        beta: β > 0, reward per nat.
        mixture: 0 < λ <= 1, the policy's part in the mixture with the reference; 1 is DPO.
    """
    return PairwiseLoss(rewards.BoundedRatio(beta=beta, mixture=mixture))


@register("wpo", paper="Zhou et al. 2024 (arXiv:2406.11827), eq. 2")
def wpo(*, beta: float = 0.1, length_normalized: bool = False) -> PairwiseLoss:
    """``−w log σ(m)``, ``w = sg exp(L̄_w − C̄_w) exp(L̄_l − C̄_l)``, ``m = β(Δ_w − Δ_l)``.

    C is the `collision`, Σ over tokens of ``log Σ_v π(v)²``, which makes a token drawn from the
    policy count 1 on average. `PreferenceLoss` computes it from the hidden states, at the cost of
    an evaluation more. A batch of known log-probs without it has C = 0: w is then the product of
    the completions' mean likelihoods per token, smaller, and pairs count less where the policy
    is unsure of every word.

    Args:
        beta: β > 0, reward per nat.
        length_normalized: Δ/|y| in place of Δ; β is then per nat per token.
    """
    reward = rewards.log_ratio(beta=beta, length_normalized=length_normalized)
    return PairwiseLoss(reward, weighting=weightings.OnPolicyWeights())


@register("dr-dpo", paper="Wu et al. 2024, Dr. DPO (arXiv:2407.07880)")
def dr_dpo(
    *, beta: float = 0.1, temperature: float = 1.0, length_normalized: bool = False
) -> PairwiseLoss:
    """``−T log mean over pairs of σ(m)^(1/T)``, ``m = β(Δ_w − Δ_l)``.

    The mean is over the batch, of all ranks.

    Args:
        beta: β > 0, reward per nat.
        temperature: T > 0, the paper's β′; the mean of the pairs' losses as T → ∞.
        length_normalized: Δ/|y| in place of Δ; β is then per nat per token.
    """
    reward = rewards.log_ratio(beta=beta, length_normalized=length_normalized)
    return PairwiseLoss(reward, reduction=terms.SoftMinimum(temperature=temperature))
