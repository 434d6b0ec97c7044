"""The remaining losses that TRL offers, under its names, as compositions."""

from __future__ import annotations

from fused_prefopt.checks import require_choice
from fused_prefopt.losses.anchored import (
    AnchoredLoss,
    binary,
    lower_both,
    noise_contrastive,
    raise_chosen,
    self_play,
)
from fused_prefopt.losses.curved_rewards import AlphaRatio, ForwardKlRatio, JensenShannonRatio
from fused_prefopt.losses.feedback import AnchoredFeedbackLoss
from fused_prefopt.losses.further_links import Blended, Exact, Indifferent
from fused_prefopt.losses.links import Hinge, Logistic
from fused_prefopt.losses.pairwise import PairwiseLoss
from fused_prefopt.losses.protocol import Reward
from fused_prefopt.losses.registry import register
from fused_prefopt.losses.regularisers import ChosenNll
from fused_prefopt.losses.rewards import LogRatio, MeanLogRatio, SumLogp
from fused_prefopt.losses.transport import TransportLoss, paired_quantiles, unpaired_quantiles


@register("hinge", paper="Liu et al. 2024, RSO (arXiv:2309.06657), the SLiC loss on log-ratios")
def hinge(*, beta: float = 0.1) -> PairwiseLoss:
    """``max(0, 1 − m)``, ``m = β(Δ_w − Δ_l)``.

    Args:
        beta: β > 0, reward per nat.
    """
    return PairwiseLoss(LogRatio(beta=beta), link=Hinge())


@register("exo-pair", paper="Ji et al. 2024 (arXiv:2402.00856), eq. 16")
def exo_pair(*, beta: float = 0.1, label_smoothing: float = 1e-3) -> PairwiseLoss:
    """``σ(m) (log σ(m) − log(1−ε)) + σ(−m) (log σ(−m) − log ε)``, ``m = β(Δ_w − Δ_l)``.

    Args:
        beta: β > 0, reward per nat.
        label_smoothing: 0 < ε <= 0.5, probability that a label is flipped.
    """
    return PairwiseLoss(LogRatio(beta=beta), link=Exact(label_smoothing=label_smoothing))


@register("nca-pair", paper="Chen et al. 2024 (arXiv:2402.05369), for two responses")
def nca_pair(*, beta: float = 0.1) -> AnchoredLoss:
    """``−log σ(βΔ_w) − ½ log σ(−βΔ_w) − ½ log σ(−βΔ_l)``.

    Args:
        beta: β > 0, reward per nat.
    """
    return AnchoredLoss(LogRatio(beta=beta), noise_contrastive)


@register("bco-pair", paper="Jung et al. 2024 (arXiv:2404.04656), without the reward shift")
def bco_pair(*, beta: float = 0.1) -> AnchoredLoss:
    """``−log σ(βΔ_w) − log σ(−βΔ_l)``.

    Args:
        beta: β > 0, reward per nat.
    """
    return AnchoredLoss(LogRatio(beta=beta), binary)


@register("sppo-hard", paper="Wu et al. 2024 (arXiv:2405.00675), eq. 4.7 with certain preferences")
def sppo_hard(*, beta: float = 0.1) -> AnchoredLoss:
    """``(Δ_w − 1/(2β))² + (Δ_l + 1/(2β))²``.

    Args:
        beta: β > 0; the log-ratios are drawn to ±1/(2β).
    """
    return AnchoredLoss(LogRatio(beta=beta), self_play, weight=1 / beta**2)


@register("aot", paper="Melnyk et al. 2024 (arXiv:2406.05882), paired")
def aot(*, beta: float = 0.1, label_smoothing: float = 0.0) -> TransportLoss:
    """``−(1−ε) log σ(βd₍ᵢ₎) − ε log σ(−βd₍ᵢ₎)``, ``d₍ᵢ₎ = a₍ᵢ₎ − b₍ᵢ₎``, paired.

    ``a = L_w − L_l`` of the policy, b the same of the reference; ₍ᵢ₎ is the i-th smallest of the
    batch, of all ranks: the two are compared as distributions.

    Args:
        beta: β > 0, reward per nat.
        label_smoothing: 0 <= ε <= 0.5, probability that a label is flipped.
    """
    link = Logistic(label_smoothing=label_smoothing)
    return TransportLoss(LogRatio(beta=beta), paired_quantiles, link)


