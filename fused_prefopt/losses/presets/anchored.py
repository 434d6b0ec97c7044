"""Losses of log-ratios, each completion or quantile against a level: of pairs, then of points."""

from __future__ import annotations

from fused_prefopt.losses import links, rewards, terms
from fused_prefopt.losses.pairwise import (
    AnchoredLoss,
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
    ClassifierFeedbackLoss,
    DirectRewardLoss,
)
from fused_prefopt.losses.registry import register


@register("nca-pair", paper="Chen et al. 2024 (arXiv:2402.05369), for two responses")
def nca_pair(*, beta: float = 0.1) -> AnchoredLoss:
    """``−log σ(βΔ_w) − ½ log σ(−βΔ_w) − ½ log σ(−βΔ_l)``.

    Args:
        beta: β > 0, reward per nat.
    """
    return AnchoredLoss(rewards.LogRatio(beta=beta), noise_contrastive)


@register("bco-pair", paper="Jung et al. 2024 (arXiv:2404.04656), eq. 5–7 and Theorem 3")
def bco_pair(
    *,
    beta: float = 0.1,
    reward_shift: str = "none",
    momentum: float = 0.9,
    length_normalized: bool = False,
) -> AnchoredLoss:
    """``−log σ(βΔ_w − δ) − log σ(δ − βΔ_l)``, ``δ = sg`` of a running level of all βΔ.

    TRL's "bco_pair" has no δ today, so it is 0 by default here too; the paper's is
    ``reward_shift="ema"``. Every level has the current batch in it, of all ranks, and in
    evaluation it stands still.

    Args:
        beta: β > 0, reward per nat.
        reward_shift: δ is "none" (0), "ema", half the sum of the exponential averages of the
            chosen and of the rejected ones' βΔ (the paper), "mean", the mean of all so far, or
            "batch_mean", the mean of the batches' means so far (TRL 0.24, LLaMA-Factory
            and ms-swift, whose δ moves in evaluation, too).
        momentum: of "ema", weight of the past; the paper has none.
        length_normalized: Δ/|y| in place of Δ; β is then per nat per token.
    """
    reward = rewards.log_ratio(beta=beta, length_normalized=length_normalized)
    return AnchoredLoss(reward, binary, shift=terms.reward_shift(reward_shift, momentum))


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


@register("bco", paper="Jung et al. 2024 (arXiv:2404.04656), eq. 7–8")
def bco(
    *,
    beta: float = 0.1,
    reward_shift: str = "ema",
    momentum: float = 0.9,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> ClassifierFeedbackLoss:
    """``−λ_D log σ(βΔ − δ)`` or ``−λ_U log σ(δ − βΔ)``, ``δ = sg`` of a running βΔ, point-wise.

    TRL's `BCOTrainer` is ``reward_shift="mean"``. Its underlying distribution matching (UDM)
    weighs each undesirable completion by a density ratio of its prompt: give those numbers as
    `weights` (the data's column `weight`), 1 for the desirable ones. Eq. 8 has the sum of the two
    classes' means, which is λ = N/N₊ and N/N₋; TRL and the defaults take the mean of all.

    Args:
        beta: β > 0, reward per nat.
        reward_shift: δ is "ema", half the sum of the exponential averages of the desirable and of
            the other completions' βΔ (the paper), "mean", the mean of all so far (TRL's),
            "batch_mean", the mean of the batches' means so far, or "none" (0, the paper's BCE).
            Each has the current batch in it, of all ranks; in evaluation it stands still.
        momentum: of "ema", weight of the past; the paper has none.
        desirable_weight: λ_D >= 0.
        undesirable_weight: λ_U >= 0.
    """
    return ClassifierFeedbackLoss(
        rewards.LogRatio(beta=beta),
        desirable_weight,
        undesirable_weight,
        terms.reward_shift(reward_shift, momentum),
    )


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
