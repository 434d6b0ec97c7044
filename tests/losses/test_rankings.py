"""Losses of whole lists: Plackett–Luce, LiPO's λ and ListNet, and what goes with them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from loss_cases import compute, random_batch, vector
from rated_lists import PAIRS, SCORES, beaten, lists, mean_over_lists, members, part

from fused_prefopt import LogpBatch, PreferenceLoss
from fused_prefopt.losses import (
    ConstantMargin,
    DiscountedGain,
    Hinge,
    LogRatio,
    MeanLogp,
    PairwiseLoss,
    PlackettLuce,
    Robust,
    TopOne,
    pairs_of_lists,
)
from fused_prefopt.losses.rewards import BoundedRatio, PerToken, RejectedShare
from fused_prefopt.losses.terms import DynamicScale


def plackett_luce(ratios: torch.Tensor, group: int):
    return sum(
        torch.logsumexp(0.3 * ratios[[i, *beaten(i)]], 0) - 0.3 * ratios[i] for i in members(group)
    )


def lipo_lambda(ratios: torch.Tensor, group: int):
    own, total = members(group), 0.0
    ranking = sorted(own, key=lambda i: -ratios[i].item())
    for i in own:
        for j in beaten(i):
            gain = 2 ** SCORES[i] - 2 ** SCORES[j]
            places = [1 / math.log(2 + ranking.index(k)) for k in (i, j)]
            loss = torch.nn.functional.softplus(0.3 * (ratios[j] - ratios[i]))
            total = total + gain * abs(places[0] - places[1]) * loss
    return total


def listnet(ratios: torch.Tensor, group: int):
    own = members(group)
    if not PAIRS[group]:
        return 0.0
    return -(SCORES[own].softmax(0) * (0.3 * ratios[own]).log_softmax(0)).sum()


@pytest.mark.parametrize(
    ("name", "formula"),
    [("plackett-luce-dpo", plackett_luce), ("lipo-lambda", lipo_lambda), ("listnet-dpo", listnet)],
)
def test_rankings_and_their_gradients_are_their_formulas(name, formula):
    batch = lists()
    result = PreferenceLoss(name, beta=0.3).from_logps(batch)
    (gradient,) = torch.autograd.grad(result.loss, batch.policy)
    policy = batch.policy.detach().requires_grad_()
    wanted = mean_over_lists(lambda group: formula(policy - batch.reference, group))
    (slopes,) = torch.autograd.grad(wanted, policy)
    torch.testing.assert_close(result.loss, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, slopes, rtol=1e-10, atol=1e-14)


def test_at_the_reference_lambda_still_tells_the_pairs_apart():
    batch = lists(reference=lists().policy.detach())
    (slopes,) = torch.autograd.grad(
        PreferenceLoss("lipo-lambda").from_logps(batch).loss, batch.policy
    )
    assert slopes[[0, 2, 6, 10, 3, 5, 9, 7, 11]].abs().min() > 0


def test_a_ranking_heeds_margins_and_its_link():
    batch = pairs_of_lists(lists()).batch
    for reward in (LogRatio(beta=0.3), MeanLogp(beta=2.0)):
        loss = PairwiseLoss(reward, ConstantMargin(gamma=0.7), ranking=PlackettLuce())
        rewards = reward(lists()).detach()
        terms = [
            math.log1p(sum(math.exp(rewards[j] + 0.7 - rewards[i]) for j in beaten(i)))
            for i in range(12)
        ]
        torch.testing.assert_close(compute(loss, batch).loss.item(), sum(terms) / 5)
    # Of links that need the two margins apart, too, a pair is a list of two.
    loss = PairwiseLoss(LogRatio(beta=0.3), ConstantMargin(gamma=0.7), Robust(epsilon=0.2))
    loss, pairs = dataclasses.replace(loss, ranking=PlackettLuce()), random_batch(8)
    alone = dataclasses.replace(pairs, groups=None, completions=None)
    assert torch.equal(compute(loss, pairs).losses, compute(loss, alone).losses)


@pytest.mark.parametrize("ranking", [TopOne(), DiscountedGain(), PlackettLuce()])
def test_what_has_no_place_in_a_ranking_is_refused(ranking):
    reward = LogRatio(beta=1.0)
    for given in (
        {"margin": ConstantMargin(gamma=0.7)},
        {"link": Hinge()},
        {"scale": DynamicScale(alpha=0.3)},
    ):
        if not isinstance(ranking, TopOne):
            assert PairwiseLoss(reward, ranking=ranking, **given).ranking is ranking
            continue
        with pytest.raises(ValueError, match=rf"{next(iter(given))}: got .* with TopOne.*default"):
            PairwiseLoss(reward, ranking=ranking, **given)
    for sided in (RejectedShare(reward=reward, share=0.5), BoundedRatio(beta=1.0)):
        for each in (sided, PerToken(reward=sided)):
            if isinstance(ranking, PlackettLuce):
                assert PairwiseLoss(each, ranking=ranking).ranking is ranking
                continue
            kind = type(ranking).__name__
            with pytest.raises(ValueError, match=f"reward: got .* with {kind}.*both sides"):
                PairwiseLoss(each, ranking=ranking)
    assert PairwiseLoss(PerToken(reward=reward), ranking=ranking).ranking is ranking


def test_a_reward_of_sides_is_that_of_each_pair():
    loss = PairwiseLoss(RejectedShare(reward=LogRatio(beta=0.3), share=0.5), ranking=PlackettLuce())
    rewards = 0.3 * (lists().policy - lists().reference).detach()
    terms = [
        math.log1p(sum(math.exp(0.5 * rewards[j] - rewards[i]) for j in beaten(i)))
        for i in range(12)
    ]
    found = compute(loss, pairs_of_lists(lists()).batch)
    torch.testing.assert_close(found.loss.item(), sum(terms) / 5)


def test_one_best_completion_among_others_of_one_score_is_softmax_dpo():
    batch = dataclasses.replace(
        lists(), groups=torch.zeros(12, dtype=torch.int64), rewards=torch.arange(12) == 4
    )
    rewards = 0.3 * (batch.policy - batch.reference).detach()
    others = [rewards[j] for j in range(12) if j != 4]
    wanted = math.log1p(sum(math.exp(other - rewards[4]) for other in others))
    found = PreferenceLoss("s-dpo", beta=0.3).from_logps(batch).loss.item()
    torch.testing.assert_close(found, wanted)


def test_on_pairs_plackett_luce_is_dpo():
    pairs = random_batch(8)
    for batch in (pairs, dataclasses.replace(pairs, groups=None, completions=None)):
        found, wanted = (
            PreferenceLoss(name, beta=0.4).from_logps(batch) for name in ("pl-dpo", "dpo")
        )
        assert torch.equal(found.losses, wanted.losses)


def test_a_reward_that_is_infinite_counts_as_in_pairs():
    # A completion that cannot be written any more is beaten for good.
    batch = LogpBatch(
        policy=vector(-3.0, -math.inf, -5.0).requires_grad_(),
        lengths=torch.ones(3, dtype=torch.int64),
        reference=vector(-4.0, -4.0, -4.0),
        groups=torch.zeros(3, dtype=torch.int64),
        rewards=vector(2.0, 0.0, 1.0),
    )
    for rows in ([0, 1], [0, 1, 2]):
        given = part(batch, rows)
        found, wanted = (
            PreferenceLoss(name).from_logps(part(given, kept)).loss
            for name, kept in (("pl-dpo", slice(None)), ("dpo", [row for row in rows if row != 1]))
        )
        assert torch.equal(found, wanted)
        assert torch.autograd.grad(found, batch.policy)[0].isfinite().all()
    for name in ("pl-dpo", "dpo"):
        lost = dataclasses.replace(part(batch, [0, 1]), rewards=vector(0.0, 1.0))
        assert PreferenceLoss(name).from_logps(lost).loss == math.inf
