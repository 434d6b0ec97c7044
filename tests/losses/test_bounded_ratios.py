"""BPO's divergences of bounded odds and BDPO's bounded ratio: formulas, limits, far-off pairs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from loss_cases import compute, random_batch, vector
from torch.nn.functional import logsigmoid

from fused_prefopt import LogpBatch
from fused_prefopt.losses import BasuPower, Logistic, find

BATCH = random_batch(24, seed=5)
RATIOS = (BATCH.policy - BATCH.reference).detach()


def apart(values: torch.Tensor) -> list[float]:
    chosen, rejected = values.detach().chunk(2)
    return (chosen - rejected).tolist()


def basu(r: float, power: float, scale: float = 4.0) -> float:
    """Table 2 of the paper, and its KLIEP at 0."""
    if power == 0:
        return (r + math.log(r)) / scale
    return r ** (power + 1) / (scale * (power + 1)) - r**-power / (scale * power)


def generator(u: float, power: float, scale: float) -> tuple[float, float]:
    """h(u) of SBA and h'(u)."""
    factor = scale * power * (power + 1)
    return (u ** (1 + power) - u) / factor, ((1 + power) * u**power - 1) / factor


def bpo(beta=0.1, low=0.01, high=math.inf, power=-0.5, scale=4.0) -> list[float]:
    odds = [math.exp(-beta * margin) for margin in apart(RATIOS)]
    return [basu(min(max(r, low), high), power, scale) for r in odds]


def bpo_simpo() -> list[float]:
    odds = [math.exp(1.0 - 2.5 * margin) for margin in apart(BATCH.policy / BATCH.lengths)]
    return [basu(min(max(r, 0.01), 30.0), -0.5) for r in odds]


def bdpo(beta: float, mixture: float) -> list[float]:
    chosen, rejected = RATIOS.chunk(2)
    mixed = [math.log(mixture * math.exp(x) + 1 - mixture) for x in rejected.tolist()]
    margins = [beta * (w - bound) for w, bound in zip(chosen.tolist(), mixed, strict=True)]
    return [math.log1p(math.exp(-margin)) for margin in margins]


GOLDEN = [
    ("bpo", {}, bpo()),
    ("bpo", {"beta": 0.7}, bpo(0.7)),
    ("bpo", {"beta": 0.7, "power": 1.2, "largest_ratio": 3.0}, bpo(0.7, high=3.0, power=1.2)),
    ("bpo", {"power": 0.0, "smallest_ratio": 0.0, "scale": 1.0}, bpo(low=0, power=0, scale=1)),
    ("bpo-simpo", {}, bpo_simpo()),
    ("bdpo", {}, bdpo(0.1, 0.5)),
    ("bdpo", {"beta": 0.5, "mixture": 0.9}, bdpo(0.5, 0.9)),
    ("bdpo", {"beta": 0.5, "mixture": 1.0}, bdpo(0.5, 1.0)),
]


