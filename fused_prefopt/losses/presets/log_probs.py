"""Losses of pairs on log-probs: r = β L/|y|, r = β L, or a curve of them."""

from __future__ import annotations

from fused_prefopt.checks import require_choice, require_number
from fused_prefopt.losses import links, margins, rewards, terms
from fused_prefopt.losses.adaptive_margin import adaptive_margin
from fused_prefopt.losses.dynamic_margin import DynamicMargin
from fused_prefopt.losses.pairwise import (
    PairwiseLoss,
)
from fused_prefopt.losses.registry import register

# Mean log-probs, r = β L/|y|, or a curve of them


@register("simpo", paper="Meng et al. 2024 (arXiv:2405.14734), eq. 6")
def simpo(
    *,
    beta: float = 2.5,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
    link: str = "logistic",
) -> PairwiseLoss:
    """``−(1−ε) log σ(m − γ) − ε log σ(γ − m)``, or a hinge, ``m = β(L̄_w − L̄_l)``.

    Args:
        beta: β > 0, reward per nat per token.
        gamma: γ, target margin in units of reward.
        label_smoothing: 0 <= ε <= 0.5, probability that a label is flipped, of "logistic".
        link: "logistic", or "hinge", ``max(0, 1 − (m − γ))``, the authors' `loss_type`.
    """
    require_choice("link", link, ("logistic", "hinge"))
    if label_smoothing and link == "hinge":
        raise ValueError(f"label_smoothing: got {label_smoothing} with 'hinge', wanted 0")
    return PairwiseLoss(
        rewards.MeanLogp(beta=beta),
        margins.ConstantMargin(gamma=gamma),
        links.Hinge() if link == "hinge" else links.Logistic(label_smoothing=label_smoothing),
    )


@register("simper", paper="Xiao et al. 2025 (arXiv:2502.00883)")
def simper() -> PairwiseLoss:
    """``e^L̄_l − e^L̄_w``, the inverse perplexities: no hyperparameters."""
    return PairwiseLoss(rewards.MeanProbability(), link=links.Linear())


@register("repo", paper="Wu et al. 2025, RePO (arXiv:2503.07426)")
def repo(*, gamma: float = 0.4) -> PairwiseLoss:
    """``max(0, γ − (L̄_w − L̄_l))``: SimPO's, as its β grows.

    Args:
        gamma: γ, target margin in nats per token, SimPO's γ/β.
    """
    margin = margins.ConstantMargin(gamma=gamma)
    return PairwiseLoss(rewards.MeanLogp(beta=1.0), margin, links.Hinge(delta=0.0))


