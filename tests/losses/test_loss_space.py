"""Every reward with every margin, scale, link and weighting: values, gradients, limits."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from loss_cases import compute, held, random_batch

from fused_prefopt.epilogues import run_epilogue
from fused_prefopt.losses import (
    AdaptiveMargin,
    AlphaRatio,
    Blended,
    Calibration,
    ChosenNll,
    ConstantMargin,
    DropMargin,
    DynamicMargin,
    DynamicScale,
    Exact,
    ForwardKlRatio,
    Hinge,
    Indifferent,
    JensenShannonRatio,
    LengthMargin,
    Logistic,
    LogOdds,
    LogRatio,
    MeanLogp,
    MeanLogRatio,
    MeanPower,
    OffsetMargin,
    OnPolicyWeights,
    PairwiseLoss,
    RejectedShare,
    Robust,
    ScoreMargin,
    SequenceKlMargin,
    SoftMinimum,
    Squared,
    SumLogp,
    UnbiasedRobust,
    Weighted,
    find,
    gap_of,
)

REWARDS = [
    LogRatio(beta=0.1),
    MeanLogp(beta=2.5),
    SumLogp(beta=0.05),
    MeanLogRatio(beta=1.0),
    LogOdds(),
    MeanPower(beta=1.0, alpha=0.25),
    ForwardKlRatio(beta=0.1),
    JensenShannonRatio(beta=0.5),
    AlphaRatio(beta=0.1, alpha=0.5),
    RejectedShare(reward=LogRatio(beta=0.1), share=0.9),
]
RATIO = gap_of("ratio", length_normalized=False)
MARGINS = [
    ConstantMargin(gamma=0.5),
    DynamicMargin(gamma=0.5, tau=1.0),
    DynamicMargin(gamma=0.5, tau=1.0, solver="exact", queue=False),
    AdaptiveMargin(gap=RATIO, gamma=0.5, alpha=0.1),
    AdaptiveMargin(gap=RATIO, gamma=0.5, alpha=0.1, normalisation=None, stop_gradient=False),
    AdaptiveMargin(gap=gap_of("sequence_kl", length_normalized=True), gamma=0.5, alpha=0.1),
    AdaptiveMargin(
        gap=gap_of("policy", length_normalized=True), gamma=0.5, alpha=0.1, stop_gradient=False
    ),
    LengthMargin(alpha=0.05),
    OffsetMargin(),
    ScoreMargin(),
    SequenceKlMargin(scale=0.1),
    DropMargin(scale=0.5),
]
SCALES = [None, DynamicScale(), DynamicScale(alpha=0.3, level="batch")]
LINKS = [
    Logistic(),
    Logistic(label_smoothing=0.1),
    Robust(epsilon=0.1),
    UnbiasedRobust(epsilon=0.1),
    Hinge(),
    Squared(),
    Exact(label_smoothing=0.1),
    Blended(),
    Indifferent(),
    Weighted(weight=0.3, link=Robust(epsilon=0.2)),
]
WEIGHTINGS = [None, OnPolicyWeights()]
SMALL = random_batch(8, seed=3)
DIRECTION = torch.linspace(-1, 2, 8, dtype=torch.float64).sin()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of tiny operations: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def label(parts) -> str:
    return "-".join("none" if part is None else type(part).__name__ for part in parts)


def composed(reward, margin, scale, link, weighting=None) -> PairwiseLoss:
    return PairwiseLoss(reward, margin, link, scale=scale, weighting=weighting)


@pytest.mark.parametrize("reward", REWARDS, ids=lambda part: type(part).__name__)
@pytest.mark.parametrize("margin", MARGINS, ids=lambda part: type(part).__name__)
def test_the_whole_space_is_finite_and_follows_its_formula(reward, margin):
    batch = random_batch(8, seed=3)
    summaries = []
    for scale in SCALES:
        loss = PairwiseLoss(reward, margin, scale=scale)
        statistics = loss.statistics()
        summaries.append(None if statistics is None else statistics(loss.observe(batch)))
    scales = list(zip(SCALES, summaries, strict=True))
    for (scale, summary), link, weighting in itertools.product(scales, LINKS, WEIGHTINGS):
        loss = composed(reward, margin, scale, link, weighting)
        result = loss(batch, summary)
        (gradient,) = torch.autograd.grad(result.loss, batch.policy)
        assert result.losses.isfinite().all() and gradient.isfinite().all(), loss
        chosen, rejected = reward(batch).chunk(2)
        margins, targets = chosen - rejected, result.target_margins
        factor = torch.ones(())
        if scale is not None:
            level = summary[1]
            observed = margins if scale.level == "pair" else level.batch
            factor = (1 + scale.alpha * (observed - level.average)).clamp(min=1e-3)
        wanted = link(factor * margins, factor * targets)
        if weighting is not None:
            wanted = weighting(batch) * wanted
        torch.testing.assert_close(result.losses, wanted, rtol=1e-12, atol=1e-12)
        slope = (gradient * DIRECTION).sum().item()
        assert slope == pytest.approx(steepness(loss, batch, summary), rel=1e-5, abs=1e-7), loss


def steepness(loss: PairwiseLoss, batch, summary) -> float:
    """Slope along `DIRECTION` of the loss with its stopped parts held, by finite differences."""
    constant, step = held(loss, batch, summary), 1e-5
    ends = [
        constant(dataclasses.replace(batch, policy=batch.policy.detach() + shift), summary).loss
        for shift in (step * DIRECTION, -step * DIRECTION)
    ]
    return ((ends[0] - ends[1]) / (2 * step)).item()


@pytest.mark.parametrize("reward", REWARDS, ids=lambda part: type(part).__name__)
def test_a_soft_minimum_of_any_losses(reward):
    reduction = SoftMinimum(temperature=0.7)
    for margin, scale, link in itertools.product(MARGINS, SCALES[:2], LINKS[:5]):
        loss = dataclasses.replace(composed(reward, margin, scale, link), reduction=reduction)
        statistics = loss.statistics()
        summary = None if statistics is None else statistics(loss.observe(SMALL))
        result = loss(SMALL, summary)
        mean = (-result.losses / 0.7).exp().mean()
        assert result.loss.item() == pytest.approx(-0.7 * mean.log().item(), rel=1e-9, abs=1e-12)
        (gradient,) = torch.autograd.grad(result.loss, SMALL.policy)
        slope = (gradient * DIRECTION).sum().item()
        assert slope == pytest.approx(steepness(loss, SMALL, summary), rel=1e-5, abs=1e-7), loss


@pytest.mark.parametrize(
    "parts",
    [
        *((r, m, s, Logistic()) for r in REWARDS for m in MARGINS[:5] for s in SCALES[:2]),
        *((LogRatio(beta=0.1), m, s, k) for m in MARGINS for s in SCALES for k in LINKS[:8]),
    ],
    ids=label,
)
def test_gradients_are_those_of_the_held_loss(parts):
    loss, batch = composed(*parts), random_batch(6, seed=4)
    statistics = loss.statistics()
    summary = None if statistics is None else statistics(loss.observe(batch))
    constant = held(loss, batch, summary)

    def value(policy: torch.Tensor) -> torch.Tensor:
        return constant(dataclasses.replace(batch, policy=policy), summary).loss

    assert torch.autograd.gradcheck(value, (batch.policy,), eps=1e-6, atol=1e-7, rtol=1e-5)
    (found,) = torch.autograd.grad(loss(batch, summary).loss, batch.policy)
    (wanted,) = torch.autograd.grad(value(batch.policy), batch.policy)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("reward", REWARDS, ids=lambda part: type(part).__name__)
def test_regularisers_add_to_any_loss(reward):
    terms = (
        ChosenNll(weight=0.3, nll="token_mean"),
        ChosenNll(weight=0.1, nll="sequence_mean"),
        Calibration(beta=0.5),
    )
    for margin, scale, weighting in itertools.product(MARGINS[:5], SCALES, WEIGHTINGS):
        plain = composed(reward, margin, scale, Robust(epsilon=0.1), weighting)
        loss = dataclasses.replace(plain, regularisers=terms)
        result = compute(loss, SMALL)
        wanted = compute(plain, SMALL).losses + sum(term(SMALL) for term in terms)
        torch.testing.assert_close(result.losses, wanted, rtol=1e-12, atol=1e-12)
        (gradient,) = torch.autograd.grad(result.loss, SMALL.policy)
        assert gradient.isfinite().all()


def same(first: PairwiseLoss, second: PairwiseLoss, rtol: float = 1e-12) -> None:
    results = [compute(loss, SMALL) for loss in (first, second)]
    torch.testing.assert_close(results[0].losses, results[1].losses, rtol=rtol, atol=1e-12)
    gradients = [torch.autograd.grad(result.loss, SMALL.policy)[0] for result in results]
    torch.testing.assert_close(*gradients, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("reward", REWARDS, ids=lambda part: type(part).__name__)
def test_limits_with_every_reward(reward):
    for link in LINKS:
        fixed = PairwiseLoss(reward, ConstantMargin(gamma=0.5), link)
        for solver in ("mirror", "exact"):
            dynamic = DynamicMargin(gamma=0.5, tau=1e12, solver=solver)
            same(dataclasses.replace(fixed, margin=dynamic), fixed, rtol=1e-9)
        adaptive = AdaptiveMargin(gap=RATIO, gamma=0.5, alpha=0.0)
        same(dataclasses.replace(fixed, margin=adaptive), fixed)
        for level in ("pair", "batch"):
            scale = DynamicScale(alpha=0.0, level=level)
            same(dataclasses.replace(fixed, scale=scale), fixed)
    for margin in MARGINS:
        plain = PairwiseLoss(reward, margin)
        same(dataclasses.replace(plain, link=Robust(epsilon=0.0)), plain)
        same(dataclasses.replace(plain, link=UnbiasedRobust(epsilon=0.0)), plain)
        same(dataclasses.replace(plain, link=Weighted(weight=1.0)), plain)


def test_registered_limits():
    pairs = [
        (("alpha-dpo", {"alpha": 0.0}), ("simpo", {"beta": 10.0, "gamma": 4.0})),
        (("beta-dpo", {"alpha": 0.0}), ("dpo", {})),
        (("beta-simpo", {"alpha": 0.0, "gamma": 1.0}), ("simpo", {"beta": 0.1})),
        (("dpo-shift", {"share": 1.0}), ("dpo", {})),
        (("dpo-positive", {"penalty": 0.0, "beta": 0.1}), ("dpo", {})),
        (("alpha-po", {"alpha": 0.0}), ("simpo", {})),
        (("f-dpo", {"divergence": "alpha_divergence", "alpha": 1.0}), ("dpo", {})),
        (("f-dpo", {"divergence": "reverse_kl"}), ("dpo", {})),
    ]
    for (name, options), (wanted, given) in pairs:
        same(find(name).build(**options), find(wanted).build(**given))


def test_a_soft_minimum_is_the_mean_of_hot_losses_and_the_least_of_cold_ones():
    losses = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    assert SoftMinimum(temperature=1e7)(losses).item() == pytest.approx(5.5 / 3, rel=1e-6)
    assert SoftMinimum(temperature=1e-3)(losses).item() == pytest.approx(0.5, abs=2e-3)
    results = [compute(find("dr-dpo").build(temperature=t), SMALL) for t in (1e-2, 1e9)]
    assert results[0].loss < results[1].loss
    torch.testing.assert_close(results[1].loss, compute(find("dpo").build(), SMALL).loss)


def test_what_the_kernel_does_not_know_goes_the_other_way():
    batch = random_batch(8, 0, torch.float32)
    plain = PairwiseLoss(LogRatio(beta=0.1))
    for parts in (
        {"scale": DynamicScale()},
        {"weighting": OnPolicyWeights()},
        {"reduction": SoftMinimum()},
        {"regularisers": (ChosenNll(),)},
        {"regularisers": (Calibration(beta=0.1),)},
        {"link": Exact()},
    ):
        loss = dataclasses.replace(plain, **parts)
        assert run_epilogue(loss, loss.statistics(), batch) is None
