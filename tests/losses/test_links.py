"""The links: limits and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import parts, vector

from fused_prefopt.losses import (
    Blended,
    Exact,
    Hinge,
    Indifferent,
    Logistic,
    Robust,
    UnbiasedRobust,
    Weighted,
)

LINKS = [*parts("link"), Hinge(delta=0.5), Weighted(weight=0.3, link=Robust(epsilon=0.2))]


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_robust_without_a_target_is_the_smoothed_logistic():
    margins, none = torch.linspace(-9, 9, 13, dtype=torch.float64), vector(*[0.0] * 13)
    for epsilon in (0.0, 0.1, 0.5):
        wanted = Logistic(label_smoothing=epsilon)(margins, none)
        torch.testing.assert_close(Robust(epsilon=epsilon)(margins, none), wanted)


def test_unbiased_robust_is_unbiased():
    # Labels flip with probability ε: m turns into −m. Without a target the mean is the clean loss.
    margins, none = torch.linspace(-9, 9, 13, dtype=torch.float64), vector(*[0.0] * 13)
    link = UnbiasedRobust(epsilon=0.3)
    mean = 0.7 * link(margins, none) + 0.3 * link(-margins, none)
    torch.testing.assert_close(mean, Logistic()(margins, none))


@pytest.mark.parametrize("link", LINKS, ids=repr)
def test_gradients_towards_both_margins(link):
    margins = vector(-6.0, -0.3, 0.2, 4.0).requires_grad_()
    targets = vector(0.5, 1.5, -0.25, 2.0).requires_grad_()
    assert torch.autograd.gradcheck(link, (margins, targets))


def test_exact_is_least_where_the_policy_says_what_the_label_says():
    link, at = Exact(label_smoothing=0.2), math.log(0.8 / 0.2)
    margins = vector(at - 0.1, at, at + 0.1).requires_grad_()
    losses = link(margins, torch.zeros_like(margins))
    losses.sum().backward()
    assert losses[1].item() == pytest.approx(0.0, abs=1e-15)
    assert losses[0] > 0 < losses[2]
    assert margins.grad[0] < 0 < margins.grad[2]
    assert margins.grad[1].item() == pytest.approx(0.0, abs=1e-15)


def test_blended_is_logistic_for_pairs_far_off_and_exponential_for_right_ones():
    margins, none = vector(-9.0, 9.0), vector(0.0, 0.0)
    found = Blended()(margins, none).tolist()
    assert found == pytest.approx([softplus(9.0), math.exp(-9.0)], rel=1e-12)


def test_indifferent_is_nothing():
    margins = vector(-1e4, 0.0, 3.0).requires_grad_()
    losses = Indifferent()(margins, vector(1.0, 1.0, 1.0))
    losses.sum().backward()
    assert losses.tolist() == margins.grad.tolist() == [0.0] * 3
    assert Indifferent()(vector(math.nan), vector(0.0)).isnan().all()


@pytest.mark.parametrize("link", LINKS, ids=repr)
def test_large_margins_stay_finite(link):
    margins = vector(-1e4, 1e4).requires_grad_()
    losses = link(margins, vector(1.0, 1.0))
    losses.sum().backward()
    assert losses.isfinite().all() and margins.grad.isfinite().all()


def test_a_hinge_is_flat_from_its_delta_on():
    margins, targets = vector(2.0, 0.5, 1.25, -3.0), vector(0.25, 0.25, 0.25, 0.0)
    assert Hinge(delta=2.0)(margins, targets).tolist() == [0.25, 1.75, 1.0, 5.0]
    assert Hinge()(margins, targets).tolist() == [0.0, 0.75, 0.0, 4.0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Robust(epsilon=0.6), "epsilon: got 0.6, wanted a finite number >= 0 and <= 0.5"),
        (lambda: UnbiasedRobust(epsilon=0.5), "epsilon: got 0.5, .* and < 0.5"),
        (lambda: Hinge(delta=math.inf), "delta: got inf"),
        (lambda: Exact(label_smoothing=0.0), "label_smoothing: got 0.0, .* > 0"),
        (lambda: Blended(temperature=0.0), "temperature: got 0.0"),
        (lambda: Weighted(weight=-1.0), "weight: got -1.0"),
    ],
)
def test_hyperparameters_are_checked(build, message):
    with pytest.raises(ValueError, match=message):
        build()