@register(
    "tpo-l", paper="Saeidi et al. 2024 (arXiv:2405.16681), TPO-L, as TRL and the authors compute it"
)
def tpo_l(
    *,
    beta: float = 0.01,
    gamma: float = 0.5,
    nll_weight: float = 1.0,
    nll: str = "token_mean",
    label_smoothing: float = 0.0,
) -> PairwiseLoss:
    """``−(1−ε) log σ(m − γ) − ε log σ(γ − m) + α·NLL(y_g)``, ``m = β(L̄_w − L̄_l)``, y_g as in tpo.

    TRL's defaults. The authors' instruction-tuned models have α = 0.05 with β = 10, γ = 3 (Llama 3
    8B) or β = 2.5, γ = 0.3 (Mistral 7B).

    Args:
        beta: β > 0, reward per nat per token.
        gamma: γ, target margin in units of reward, TRL's `tpo_l_gamma`.
        nll_weight: α >= 0, TRL's `tpo_alpha`; 0 needs no gold completion.
        nll: NLL is "token_mean", "sequence_mean" or "sum", as in tpo.
        label_smoothing: 0 <= ε <= 0.5, probability that a label is flipped.
    """
    return PairwiseLoss(
        rewards.MeanLogp(beta=beta),
        margins.ConstantMargin(gamma=gamma),
        links.Logistic(label_smoothing=label_smoothing),
        _gold(nll_weight, nll),
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
    link = links.robust(epsilon=epsilon, unbiased=unbiased)
    return PairwiseLoss(rewards.MeanLogp(beta=beta), margins.ConstantMargin(gamma=gamma), link)


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


@register("bpo-simpo", paper="Kim et al. 2025 (arXiv:2505.19601), eq. 10, Table 2, B.3")
def bpo_simpo(
    *,
    beta: float = 2.5,
    gamma: float = 1.0,
    power: float = -0.5,
    scale: float = 4.0,
    smallest_ratio: float = 0.01,
    largest_ratio: float | None = 30.0,
) -> PairwiseLoss:
    """``[e^((λ+1)(γ − m)) / (λ+1) − e^(λ(m − γ)) / λ] / s``, ``m = β(L̄_w − L̄_l)``.

    `bpo` on SimPO's margins, ``R = e^(γ − m)``. The paper's results are of sums with SimPO,
    ``"0.3 bpo-simpo + 0.7 simpo"`` for Mistral-7B-Base, 0.5 + 0.5 for Llama-3-8B-Base, and for
    Llama-3-8B-Instruct 0.05 + 0.95 with R <= 100.

    Args:
        beta: β > 0, reward per nat per token.
        gamma: γ, target margin in units of reward.
        power: λ > −1; larger ones train on pairs far from m = γ.
        scale: s > 0. The paper adjusts it to γ, without a number:
            ``(1 + e^γ)(e^(λγ) + e^(−(λ+1)γ))`` gives SimPO's gradient at m = 0.
        smallest_ratio: R >= this number, which is >= 0: pairs won by more do not train.
        largest_ratio: R <= this number, or None: pairs lost by more do not train.
    """
    link = links.BasuPower(
        power=power, scale=scale, smallest_ratio=smallest_ratio, largest_ratio=largest_ratio
    )
    return PairwiseLoss(rewards.MeanLogp(beta=beta), margins.ConstantMargin(gamma=gamma), link)


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
    scale = terms.dynamic_scale(
        beta=beta, alpha=alpha, momentum=momentum, level=level, statistics=statistics
    )
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
    reward = rewards.MeanLogp(beta=beta) if length_normalized else rewards.SumLogp(beta=beta)
    margin = adaptive_margin(
        reward,
        gamma=gamma,
        alpha=alpha,
        implicit_reference=implicit_reference,
        margin_scale=margin_scale,
        normalize=normalize,
        stop_gradient=stop_gradient,
        statistics=statistics,
        momentum=momentum,
        mean=mean,
        std=std,
    )
    return PairwiseLoss(reward, margin)


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
def cpo(
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
    nll: str = "token_mean",
) -> PairwiseLoss:
    """``−(1−ε) log σ(m) − ε log σ(−m) + λ·NLL``, ``m = β(L_w − L_l)``.

    Args:
        beta: β > 0, reward per nat.
        label_smoothing: 0 <= ε <= 0.5, probability that a label is flipped, as in TRL.
        nll_weight: λ >= 0.
        nll: NLL is "sum" −L_w, "sequence_mean" −L̄_w, or "token_mean" (TRL's), the mean of
            −log π over all chosen tokens of the batch, of all ranks.
    """
    require_number("nll_weight", nll_weight, low=0)
    term = terms.ChosenNll(weight=nll_weight, nll=nll)
    link = links.Logistic(label_smoothing=label_smoothing)
    return PairwiseLoss(rewards.SumLogp(beta=beta), link=link, regularisers=(term,))


@register("tpo", paper="Saeidi et al. 2024 (arXiv:2405.16681), as TRL and the authors compute it")
def tpo(
    *,
    beta: float = 0.01,
    nll_weight: float = 1.0,
    nll: str = "token_mean",
    link: str = "logistic",
    label_smoothing: float = 0.0,
) -> PairwiseLoss:
    """``−(1−ε) log σ(m) − ε log σ(−m) + α·NLL(y_g)``, ``m = β(L_w − L_l)``, g for gold.

    y_g is a third completion of each prompt, the best one. `PreferenceTrainer` and `attach` take it
    of rows with `gold_ids`, which `tokenise_pairs` makes of a column `gold` (TRL's `reference`). In
    a loop of one's own it comes as `gold` and `gold_lengths`: the sums and lengths of
    ``sequence_logps(hidden, head, labels)`` on these completions, each ``.repeat(2)`` for both
    halves. Where y_g is y_w this is CPO.

    Args:
        beta: β > 0, reward per nat; of "squared" the paper's τ.
        nll_weight: α >= 0, TRL's `tpo_alpha`; 0 needs no gold completion.
        nll: NLL is "token_mean" (the authors' and TRL's), the mean of −log π over all gold tokens
            of the batch, of all ranks, "sequence_mean" −L̄_g, or "sum" −L_g.
        link: "logistic", "hinge" ``max(0, 1 − m)``, or "squared" (TRL's "ipo")
            ``(L̄_w − L̄_l − 1/(2β))²``.
        label_smoothing: 0 <= ε <= 0.5 of "logistic", probability that a label is flipped.
    """
    require_choice("link", link, ("logistic", "hinge", "squared"))
    if link != "logistic" and label_smoothing:
        raise ValueError(
            f"label_smoothing: got {label_smoothing} with link {link!r}, needs 'logistic'"
        )
    regularisers = _gold(nll_weight, nll)
    if link == "squared":
        require_number("beta", beta, low=0, above=True)
        margin = margins.ConstantMargin(gamma=1 / (2 * beta))
        return PairwiseLoss(rewards.MeanLogp(beta=1.0), margin, links.Squared(), regularisers)
    smoothed = links.Logistic(label_smoothing=label_smoothing)
    judge = links.Hinge() if link == "hinge" else smoothed
    return PairwiseLoss(rewards.SumLogp(beta=beta), link=judge, regularisers=regularisers)


def _gold(weight: float, nll: str) -> tuple[terms.GoldNll, ...]:
    """The term of the gold completions; none of weight 0, which needs no such completion."""
    require_number("nll_weight", weight, low=0)
    term = terms.GoldNll(weight=weight or 1.0, nll=nll)
    return (term,) if weight else ()


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
