"""γ-PO's and α-DPO's margins on lists of rated completions: every reward, every loss of pairs."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from loss_cases import GivenMargin, compute, label, parts, random_batch

from fused_prefopt import LogpBatch, PreferenceLoss
from fused_prefopt.losses import ConstantMargin, DynamicMargin, PairwiseLoss, available_losses
from fused_prefopt.losses.adaptive_margin import adaptive_margin
from fused_prefopt.losses.added_margin import takes_margin
from fused_prefopt.losses.registry import find

REWARDS, LINKS = parts("reward"), parts("link")
each_reward = pytest.mark.parametrize("reward", REWARDS, ids=label)
# Lists of 4, 1, 3 and 2 completions, mixed; the first has a tie.
GROUPS = [7, 3, 7, 5, 5, 7, 2, 5, 7, 2]
SCORES = [2.0, 1.0, 0.5, 3.0, -1.0, 2.0, 0.0, 0.5, -1.0, 4.0]
PAIRS = [
    (i, j)
    for i, j in itertools.product(range(10), range(10))
    if GROUPS[i] == GROUPS[j] and SCORES[i] > SCORES[j]
]
DYNAMIC = {"name": "dynamic", "gamma": 0.5, "tau": 2.0, "queue_size": 64}
ADAPTIVE = {"name": "adaptive", "alpha": 0.3, "gamma": 0.2}
TAKERS = [
    name
    for name in available_losses()
    if takes_margin(loss := find(name).build()) and loss.margin.statistics() is None
]


def lists(seed: int) -> LogpBatch:
    groups, scores = torch.tensor(GROUPS), torch.tensor(SCORES, dtype=torch.float64)
    batch = random_batch(10, seed)
    return dataclasses.replace(batch, groups=groups, rewards=scores, completions=None)


BATCHES = [lists(seed) for seed in range(3)]


def chosen_of(batch: LogpBatch, rows: list[int], **fields) -> LogpBatch:
    """The sequences of these numbers, differentiable towards those of the batch."""
    given = {name: getattr(batch, name)[rows] for name in batch.given - {"kl"}}
    return LogpBatch(**given | fields, kl=batch.kl)


def by_hand(batch: LogpBatch) -> LogpBatch:
    """`PAIRS` as a batch of pairs, whose losses are still to be weighed."""
    rows = [i for i, _ in PAIRS] + [j for _, j in PAIRS]
    return chosen_of(batch, rows, groups=None)


def mean_over_lists(losses: torch.Tensor) -> torch.Tensor:
    """Mean over the lists of the mean over the pairs of each; without a pair it is 0."""
    own = {group: [GROUPS[i] == group for i, _ in PAIRS] for group in set(GROUPS)}
    return sum(losses[places].mean() for places in own.values() if any(places)) / len(own)


def module(loss: PairwiseLoss) -> PreferenceLoss:
    loss_fn = PreferenceLoss("dpo")
    loss_fn.loss, loss_fn.statistics = loss, loss.statistics()
    return loss_fn


def margins_of(reward) -> list:
    return [
        DynamicMargin(gamma=0.5, queue_size=64),
        DynamicMargin(gamma=3.0, tau=2.0, queue=False, solver="exact"),
        adaptive_margin(reward, gamma=1.0, alpha=0.4),
        adaptive_margin(reward, alpha=0.4, statistics="batch", implicit_reference="policy"),
        adaptive_margin(reward, alpha=0.4, normalize=False),
    ]


def with_links(reward) -> list[PairwiseLoss]:
    """Every margin with a link, which take turns: over all rewards each meets each."""
    start = REWARDS.index(reward)
    return [
        PairwiseLoss(reward, margin, LINKS[(start + place) % len(LINKS)])
        for place, margin in enumerate(margins_of(reward))
    ]


def gradient(loss: torch.Tensor, batch: LogpBatch) -> torch.Tensor:
    return torch.autograd.grad(loss, batch.policy, retain_graph=True)[0]


def close(found: torch.Tensor, wanted: torch.Tensor, rtol: float = 1e-11) -> None:
    scale = max(1.0, wanted.detach().abs().max().item())
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol * scale)


@each_reward
def test_the_pairs_of_all_lists_share_one_budget_and_one_scale(reward):
    for loss in with_links(reward):
        loss_fn, statistics = module(loss), loss.statistics()
        for batch in BATCHES:
            pairs = by_hand(batch)
            summary = None if statistics is None else statistics(loss.observe(pairs))
            wanted, found = loss(pairs, summary), loss_fn.from_logps(batch)
            close(found.target_margins, wanted.target_margins)
            close(found.losses, wanted.losses)
            total = mean_over_lists(wanted.losses)
            close(found.loss, total)
            close(gradient(found.loss, batch), gradient(total, batch))
            # They are constants of the step.
            constant = module(dataclasses.replace(loss, margin=GivenMargin(found.target_margins)))
            held = constant.from_logps(batch).loss
            close(gradient(found.loss, batch), gradient(held, batch), 1e-14)
            if isinstance(loss.margin, DynamicMargin):
                solved, there = loss.margin.solve(summary.margins), summary.margins.isfinite()
                budget = loss.margin.gamma * int(there.sum())
                assert solved[there].sum().item() == pytest.approx(budget, rel=1e-12)
                order = summary.margins[: len(PAIRS)].argsort()
                rising = found.target_margins[order]
                assert (rising.diff() >= -1e-12).all() and rising[-1] > rising[0]


@each_reward
def test_in_the_limits_lists_have_the_plain_or_the_constant_margin(reward):
    limits = [
        (DynamicMargin(gamma=0.0), 0.0),
        (DynamicMargin(gamma=0.0, solver="exact"), 0.0),
        (DynamicMargin(gamma=0.7, tau=1e12), 0.7),
        (adaptive_margin(reward, gamma=0.7, alpha=0.0), 0.7),
    ]
    for place, (margin, gamma) in enumerate(limits):
        link = LINKS[(REWARDS.index(reward) + place) % len(LINKS)]
        loss = PairwiseLoss(reward, margin, link)
        constant = dataclasses.replace(loss, margin=ConstantMargin(gamma=gamma))
        found, wanted = (module(each).from_logps(BATCHES[0]) for each in (loss, constant))
        close(found.losses, wanted.losses, 1e-9)
        close(gradient(found.loss, BATCHES[0]), gradient(wanted.loss, BATCHES[0]), 1e-9)


@each_reward
def test_completions_in_another_order_and_lists_by_other_numbers_are_the_same(reward):
    order = [9, 4, 0, 7, 1, 3, 8, 2, 6, 5]
    for loss in with_links(reward):
        found, wanted = module(loss), module(loss)
        for batch in BATCHES[:2]:
            other = chosen_of(batch, order, groups=100 - batch.groups[order])
            results = found.from_logps(other), wanted.from_logps(batch)
            close(results[0].loss, results[1].loss)
            close(gradient(results[0].loss, batch), gradient(results[1].loss, batch))
            # Pairs come in the order of their better completion.
            places = [PAIRS.index((order[i], order[j])) for i, j in pairs_in(order)]
            close(results[0].target_margins, results[1].target_margins[places])


def pairs_in(order: list[int]) -> list[tuple[int, int]]:
    """Places of the pairs where the completions are in this order."""
    return [
        (i, j) for i, j in itertools.product(range(10), range(10)) if (order[i], order[j]) in PAIRS
    ]


@each_reward
def test_a_completion_that_is_not_finite_leaves_the_pairs_without_it(reward):
    bad, clean = 3, BATCHES[0]
    rows = [i for i in range(10) if i != bad]
    poisoned = clean.policy.detach().clone()
    poisoned[bad] = math.nan
    dirty = dataclasses.replace(clean, policy=poisoned.requires_grad_())
    keep = [bad not in pair for pair in PAIRS]
    for loss in with_links(reward):
        first, second = module(loss), module(loss)
        found = first.from_logps(dirty)
        wanted = second.from_logps(chosen_of(clean, rows))
        close(found.target_margins[keep], wanted.target_margins)
        close(found.losses[keep], wanted.losses)
        assert found.losses[[not kept for kept in keep]].isnan().all()
        later = [each.from_logps(BATCHES[1]).losses for each in (first, second)]
        close(*later)


def lists_of_two(seed: int) -> tuple[LogpBatch, LogpBatch]:
    """Pairs, and the same completions as lists of two, chosen and rejected by turns."""
    pairs = dataclasses.replace(random_batch(8, seed), groups=None, completions=None)
    scores = pairs.rewards.abs() + 0.5
    pairs = dataclasses.replace(pairs, rewards=torch.cat([scores[:4], -scores[4:]]))
    turns = torch.arange(8).reshape(2, 4).t().flatten().tolist()
    return pairs, chosen_of(pairs, turns, groups=torch.arange(8) // 2)


@pytest.mark.parametrize("given", [DYNAMIC, ADAPTIVE], ids=["dynamic", "adaptive"])
@pytest.mark.parametrize("name", TAKERS)
def test_lists_of_two_with_a_margin_are_their_pairs_exactly(name, given):
    of_lists, of_pairs = (PreferenceLoss(name, margin=given) for _ in range(2))
    for seed in range(3):
        pairs, batch = lists_of_two(seed)
        found, wanted = of_lists.from_logps(batch), of_pairs.from_logps(pairs)
        assert torch.equal(found.target_margins, wanted.target_margins)
        assert torch.equal(found.losses, wanted.losses)
        assert torch.equal(gradient(found.loss, pairs), gradient(wanted.loss, pairs))
    states = of_lists.state_dict(), of_pairs.state_dict()
    torch.testing.assert_close(*states, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("given", [DYNAMIC, ADAPTIVE], ids=["dynamic", "adaptive"])
@pytest.mark.parametrize("name", TAKERS)
def test_every_loss_takes_a_margin_on_lists_and_resumes_its_statistic(name, given):
    loss_fn, resumed = (PreferenceLoss(name, margin=given) for _ in range(2))
    statistics = loss_fn.loss.statistics()
    for batch in BATCHES[:2]:
        found = loss_fn.from_logps(batch)
        assert found.loss.isfinite() and gradient(found.loss, batch).isfinite().all()
        pairs = dataclasses.replace(by_hand(batch), weights=None)
        close(found.target_margins, compute(loss_fn.loss, pairs, statistics).target_margins)
    resumed.load_state_dict(loss_fn.state_dict())
    results = [each.from_logps(BATCHES[2]) for each in (loss_fn, resumed)]
    assert torch.equal(results[0].losses, results[1].losses)