@pytest.mark.parametrize(("name", "options", "wanted"), GOLDEN)
def test_losses_follow_the_papers_formula(name, options, wanted):
    result = compute(find(name).build(**options), BATCH)
    wanted = vector(*wanted)
    torch.testing.assert_close(result.losses.detach(), wanted, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(result.loss.detach(), wanted.mean(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("power", [-0.5, 0.5, 1.2])
def test_bpo_is_equation_10_but_for_a_constant(power):
    odds = (0.05, 0.7, 1.0, 4.0)
    link = BasuPower(power=power, scale=3.0, smallest_ratio=0.0)
    found = link(vector(*(-math.log(r) for r in odds)), vector(*[0.0] * 4)).tolist()
    for r, value in zip(odds, found, strict=True):
        (h, slope), (_, inverse) = generator(r, power, 3.0), generator(1 / r, power, 3.0)
        constant = 1 / (3.0 * power * (power + 1))
        assert value == pytest.approx(slope * r - h - inverse - constant, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("power", [-0.9, -0.5, 0.0, 0.5, 2.0])
def test_bpo_is_least_at_the_log_odds_of_the_preference_and_starts_as_dpo(power):
    # Theorem 2: whatever h, the ratio of the data is the best.
    share, link = 0.8, BasuPower(power=power, smallest_ratio=0.0)
    best, none = vector(math.log(share / (1 - share))).requires_grad_(), vector(0.0)
    (share * link(best, none) + (1 - share) * link(-best, none)).sum().backward()
    assert best.grad.item() == pytest.approx(0.0, abs=1e-15)
    start = vector(0.0).requires_grad_()
    slopes = [
        torch.autograd.grad(each(start, none).sum(), start)[0].item() for each in (link, Logistic())
    ]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-15)


def test_bpo_on_simpos_margin_starts_as_simpo_with_the_scale_that_its_page_says():
    gamma, power = 1.6, -0.3
    scale = (1 + math.exp(gamma)) * (math.exp(power * gamma) + math.exp(-(power + 1) * gamma))
    start, target = vector(0.0).requires_grad_(), vector(gamma)
    links = (BasuPower(power=power, scale=scale), Logistic())
    slopes = [torch.autograd.grad(link(start, target).sum(), start)[0].item() for link in links]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-14)


def test_bpo_stops_where_a_pair_is_won_or_lost_by_its_bounds():
    margins = vector(-9.0, -1.0, 1.0, 9.0).requires_grad_()
    link = BasuPower(smallest_ratio=0.01, largest_ratio=30.0)
    link(margins, vector(*[0.0] * 4)).sum().backward()
    assert (margins.grad != 0).tolist() == [False, True, True, False]


def test_a_lost_completion_stops_training_bdpo_and_the_chosen_one_goes_on():
    policy = vector(-5.0, -300.0).requires_grad_()
    batch = LogpBatch(policy, torch.tensor([3, 3]), reference=vector(-5.0, -10.0))
    result = find("bdpo").build(mixture=0.3)(batch)
    # The bound: r_l = β log(1 − λ), and of its margin the chosen one's gradient alone is left.
    assert result.rewards.tolist() == pytest.approx([0.0, 0.1 * math.log(0.7)], rel=1e-12)
    chosen, rejected = torch.autograd.grad(result.loss, policy)[0].tolist()
    assert chosen == pytest.approx(-0.1 / (1 + 0.7**-0.1), rel=1e-12)
    assert 0 <= rejected < 1e-100


OPTIONS = [
    *(("bpo", {"beta": 1.0, "power": power}) for power in (-0.5, 0.0, 1.2)),
    *(("bpo", {"beta": 1.0, "power": power, "smallest_ratio": 0.0}) for power in (-0.5, 1.2)),
    ("bpo-simpo", {"largest_ratio": None}),
    *(("bdpo", {"beta": 1.0, "mixture": mixture}) for mixture in (1e-6, 0.5, 1 - 1e-6)),
    ("madpo", {"beta": 1.0}),
    ("omni-dpo", {"beta": 10.0}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_pairs_a_thousand_nats_off_have_the_float64_loss_and_gradient(name, options):
    moved = torch.tensor([0.0, -1e3, 1e3, -1e3, 40.0, 0.0, 1e3, -1e3, 1e3, -40.0])
    reference = torch.full((10,), -1100.0)
    found = []
    for dtype in (torch.float32, torch.float64):
        policy = (reference + moved).to(dtype).requires_grad_()
        batch = dataclasses.replace(
            random_batch(10, dtype=dtype),
            policy=policy,
            reference=reference.to(dtype),
            lengths=torch.ones(10).long(),
            rewards=torch.arange(10).to(dtype),
        )
        result = compute(find(name).build(**options), batch)
        (gradient,) = torch.autograd.grad(result.losses.sum(), policy)
        assert result.losses.isfinite().all() and gradient.isfinite().all()
        found.append((result.losses.detach(), gradient))
    (losses, gradient), (true_losses, true_gradient) = found
    torch.testing.assert_close(losses, true_losses.float(), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(gradient, true_gradient.float(), rtol=2e-5, atol=1e-6)


def test_a_pair_far_off_still_trains_towards_its_label():
    margins = torch.tensor([-1e3, 0.0], requires_grad=True)
    BasuPower(power=1.2)(margins, torch.zeros(2)).sum().backward()
    assert margins.grad.isfinite().all() and (margins.grad < 0).all()
    slope = torch.autograd.grad(-logsigmoid(margins).sum(), margins)[0]
    assert margins.grad[1] == slope[1]
