"""Losses of whole lists of rated completions, as pairs of them; on pairs each is a list of two."""

from __future__ import annotations

from fused_prefopt.losses import lists, rewards
from fused_prefopt.losses.pairwise import PairwiseLoss
from fused_prefopt.losses.registry import register


@register(
    "plackett-luce-dpo",
    aliases=("pl-dpo", "dpo-pl", "s-dpo"),
    paper="Rafailov et al. 2023 (arXiv:2305.18290), appendix A.3, eq. 20",
)
def plackett_luce_dpo(*, beta: float = 0.1) -> PairwiseLoss:
    """``−Σ_k log [e^(βΔ_k) / Σ_(j ≥ k) e^(βΔ_j)]``, a list's completions from the best on.

    Completions of equal score are not compared: each is chosen from itself and those below it. Of
    a pair, and of a list of two, it is dpo; of a best one among others of one score it is S-DPO
    (Chen et al. 2024, arXiv:2406.09215).

    Args:
        beta: β > 0, reward per nat.
    """
    return PairwiseLoss(rewards.LogRatio(beta=beta), ranking=lists.PlackettLuce())


@register(
    "lipo-lambda",
    aliases=("lipo",),
    paper="Liu et al. 2024, LiPO (arXiv:2402.01878), the λ loss with the λ weight of DCG",
)
def lipo_lambda(*, beta: float = 0.05) -> PairwiseLoss:
    """``−Σ_ij λ_ij log σ(r_i − r_j)``, ``λ_ij = |2^s_i − 2^s_j| |1/D_i − 1/D_j|``, ``r = βΔ``.

    Over the pairs of a list with ``s_i > s_j``, s the `rewards`, which the paper has in [0, 1];
    ``D = log(1 + τ)``, τ the rank by r, from 1, not differentiated; equal ones stand in the order
    of the batch.

    Args:
        beta: β > 0, reward per nat.
    """
    return PairwiseLoss(rewards.LogRatio(beta=beta), ranking=lists.DiscountedGain())


@register(
    "listnet-dpo",
    aliases=("listwise-softmax",),
    paper="Cao et al. 2007, ListNet (ICML), top-one cross-entropy, on log-ratios",
)
def listnet_dpo(*, beta: float = 0.1, temperature: float = 1.0) -> PairwiseLoss:
    """``−Σ_i p_i log softmax(βΔ)_i``, ``p = softmax(s/T)`` over a list, s the `rewards`.

    λ-DPO (Sun et al. 2025, arXiv:2506.19780) has this loss for every objective, with p given. A
    list of which all completions have one score counts 0, as in every other loss.

    Args:
        beta: β > 0, reward per nat.
        temperature: T > 0, in units of score; as T → 0 the best one alone is to be chosen.
    """
    ranking = lists.TopOne(temperature=temperature)
    return PairwiseLoss(rewards.LogRatio(beta=beta), ranking=ranking)
