"""Losses of pairs: every registered reward with every margin, scale, link, weight and reduction."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest
import torch
from loss_cases import GivenMargin, compute, held, label, parts, random_batch, vector

from fused_prefopt.losses import (
    AdaptiveMargin,
    ConstantMargin,
    DynamicMargin,
    DynamicScale,
    LengthMargin,
    LogRatio,
    PairwiseLoss,
    PerturbedScale,
    Robust,
    SumLogp,
    SumMargin,
    UnbiasedRobust,
    Weighted,
    bradley_terry_loss,
    find,
    gap_of,
)
from fused_prefopt.losses.metrics import mean
from fused_prefopt.types import LogpBatch

REWARDS, SCALES = parts("reward"), parts("scale")
ADDED = SumMargin(own=LengthMargin(alpha=0.1), added=DynamicMargin(gamma=0.5))
MARGINS = [*parts("margin"), ADDED]
LINKS, WEIGHTINGS = parts("link"), parts("weighting")
REDUCTIONS, TERMS = parts("reduction"), tuple(parts("regularisers"))
SMALL = random_batch(8, seed=3)
DIRECTION = torch.linspace(-1, 2, 8, dtype=torch.float64).sin()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of tiny operations: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def summary_of(loss: PairwiseLoss, batch: LogpBatch = SMALL):
    statistics = loss.statistics()
    return None if statistics is None else statistics(loss.observe(batch))


def slopes(loss: PairwiseLoss, gradient: torch.Tensor, summary) -> list[float]:
    """Slope of the loss along `DIRECTION`: by its gradient, and by differences of `held`."""
    constant, step = held(loss, SMALL, summary), 1e-5
    ends = [
        constant(dataclasses.replace(SMALL, policy=SMALL.policy.detach() + shift), summary).loss
        for shift in (step * DIRECTION, -step * DIRECTION)
    ]
    return [(gradient * DIRECTION).sum().item(), ((ends[0] - ends[1]) / (2 * step)).item()]


@pytest.mark.parametrize("reward", REWARDS, ids=label)
def test_the_whole_space_is_finite_and_follows_its_formula(reward):
    # Every reward with every margin; scales, links, weights and terms take turns.
    further = list(itertools.product(SCALES, LINKS, WEIGHTINGS, ((), TERMS)))
    random.Random(0).shuffle(further)
    turns = itertools.cycle(further)
    for margin in MARGINS:
        summaries = {
            scale: summary_of(PairwiseLoss(reward, margin, scale=scale)) for scale in SCALES
        }
        for scale, link, weighting, terms in itertools.islice(turns, 12):
            loss = PairwiseLoss(reward, margin, link, terms, scale, weighting)
            summary = summaries[scale]
            result = loss(SMALL, summary)
            (gradient,) = torch.autograd.grad(result.loss, SMALL.policy)
            assert result.losses.isfinite().all() and gradient.isfinite().all(), loss
            chosen, rejected = reward(SMALL).chunk(2)
            margins, factor = chosen - rejected, torch.ones(())
            if isinstance(scale, PerturbedScale):
                weaker, own, stronger = (
                    values[:4] - values[4:]
                    for values in (SMALL.extrapolated, SMALL.policy.detach(), SMALL.interpolated)
                )
                steps = ((weaker - own).sign() + (own - stronger).sign()).div(2).trunc()
                factor = summary[1].factor / (1 + scale.epsilon * steps)
            elif scale is not None:
                means = summary[1]
                observed = margins if scale.level == "pair" else means.batch
                factor = (1 + scale.alpha * (observed - means.average)).clamp(min=scale.smallest)
            wanted = link(factor * margins, factor * result.target_margins)
            if weighting is not None:
                wanted = weighting(SMALL) * wanted
            wanted = wanted + sum(term(SMALL) for term in terms)
            torch.testing.assert_close(result.losses, wanted, rtol=1e-12, atol=1e-12)
            found, true = slopes(loss, gradient, summary)
            assert found == pytest.approx(true, rel=1e-5, abs=1e-7), loss
            others = (margin, *terms, *(each for each in (scale, weighting) if each is not None))
            assert loss.needs == reward.needs.union(*(part.needs for part in others))


@pytest.mark.parametrize("reduction", [each for each in REDUCTIONS if each is not mean], ids=label)
def test_another_reduction_of_any_losses(reduction):
    turns = itertools.cycle(itertools.product(MARGINS, SCALES, LINKS))
    for reward, (margin, scale, link) in zip(REWARDS * 20, turns, strict=False):
        loss = PairwiseLoss(reward, margin, link, scale=scale, reduction=reduction)
        summary = summary_of(loss)
        result = loss(SMALL, summary)
        assert torch.equal(result.loss, reduction(result.losses))
        (gradient,) = torch.autograd.grad(result.loss, SMALL.policy)
        found, true = slopes(loss, gradient, summary)
        assert found == pytest.approx(true, rel=1e-5, abs=1e-7), loss


def same(first: PairwiseLoss, second: PairwiseLoss, rtol: float = 1e-12) -> None:
    results = [compute(loss, SMALL) for loss in (first, second)]
    torch.testing.assert_close(results[0].losses, results[1].losses, rtol=rtol, atol=1e-12)
    gradients = [torch.autograd.grad(result.loss, SMALL.policy)[0] for result in results]
    torch.testing.assert_close(*gradients, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("reward", REWARDS, ids=label)
def test_limits_with_every_reward(reward):
    ratio = gap_of("ratio", length_normalized=False)
    for link in LINKS:
        fixed = PairwiseLoss(reward, ConstantMargin(gamma=0.5), link)
        for solver in ("mirror", "exact"):
            dynamic = DynamicMargin(gamma=0.5, tau=1e12, solver=solver)
            same(dataclasses.replace(fixed, margin=dynamic), fixed, rtol=1e-9)
        adaptive = AdaptiveMargin(gap=ratio, gamma=0.5, alpha=0.0)
        same(dataclasses.replace(fixed, margin=adaptive), fixed)
        for level in ("pair", "batch"):
            scale = DynamicScale(alpha=0.0, level=level)
            same(dataclasses.replace(fixed, scale=scale), fixed)
    for margin in MARGINS:
        plain = PairwiseLoss(reward, margin)
        for link in (Robust(epsilon=0.0), UnbiasedRobust(epsilon=0.0), Weighted(weight=1.0)):
            same(dataclasses.replace(plain, link=link), plain)


@pytest.mark.parametrize(
    ("name", "options", "wanted", "given"),
    [
        ("alpha-dpo", {"alpha": 0.0}, "simpo", {"beta": 10.0, "gamma": 4.0}),
        ("gamma-simpo", {"tau": 1e12}, "simpo", {"beta": 10.0, "gamma": 4.0}),
        ("beta-dpo", {"alpha": 0.0}, "dpo", {}),
        ("beta-simpo", {"alpha": 0.0, "gamma": 1.0}, "simpo", {"beta": 0.1}),
        ("robust-dpo", {"epsilon": 0.0}, "dpo", {}),
        ("robust-simpo", {"epsilon": 0.0, "gamma": 1.0, "unbiased": True}, "simpo", {}),
        ("length-dpo", {"alpha": 0.0}, "dpo", {}),
        ("odpo", {"alpha": 0.0}, "dpo", {}),
        ("tdpo2", {"alpha": 0.0}, "dpo", {}),
        ("dpo-shift", {"share": 1.0}, "dpo", {}),
        ("bdpo", {"mixture": 1.0}, "dpo", {}),
        ("dpo-positive", {"penalty": 0.0, "beta": 0.1}, "dpo", {}),
        ("alpha-po", {"alpha": 0.0}, "simpo", {}),
        ("f-dpo", {"divergence": "alpha_divergence", "alpha": 1.0}, "dpo", {}),
        ("f-dpo", {"divergence": "reverse_kl"}, "dpo", {}),
    ],
)
def test_registered_limits(name, options, wanted, given):
    rtol = 1e-9 if "tau" in options else 1e-12
    same(find(name).build(**options), find(wanted).build(**given), rtol)


def test_large_margins_do_not_overflow():
    batch = LogpBatch(policy=vector(-1e6, -1, -1, -1e6), lengths=torch.tensor([1, 1, 1, 1]))
    result = compute(PairwiseLoss(SumLogp(beta=1.0)), batch)
    assert result.losses.tolist() == [1e6 - 1, 0.0]


def test_metrics_by_hand():
    batch = LogpBatch(
        policy=vector(-10, -20, -14, -18),
        reference=vector(-12, -19, -13, -20),
        lengths=torch.tensor([5, 5, 5, 5]),
    )
    loss = PairwiseLoss(LogRatio(beta=0.5), GivenMargin(vector(1.0, 3.0)))
    metrics = {name: value.item() for name, value in loss(batch).metrics.items()}
    assert metrics == {
        "rewards/chosen": 0.25,
        "rewards/rejected": 0.25,
        "rewards/accuracies": 0.5,
        "rewards/margins": 0.0,
        "logps/chosen": -15.0,
        "logps/rejected": -16.0,
        "kl/chosen": 0.5,
        "kl/rejected": 0.5,
        "margin/mean": 2.0,
        "margin/std": 1.0,
        "nonfinite": 0.0,
    }


def test_transport_does_not_see_who_is_paired_with_whom():
    batch = random_batch(12)
    order = torch.tensor([0, 1, 2, 3, 4, 5, 9, 7, 11, 6, 10, 8])
    fields = {name: getattr(batch, name)[order] for name in batch.given - {"kl"}}
    shuffled = LogpBatch(**fields)
    values = [compute(find("aot-unpaired").build(), each).loss for each in (batch, shuffled)]
    torch.testing.assert_close(*values)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_bradley_terry_by_hand():
    chosen = vector(2.0, -1.0).requires_grad_()
    loss = bradley_terry_loss(chosen, vector(0.5, 1.0))
    assert loss.item() == pytest.approx((softplus(-1.5) + softplus(2.0)) / 2)
    each = bradley_terry_loss(chosen, vector(0.5, 1.0), margin=vector(0.5, -1.0))
    assert each.item() == pytest.approx((softplus(-1.0) + softplus(1.0)) / 2)
    assert bradley_terry_loss(vector(), vector()).item() == 0.0
    assert bradley_terry_loss(vector(-1e4), vector(1e4)).item() == 2e4


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ((vector(1.0), vector(1.0, 2.0)), r"rejected_scores: got shape \(2,\), wanted \(1\)"),
        ((torch.ones(2, 2), torch.ones(2, 2)), "chosen_scores: got shape"),
        ((torch.ones(2).long(), torch.ones(2).long()), "chosen_scores: got dtype"),
        ((vector(1.0), vector(2.0), vector(1.0, 2.0)), "margin: got shape"),
    ],
)
def test_bradley_terry_shapes(arguments, wanted):
    with pytest.raises(ValueError, match=wanted):
        bradley_terry_loss(*arguments)
