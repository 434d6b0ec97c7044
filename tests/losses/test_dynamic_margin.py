"""γ-PO's margin solvers: optimality, budget, order and edges."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import vector

from fused_prefopt.losses import exact_margins, mirror_margins

SETTINGS = [(4.0, 10.0), (0.375, 10.0), (5.0, 20.0), (3.0, 3.0), (0.5, 0.1)]


def test_twenty_mirror_steps_by_hand():
    # As printed, in floats; the 1e-10 shows where some margins are far below the others.
    margins, gamma, tau = [-30.0, -2.0, 0.5, 300.0], 4.0, 0.2
    n, rate, p = 4, min(0.5 / 0.2, 1.0), [0.25] * 4
    for _ in range(20):
        grads = [
            tau * (1 + math.log(n * (q + 1e-10))) + gamma / (1 + math.exp(m - gamma * n * q))
            for q, m in zip(p, margins, strict=True)
        ]
        p = [q * math.exp(-rate * grad) for q, grad in zip(p, grads, strict=True)]
        p = [q / sum(p) for q in p]
    assert min(p) < 1e-6
    found = mirror_margins(vector(*margins), gamma=gamma, tau=tau, steps=20)
    assert found.tolist() == pytest.approx([gamma * n * q for q in p], rel=1e-11)


@pytest.mark.parametrize(("gamma", "tau"), SETTINGS)
@pytest.mark.parametrize("size", [1, 2, 37, 256])
def test_exact_solver_is_optimal(gamma, tau, size):
    margins = torch.linspace(-20, 20, size, dtype=torch.float64)
    found = exact_margins(margins, gamma=gamma, tau=tau)
    gradient = tau * (1 + torch.log(found / gamma)) + gamma * torch.sigmoid(found - margins)
    assert (gradient.max() - gradient.min()).item() < 1e-12 * (tau + gamma)
    assert found.mean().item() == pytest.approx(gamma, rel=1e-12)


@pytest.mark.parametrize(("gamma", "tau"), SETTINGS)
def test_mirror_descends_to_the_exact_solution(gamma, tau):
    margins = torch.linspace(-10, 10, 16, dtype=torch.float64)
    exact = exact_margins(margins, gamma=gamma, tau=tau)
    errors = [
        (mirror_margins(margins, gamma=gamma, tau=tau, steps=steps) - exact).abs().max().item()
        for steps in (1, 5, 300)
    ]
    assert errors[0] > errors[1] > errors[2]
    # The update's log(n(p + 1e-10)) moves its fixed point by a relative n · 1e-10.
    assert errors[2] < 16e-10 * gamma * 2


@pytest.mark.parametrize("solve", [mirror_margins, exact_margins])
@pytest.mark.parametrize(("gamma", "tau"), SETTINGS)
def test_budget_and_order(solve, gamma, tau):
    margins = torch.linspace(-10, 10, 101, dtype=torch.float64)
    found = solve(margins, gamma=gamma, tau=tau)
    assert found.sum().item() == pytest.approx(101 * gamma, rel=1e-12)
    assert (found.diff() > 0).all()
    shuffled = torch.randperm(101, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        solve(margins[shuffled], gamma=gamma, tau=tau), found[shuffled], rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("solve", [mirror_margins, exact_margins])
def test_solver_skips_nonfinite_margins(solve):
    clean = vector(-1.0, 0.5, 3.0)
    dirty = vector(math.nan, -1.0, math.inf, 0.5, 3.0, -math.inf)
    found = solve(dirty, gamma=2.0, tau=1.0)
    wanted = solve(clean, gamma=2.0, tau=1.0)
    torch.testing.assert_close(found[[1, 3, 4]], wanted, rtol=1e-14, atol=0)
    assert found[[0, 2, 5]].tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("solve", [mirror_margins, exact_margins])
def test_solver_edges(solve):
    assert solve(vector(), gamma=2.0, tau=1.0).shape == (0,)
    assert solve(vector(5.0), gamma=2.0, tau=1.0).tolist() == pytest.approx([2.0], rel=1e-14)
    assert solve(vector(1.0, 2.0), gamma=0.0, tau=1.0).tolist() == [0.0, 0.0]
    assert solve(vector(math.nan), gamma=2.0, tau=1.0).tolist() == [2.0]
    huge = solve(vector(-1e300, 1e300), gamma=2.0, tau=1.0)
    assert huge.sum().item() == pytest.approx(4.0)
    many = mirror_margins(torch.zeros(8), gamma=1e4, tau=1.0)
    assert many.tolist() == pytest.approx([1e4] * 8)


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
