"""Formulas that no golden row and no peer has, what the papers prove, and stopped gradients."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from loss_cases import VARIANTS, compute, random_batch, vector
from torch.nn.functional import logsigmoid

from fused_prefopt import LogpBatch
from fused_prefopt.losses import (
    ConstantMargin,
    Logistic,
    LogRatio,
    MeanLogRatio,
    PairwiseLoss,
    Robust,
    SoftMinimum,
    SumLogp,
    find,
    mirror_margins,
)

BATCH = random_batch(10, seed=7)
RATIO, MEAN = BATCH.policy - BATCH.reference, BATCH.policy / BATCH.lengths


def apart(values: torch.Tensor) -> torch.Tensor:
    """(P,) chosen less rejected."""
    chosen, rejected = values.detach().chunk(2)
    return chosen - rejected


def smoothed(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    return -(1 - epsilon) * logsigmoid(x) - epsilon * logsigmoid(-x)


def unbiased(m: torch.Tensor, epsilon: float, gamma: float) -> torch.Tensor:
    kept, flipped = logsigmoid(m - gamma), logsigmoid(-m - gamma)
    return (-(1 - epsilon) * kept + epsilon * flipped) / (1 - 2 * epsilon)


def alpha_dpo(gaps: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    return -logsigmoid(10 * apart(MEAN) - 4 - 0.5 * (gaps - mean) / std)


KL_GAPS = apart(-BATCH.sequence_kl)
MARGINS = 0.1 * apart(RATIO)
CHOSEN, REJECTED = RATIO.detach().chunk(2)
ROWS = [
    ("robust-dpo", {"gamma": 0.4, "unbiased": True}, unbiased(MARGINS, 0.1, 0.4)),
    (
        "robust-simpo",
        {"gamma": 0.4, "epsilon": 0.2, "unbiased": True},
        unbiased(2.5 * apart(MEAN), 0.2, 0.4),
    ),
    ("simper", {}, -apart(MEAN.exp())),
    ("repo", {"gamma": 0.6}, (0.6 - apart(MEAN)).relu()),
    ("simpo", {"link": "hinge", "gamma": 0.6}, (1 - (2.5 * apart(MEAN) - 0.6)).relu()),
    ("cpo", {"label_smoothing": 0.2, "nll_weight": 0.0}, smoothed(0.1 * apart(BATCH.policy), 0.2)),
    ("focal-po", {}, -(MARGINS.sigmoid() ** 0.05) * logsigmoid(MARGINS)),
    ("focal-po", {"focus": 2.0}, -(MARGINS.sigmoid() ** 2) * logsigmoid(MARGINS)),
    ("chi-po", {}, -logsigmoid(0.1 * apart(RATIO.exp() + RATIO))),
    (
        "chi-po",
        {"power": 1.25, "kl_weight": 0.1, "largest": 2.0, "smallest": -1.0, "r_max": 0.3},
        -logsigmoid(
            (0.1 * apart((1.25 * RATIO).clamp(-1, 2).exp() + 0.1 * RATIO)).clamp(-0.6, 0.6)
        ),
    ),
    (
        "alpha-dpo",
        {"implicit_reference": "sequence_kl"},
        alpha_dpo(KL_GAPS, KL_GAPS.mean(), KL_GAPS.std(correction=0)),
    ),
    (
        "alpha-dpo",
        {"statistics": "dataset", "mean": -1.0, "std": 2.0},
        alpha_dpo(apart(RATIO / BATCH.lengths), -1.0, 2.0),
    ),
    (
        "gamma-dpo",
        {"label_smoothing": 0.2},
        smoothed(MARGINS - mirror_margins(MARGINS, gamma=0.5, tau=10.0), 0.2),
    ),
    ("dpo-positive", {}, -logsigmoid(3 * MARGINS - 15 * (-CHOSEN).relu())),
    ("dpo-shift", {}, -logsigmoid(0.1 * CHOSEN - 0.095 * REJECTED)),
    ("alpha-po", {"alpha": -0.5}, -logsigmoid(5 * apart((MEAN / 2).exp()) - 1)),
    ("dr-dpo", {}, -logsigmoid(MARGINS)),
]


@pytest.mark.parametrize(
    ("name", "options", "wanted"), ROWS, ids=[f"{name}-{options}" for name, options, _ in ROWS]
)
def test_losses_of_pairs_follow_their_formula(name, options, wanted):
    result = compute(find(name).build(**options), BATCH)
    torch.testing.assert_close(result.losses.detach(), wanted, rtol=1e-9, atol=1e-12)
    odds = torch.sigmoid(MARGINS).mean().log()
    reduced = -odds if name == "dr-dpo" else wanted.mean()
    torch.testing.assert_close(result.loss.detach(), reduced, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 0.7, 3.0])
def test_dr_dpo_is_a_soft_minimum_of_its_temperature(temperature):
    result = compute(find("dr-dpo").build(temperature=temperature), BATCH)
    losses = result.losses.detach()
    torch.testing.assert_close(losses, -logsigmoid(MARGINS), rtol=1e-9, atol=1e-12)
    wanted = -temperature * (-losses / temperature).exp().mean().log()
    torch.testing.assert_close(result.loss.detach(), wanted, rtol=1e-9, atol=1e-12)


def test_a_soft_minimum_is_the_mean_of_hot_losses_and_the_least_of_cold_ones():
    losses = vector(0.5, 1.0, 4.0)
    assert SoftMinimum(temperature=1e7)(losses).item() == pytest.approx(5.5 / 3, rel=1e-6)
    assert SoftMinimum(temperature=1e-3)(losses).item() == pytest.approx(0.5, abs=2e-3)


def test_dro_counts_prompts_whatever_the_order_of_their_completions():
    groups = torch.tensor([4, -1, 4, -1, -1, 9, 4, -1, 9, 9])
    result = compute(find("dro").build(), dataclasses.replace(BATCH, groups=groups))
    means = [result.losses[groups == group].mean() for group in (4, -1, 9)]
    torch.testing.assert_close(result.loss, sum(means) / 3)
    torch.testing.assert_close(result.rewards, 0.1 * RATIO.detach(), rtol=1e-12, atol=1e-12)
    alone = compute(find("dro").build(), dataclasses.replace(BATCH, groups=None))
    torch.testing.assert_close(alone.loss, result.losses.mean())
    prompts = BATCH.prompt - BATCH.prompt_reference
    torch.testing.assert_close(result.metrics["log_z/mean"], prompts.mean() + 50)


@pytest.mark.parametrize("vocabulary", [2, 32000])
def test_dpo_with_a_uniform_reference_is_simpo(vocabulary):
    # α-DPO, Theorem 3.1, eq. 6: γ = β (log U(y_w) − log U(y_l)).
    batch = random_batch(8)
    uniform = -math.log(vocabulary) * batch.lengths.double()
    batch = dataclasses.replace(batch, reference=uniform)
    chosen, rejected = uniform.chunk(2)
    for row in range(4):
        pair = dataclasses.replace(
            batch,
            **{name: getattr(batch, name)[[row, row + 4]] for name in batch.given - {"kl"}},
        )
        gamma = 0.1 * (chosen[row] - rejected[row]).item()
        dpo = PairwiseLoss(LogRatio(beta=0.1))(pair)
        simpo = PairwiseLoss(SumLogp(beta=0.1), ConstantMargin(gamma=gamma))(pair)
        torch.testing.assert_close(dpo.losses, simpo.losses, rtol=1e-9, atol=1e-12)
    # Eq. 7: per token a uniform reference gives both completions the same, and γ vanishes.
    normalised = PairwiseLoss(MeanLogRatio(beta=2.5))(batch)
    simpo = find("simpo").build(gamma=0.0)(batch)
    torch.testing.assert_close(normalised.losses, simpo.losses, rtol=1e-9, atol=1e-12)


def test_alpha_without_normalisation_is_dpo_against_the_implicit_reference():
    # Eq. 8–10: π̂ ∝ U (π/π_ref)^α, γ from U: the margin is γ + αβ gap.
    batch = random_batch(8)
    alpha, beta, gamma = 0.3, 0.1, 0.5
    options = {"length_normalized": False, "normalize": False}
    ours = compute(
        find("alpha-dpo").build(alpha=alpha, beta=beta, gamma=gamma, **options), batch
    ).losses
    implicit = alpha * (batch.policy - batch.reference)
    against = dataclasses.replace(batch, reference=implicit)
    wanted = PairwiseLoss(LogRatio(beta=beta), ConstantMargin(gamma=gamma))(against).losses
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


def flip_rate(margin: float, gamma: float, delta: float) -> float:
    """γ-PO, eq. 14."""
    softplus = [math.log1p(math.exp(x)) for x in (margin + gamma, gamma - margin)]
    return delta / (1 + math.exp(margin - gamma)) / (softplus[0] - softplus[1])


@pytest.mark.parametrize("margin", [1.0, 2.5, 6.0])
@pytest.mark.parametrize("gamma", [0.0, 0.4, 2.0])
def test_a_moved_margin_is_a_flip_rate_to_first_order(margin, gamma):
    # Theorem 3.1: −log σ(m − γ₀ − δ) = rDPO's loss at ε(δ), up to δ².
    errors = []
    for delta in (1e-1, 1e-2, 1e-3):
        moved = Logistic()(vector(margin), vector(gamma + delta))
        link = Robust(epsilon=flip_rate(margin, gamma, delta))
        errors.append((moved - link(vector(margin), vector(gamma))).abs().item())
        # Second order: δ²/2 · σ'(x) and a little more.
        assert errors[-1] <= delta**2 / 4
    assert errors[2] < errors[1] / 50 < errors[0] / 2500


def test_a_larger_reward_margin_means_a_smaller_flip_rate():
    rates = [flip_rate(margin, 0.4, 0.05) for margin in (0.5, 1.0, 2.0, 4.0)]
    assert rates == sorted(rates, reverse=True)


def test_repo_is_simpo_as_its_beta_grows():
    # −log σ(β(x − γ))/β → max(0, γ − x).
    repo = find("repo").build(gamma=0.3)(BATCH).losses
    simpo = find("simpo").build(beta=1e4, gamma=3e3)(BATCH).losses / 1e4
    torch.testing.assert_close(simpo, repo, rtol=0, atol=1e-4)


def test_chi_po_stays_finite_beyond_its_clips_and_keeps_its_log_ratio_there():
    policy = torch.tensor([5e3, -5e3], requires_grad=True)  # exp(5000) is none in any dtype
    batch = LogpBatch(policy, torch.tensor([3, 3]), reference=torch.zeros(2))
    loss = find("chi-po").build(largest=80.0)
    rewards = loss.reward(batch)
    assert rewards[0].item() == pytest.approx(0.1 * math.exp(80.0), rel=1e-6)
    assert rewards[1].item() == pytest.approx(-500.0, rel=1e-6)
    (gradient,) = torch.autograd.grad(rewards.sum(), policy)
    assert gradient.tolist() == pytest.approx([0.1, 0.1])
    worst = dataclasses.replace(batch, policy=policy.flip(0))
    (gradient,) = torch.autograd.grad(loss(worst).loss, policy)
    assert gradient.isfinite().all() and loss(worst).loss.isfinite()


def test_chi_po_clips_margins_to_twice_its_bound():
    found = compute(find("chi-po").build(beta=1.0, r_max=0.5), BATCH)
    assert found.losses.max().item() == pytest.approx(math.log1p(math.e), rel=1e-9)
    assert found.losses.min().item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-9)


@pytest.mark.parametrize("focus", [0.05, 1.0])
def test_focal_po_gives_up_pairs_that_it_ranks_far_off(focus):
    # d/dm −p^κ log p = −p^κ (1 + κ log p) (1 − p)
    turn = -math.log(math.expm1(1 / focus))
    margins = vector(turn - 0.5, turn + 0.5, 0.0, 9.0).requires_grad_()
    find("focal-po").build(focus=focus).link(margins, vector(0, 0, 0, 0)).sum().backward()
    p = margins.detach().sigmoid()
    wanted = -(p**focus) * (1 + focus * p.log()) * (1 - p)
    torch.testing.assert_close(margins.grad, wanted, rtol=1e-9, atol=1e-15)
    assert margins.grad[0] > 0 > margins.grad[1]


# f-dpo divides the curve of the log-ratio, not the log-ratio.
PER_TOKEN = [
    (name, options)
    for name, options in VARIANTS
    if options == {"length_normalized": True} and name != "f-dpo"
]


@pytest.mark.parametrize(("name", "options"), PER_TOKEN, ids=str)
def test_length_normalized_is_the_loss_of_log_ratios_per_token(name, options):
    tokens = BATCH.lengths
    means = dataclasses.replace(
        BATCH,
        policy=(BATCH.policy / tokens).detach().requires_grad_(),
        reference=BATCH.reference / tokens,
        collision=BATCH.collision / tokens,
        lengths=torch.ones_like(tokens),
    )
    found = compute(find(name).build(**options), BATCH)
    wanted = compute(find(name).build(), means)
    for each in ("losses", "loss", "rewards", "target_margins"):
        torch.testing.assert_close(
            getattr(found, each), getattr(wanted, each), rtol=1e-10, atol=1e-12
        )
    (gradient,) = torch.autograd.grad(found.loss, BATCH.policy)
    (of_means,) = torch.autograd.grad(wanted.loss, means.policy)
    torch.testing.assert_close(gradient, of_means / tokens, rtol=1e-9, atol=1e-14)


def test_log_ratios_per_token_are_offered_where_a_margin_of_them_is_judged():
    assert {name for name, _ in PER_TOKEN} >= {
        *("dpo", "robust-dpo", "ipo", "hinge", "exo-pair", "discopop", "odpo"),
        *("beta-dpo", "gamma-dpo", "focal-po", "dpo-shift", "wpo", "dr-dpo", "bpo", "madpo"),
    }
    options = {"beta": 2.0, "label_smoothing": 0.1}
    alike = find("dpo").build(length_normalized=True, **options)
    assert find("sigmoid-norm").build(**options) == alike


def test_orpo_of_a_certain_completion_is_the_same_in_every_dtype():
    # An empty completion has no log-odds of its own: its mean token is certain.
    found = []
    for dtype in (torch.float32, torch.float64):
        policy = torch.tensor([-2.0, 0.0], dtype=dtype, requires_grad=True)
        loss = compute(find("orpo").build(), LogpBatch(policy, torch.tensor([2, 0]))).loss
        (gradient,) = torch.autograd.grad(loss, policy)
        assert gradient[1] == 0
        found.append(loss.item())
    odds = math.log(math.exp(-1.0) / (1 - math.exp(-1.0)))
    assert found == pytest.approx([1.0 + 0.1 * (30 * math.log(10) - odds)] * 2, rel=1e-6)


def test_tdpo_divergences_pass_their_gradient_where_the_method_says():
    for name, expected in (("tdpo1", True), ("tdpo2", False)):
        kl = torch.tensor([1.0, 2.0, 3.0, 4.0]).double().requires_grad_()
        batch = dataclasses.replace(random_batch(4), sequence_kl=kl)
        (gradient,) = torch.autograd.grad(compute(find(name).build(), batch).loss, kl)
        assert bool(gradient[:2].abs().sum() > 0) is expected
        assert gradient[2:].abs().sum() > 0


def test_kto_without_a_kl_takes_the_batchs_own_and_no_gradient_through_it():
    batch = dataclasses.replace(random_batch(6), kl=None)
    rewards = 0.1 * (batch.policy - batch.reference).detach()
    level = rewards.mean().clamp(min=0)
    wanted = torch.where(
        batch.desirable, 1 - torch.sigmoid(rewards - level), 1 - torch.sigmoid(level - rewards)
    )
    result = compute(find("kto").build(), batch)
    torch.testing.assert_close(result.losses, wanted, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(result.loss, batch.policy)
    sign = 1 - 2 * batch.desirable.double()
    slope = wanted * (1 - wanted) * sign * 0.1 / 6
    torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-14)


def test_dro_stops_the_gradient_of_log_z():
    batch = random_batch()
    prompt = batch.prompt.clone().requires_grad_()
    compute(find("dro").build(), dataclasses.replace(batch, prompt=prompt)).loss.backward()
    assert prompt.grad is None
