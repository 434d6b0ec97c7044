"""MADPO's and Omni-DPO's weights of pairs: the papers' formulas, limits and gradients."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from loss_cases import compute, random_batch, vector

from fused_prefopt import LogpBatch
from fused_prefopt.losses import (
    OnPolicyWeights,
    PerformanceWeights,
    Product,
    QualityWeights,
    ScoreMarginWeights,
    find,
)

MADPO = {"largest": 2.0, "smallest": 0.5, "slope": 1.0, "tau": math.log(999)}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def coefficient(h: float, *, largest: float, smallest: float, slope: float, tau: float) -> float:
    """c as the author's code writes it."""
    shape = (largest - 1) / (1 - smallest) * math.exp(slope * (abs(h) - tau))
    return smallest + (largest - smallest) / (1 + shape)


def madpo_weight(h: float, **options: float) -> float:
    return sigmoid(coefficient(h, **options) * h) / sigmoid(h) if h > -options["tau"] else 1.0


def pairs(batch: LogpBatch):
    """Per pair, as numbers, chosen first: log-probs, reference, lengths, scores."""
    fields = (batch.policy, batch.reference, batch.lengths, batch.rewards)
    halves = [half.tolist() for field in fields for half in field.detach().chunk(2)]
    return zip(*halves, strict=True)


def madpo(batch: LogpBatch, beta: float, **options: float) -> list[float]:
    return [
        -madpo_weight(sw - sl, **options) * math.log(sigmoid(beta * (w - rw - lo + rl)))
        for w, lo, rw, rl, _, _, sw, sl in pairs(batch)
    ]


def omni_dpo(batch, beta, eta, tau_ref, focus, nll_weight, tau_good) -> list[float]:
    losses = []
    for w, lo, rw, rl, nw, nl, sw, sl in pairs(batch):
        quality = sigmoid(eta * (sw - sl))
        performance = (1 - sigmoid(beta * (w / nw - lo / nl) - tau_ref)) ** focus
        margin = beta * ((w - rw) / nw - (lo - rl) / nl)
        rarer_and_good = w < rw and sw >= tau_good
        nll = -nll_weight * w / nw * rarer_and_good
        losses.append(-quality * performance * math.log(sigmoid(margin)) + nll)
    return losses


GOLDEN = [
    (madpo, {"beta": 0.1, **MADPO}),
    (madpo, {"beta": 0.3, "largest": 4.0, "smallest": 0.25, "slope": 3.0, "tau": 1.0}),
    (omni_dpo, find("omni-dpo").defaults),
    (
        omni_dpo,
        {"beta": 0.5, "eta": 0.2, "tau_ref": -0.3, "focus": 1.5, "nll_weight": 0.4, "tau_good": 0},
    ),
]


@pytest.mark.parametrize(("formula", "options"), GOLDEN)
def test_losses_follow_the_papers_formula(formula, options):
    batch = random_batch(24, seed=3)
    result = compute(find(formula.__name__).build(**options), batch)
    wanted = vector(*formula(batch, **options))
    torch.testing.assert_close(result.losses.detach(), wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(result.loss.detach(), wanted.mean(), rtol=1e-12, atol=1e-14)


def of_scores(chosen, rejected=0.0) -> LogpBatch:
    """A batch of equal log-probs with these scores."""
    scores = torch.tensor([chosen, [rejected] * len(chosen)], dtype=torch.float64).flatten()
    return LogpBatch(-torch.ones_like(scores), torch.ones(len(scores)).long(), rewards=scores)


def test_madpo_counts_unsure_pairs_more_sure_ones_less_and_wrong_ones_once():
    tau = 3.0
    options = {**MADPO, "tau": tau}
    found = ScoreMarginWeights(**options)(of_scores([0.0, 1.0, tau, 9.0, -1.0, -tau, -9.0]))
    assert found[[0, 2, 5, 6]].tolist() == pytest.approx([1.0] * 4, rel=1e-15)
    assert found[1] > 1 > found[3] and found[4] < 1


@pytest.mark.parametrize("h", [0.3, 1.5, -2.0])
def test_madpos_best_margin_is_the_scores_times_its_coefficient(h):
    # Labels drawn with P(w ≻ l) = σ(h); the paper's effective target margin.
    kept, flipped = ScoreMarginWeights(**MADPO)(of_scores([h, -h])).tolist()
    kept, flipped = kept * sigmoid(h), flipped * sigmoid(-h)
    assert math.log(kept / flipped) == pytest.approx(coefficient(h, **MADPO) * h, rel=1e-12)


def test_omni_dpo_trains_through_what_the_policy_has_learnt():
    batch = random_batch(24, seed=3)
    loss = find("omni-dpo").build(nll_weight=0.0)
    weights = loss.weighting(batch).detach()
    through = torch.autograd.grad(loss(batch).loss, batch.policy)[0]
    plain = dataclasses.replace(loss, weighting=None)(batch)
    stopped = torch.autograd.grad((weights * plain.losses).mean(), batch.policy)[0]
    assert (through - stopped).abs().max() > 1e-3
    # Where nothing is focused or told apart, every pair counts ½.
    half = find("omni-dpo").build(nll_weight=0.0, eta=0.0, focus=0.0)(batch)
    torch.testing.assert_close(half.losses, find("sigmoid-norm").build(beta=2.0)(batch).losses / 2)


def test_a_product_needs_and_wants_what_its_weightings_do():
    parts = (OnPolicyWeights(), QualityWeights(eta=0.3), OnPolicyWeights())
    batch, product = random_batch(), Product(parts)
    assert (product.needs, product.wants) == ({"rewards"}, {"collision"})
    torch.testing.assert_close(product(batch), parts[0](batch) ** 2 * parts[1](batch))


@pytest.mark.parametrize("name", ["madpo", "omni-dpo"])
def test_a_missing_score_stays_in_its_pair(name):
    batch = random_batch(8)
    scores = batch.rewards.clone()
    scores[6] = math.nan
    found = compute(find(name).build(), dataclasses.replace(batch, rewards=scores))
    wanted = compute(find(name).build(), batch)
    assert found.losses.isnan().tolist() == [False, False, True, False]
    torch.testing.assert_close(found.losses[[0, 1, 3]], wanted.losses[[0, 1, 3]], rtol=0, atol=0)
    assert found.metrics["nonfinite"] == 1


@pytest.mark.parametrize(
    "weighting",
    [ScoreMarginWeights(**MADPO), QualityWeights(eta=1.0), Product((QualityWeights(eta=1.0),))],
)
def test_scores_far_apart_give_the_weights_of_float64(weighting):
    chosen = [-1e4, -90.0, -6.8, 0.0, 6.9, 90.0, 1e4]
    wanted = weighting(of_scores(chosen))
    assert wanted.isfinite().all()
    batch = of_scores(chosen)
    single = {name: getattr(batch, name).float() for name in ("policy", "rewards")}
    found = weighting(dataclasses.replace(batch, **single))
    torch.testing.assert_close(found, wanted.float(), rtol=2e-6, atol=1e-30)


def test_what_is_learnt_for_good_keeps_a_finite_gradient():
    for dtype in (torch.float32, torch.float64):
        policy = torch.tensor([0.0, -1e3, -1e3, 0.0], dtype=dtype, requires_grad=True)
        batch = LogpBatch(policy, torch.ones(4).long())
        weights = PerformanceWeights(beta=10.0, tau_ref=0.8, focus=3.0)(batch)
        (gradient,) = torch.autograd.grad(weights.sum(), policy)
        assert weights.tolist() == [0.0, 1.0] and gradient.isfinite().all()
