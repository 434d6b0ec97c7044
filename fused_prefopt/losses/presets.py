"""Published methods as compositions: one function and one registration each."""

from __future__ import annotations

from fused_prefopt.checks import require_choice
from fused_prefopt.losses.gaps import IMPLICIT_REFERENCES, gap_of
from fused_prefopt.losses.links import Logistic
from fused_prefopt.losses.margins import (
    AdaptiveMargin,
    ConstantMargin,
    DynamicMargin,
    Normalisation,
)
from fused_prefopt.losses.pairwise import PairwiseLoss
from fused_prefopt.losses.pointwise import DirectRewardLoss
from fused_prefopt.losses.registry import register
from fused_prefopt.losses.rewards import LogRatio, MeanLogp, SumLogp


@register("dpo", aliases=("sigmoid",), paper="Rafailov et al. 2023 (arXiv:2305.18290), eq. 7")
def dpo(*, beta: float = 0.1, label_smoothing: float = 0.0) -> PairwiseLoss:
    """``−(1−ε) log σ(m) − ε log σ(−m)``, ``m = β(Δ_w − Δ_l)``.

    Args:
        beta: β > 0, reward per nat.
        label_smoothing: 0 <= ε <= 0.5, probability that a label is flipped.
    """
    return PairwiseLoss(LogRatio(beta=beta), link=Logistic(label_smoothing=label_smoothing))


@register("simpo", paper="Meng et al. 2024 (arXiv:2405.14734), eq. 6")
def simpo(*, beta: float = 2.5, gamma: float = 1.0, label_smoothing: float = 0.0) -> PairwiseLoss:
    """``−(1−ε) log σ(m − γ) − ε log σ(γ − m)``, ``m = β(L̄_w − L̄_l)``.

    Args:
        beta: β > 0, reward per nat per token.
        gamma: γ, target margin in units of reward.
        label_smoothing: 0 <= ε <= 0.5, probability that a label is flipped.
    """
    return PairwiseLoss(
        MeanLogp(beta=beta),
        ConstantMargin(gamma=gamma),
        Logistic(label_smoothing=label_smoothing),
    )


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
        MeanLogp(beta=beta) if length_normalized else SumLogp(beta=beta),
        AdaptiveMargin(
            gap=gap_of(implicit_reference, length_normalized=length_normalized),
            gamma=gamma,
            alpha=alpha,
            scale=scale,
            normalisation=source if normalize else None,
            stop_gradient=stop_gradient,
        ),
    )


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
    return PairwiseLoss(LogRatio(beta=beta), margin, Logistic(label_smoothing=label_smoothing))


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
    return PairwiseLoss(MeanLogp(beta=beta), margin)


@register("dro", paper="Direct Reward Optimization (DRO), eq. 6–8, Algorithm 1")
def dro(*, beta: float = 0.1, log_z0: float = 50.0) -> DirectRewardLoss:
    """``(s − βΔ − β log Z)²``, ``log Z = sg[L(x∖t₀) − L_ref(x∖t₀)] + log_z0``, point-wise.

    s are the `rewards`, x∖t₀ the prompt without its first token. The mean is over the responses
    of a prompt (`groups`; each its own without them), then over the prompts of this process.

    Args:
        beta: β > 0, reward per nat.
        log_z0: offset of all targets, in nats; larger lowers the implicit rewards.
    """
    return DirectRewardLoss(LogRatio(beta=beta), log_z0)