@register("aot-unpaired", paper="Melnyk et al. 2024 (arXiv:2406.05882), unpaired")
def aot_unpaired(*, beta: float = 0.1, label_smoothing: float = 0.0) -> TransportLoss:
    """``−(1−ε) log σ(βd₍ᵢ₎) − ε log σ(−βd₍ᵢ₎)``, ``d₍ᵢ₎ = a₍ᵢ₎ − b₍ᵢ₎``, unpaired.

    a is Δ_w, b is Δ_l; ₍ᵢ₎ is the i-th smallest of the batch, of all ranks: who is paired with
    whom does not matter.

    Args:
        beta: β > 0, reward per nat.
        label_smoothing: 0 <= ε <= 0.5, probability that a label is flipped.
    """
    link = Logistic(label_smoothing=label_smoothing)
    return TransportLoss(LogRatio(beta=beta), unpaired_quantiles, link)


@register("apo-zero", paper="D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7")
def apo_zero(*, beta: float = 0.1) -> AnchoredLoss:
    """``1 − σ(βΔ_w) + σ(βΔ_l)``.

    Args:
        beta: β > 0, reward per nat.
    """
    return AnchoredLoss(LogRatio(beta=beta), raise_chosen)


@register("apo-down", paper="D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 8")
def apo_down(*, beta: float = 0.1) -> AnchoredLoss:
    """``σ(βΔ_w) + 1 − σ(β(Δ_w − Δ_l))``.

    Args:
        beta: β > 0, reward per nat.
    """
    return AnchoredLoss(LogRatio(beta=beta), lower_both)


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
    return AnchoredFeedbackLoss(LogRatio(beta=beta), desirable_weight, undesirable_weight)


@register("discopop", paper="Lu et al. 2024 (arXiv:2406.08414), eq. 5")
def discopop(*, beta: float = 0.1, temperature: float = 0.05) -> PairwiseLoss:
    """``−(1−s) log σ(m) + s e^−m``, ``s = σ(m/T)``, ``m = β(Δ_w − Δ_l)``.

    Args:
        beta: β > 0, reward per nat.
        temperature: 0 < T <= 1, TRL's `discopop_tau`.
    """
    return PairwiseLoss(LogRatio(beta=beta), link=Blended(temperature=temperature))


@register("sft", paper="maximum likelihood of the chosen completions")
def sft(*, nll: str = "token_mean") -> PairwiseLoss:
    """``NLL`` of the chosen completions, ``−Σ L_w / Σ |y_w|`` over the batch by default.

    Args:
        nll: NLL is "token_mean" (TRL's), the mean of −log π over all chosen tokens of the batch,
            of all ranks, "sequence_mean" −L̄_w, or "sum" −L_w.
    """
    term = ChosenNll(nll=nll)
    return PairwiseLoss(SumLogp(beta=1.0), link=Indifferent(), regularisers=(term,))


@register("sigmoid-norm", paper="Rafailov et al. 2023 (arXiv:2305.18290) on mean log-ratios, TRL")
def sigmoid_norm(*, beta: float = 0.1, label_smoothing: float = 0.0) -> PairwiseLoss:
    """``−(1−ε) log σ(m) − ε log σ(−m)``, ``m = β(Δ_w/|y_w| − Δ_l/|y_l|)``.

    Args:
        beta: β > 0, reward per nat per token.
        label_smoothing: 0 <= ε <= 0.5, probability that a label is flipped.
    """
    return PairwiseLoss(MeanLogRatio(beta=beta), link=Logistic(label_smoothing=label_smoothing))


@register("f-dpo", paper="Wang et al. 2023 (arXiv:2309.16240), Table 1")
def f_dpo(
    *, beta: float = 0.1, divergence: str = "js_divergence", alpha: float = 0.5
) -> PairwiseLoss:
    """``−log σ(β f'(e^Δ_w) − β f'(e^Δ_l))``, f the generator of a divergence.

    Args:
        beta: β > 0, reward per nat where the policy is the reference.
        divergence: "reverse_kl" (f'(e^Δ) = Δ, DPO), "forward_kl" (1 − e^−Δ), "js_divergence"
            (log 2 + log σ(Δ)) or "alpha_divergence" ((e^((α−1)Δ) − 1)/(α−1)).
        alpha: α of the last, TRL's `f_alpha_divergence_coef`; 1 is DPO.
    """
    rewards: dict[str, Reward] = {
        "reverse_kl": LogRatio(beta=beta),
        "forward_kl": ForwardKlRatio(beta=beta),
        "js_divergence": JensenShannonRatio(beta=beta),
        "alpha_divergence": AlphaRatio(beta=beta, alpha=alpha),
    }
    require_choice("divergence", divergence, rewards)
    return PairwiseLoss(rewards[divergence])
