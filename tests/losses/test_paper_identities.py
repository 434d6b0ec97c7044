"""What the papers prove, as numbers: α-DPO's Theorem 3.1, γ-PO's Theorem 3.1 and eq. 25."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from loss_cases import compute, random_batch, vector

from fused_prefopt.losses import (
    ConstantMargin,
    Logistic,
    LogRatio,
    MeanLogRatio,
    PairwiseLoss,
    Robust,
    SumLogp,
    exact_margins,
    find,
    mirror_margins,
)


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


@pytest.mark.parametrize(("gamma", "tau"), [(4.0, 10.0), (0.375, 10.0), (5.0, 20.0), (3.0, 3.0)])
def test_the_margin_problem_is_convex_so_that_both_solvers_agree(gamma, tau):
    # Eq. 25: the objective's second derivative is positive everywhere on the simplex.
    margins = torch.linspace(-5, 5, 32, dtype=torch.float64)

    def objective(p: torch.Tensor) -> torch.Tensor:
        targets = gamma * 32 * p
        uncertain = -torch.nn.functional.logsigmoid(margins - targets).mean()
        return uncertain + tau * (p * (32 * p).log()).sum()

    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        p = torch.softmax(torch.randn(32, generator=generator, dtype=torch.float64), 0)
        hessian = torch.autograd.functional.hessian(objective, p)
        assert torch.linalg.eigvalsh(hessian).min() > 0
    exact = exact_margins(margins, gamma=gamma, tau=tau)
    best = objective(exact / (gamma * 32))
    for _ in range(5):
        p = torch.softmax(torch.randn(32, generator=generator, dtype=torch.float64), 0)
        assert objective(p) > best
    many = mirror_margins(margins, gamma=gamma, tau=tau, steps=400)
    torch.testing.assert_close(many, exact, rtol=2e-8, atol=0)


def test_margins_rise_like_a_sigmoid_with_the_reward_margin():
    # γ-PO, Figure 5: flat at both ends, steepest between.
    margins = torch.linspace(-30, 30, 61, dtype=torch.float64)
    slopes = exact_margins(margins, gamma=4.0, tau=10.0).diff()
    assert (slopes > 0).all()
    steepest = slopes.argmax().item()
    assert 20 < steepest < 45
    assert slopes[0] < 1e-6 * slopes[steepest] and slopes[-1] < 1e-6 * slopes[steepest]
    assert (slopes[:steepest].diff() > 0).all() and (slopes[steepest:].diff() < 0).all()
