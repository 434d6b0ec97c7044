"""γ-PO's and α-DPO's margins with every reward and link of the registry: what must hold of each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from loss_cases import GivenMargin, compute, label, parts, random_batch

from fused_prefopt.losses import (
    AdaptiveMargin,
    ConstantMargin,
    DynamicMargin,
    PairwiseLoss,
)
from fused_prefopt.losses.adaptive_margin import adaptive_margin
from fused_prefopt.types import LogpBatch

REWARDS, LINKS = parts("reward"), parts("link")
BATCHES = [random_batch(12, seed) for seed in range(3)]
each_reward = pytest.mark.parametrize("reward", REWARDS, ids=label)
# They draw all that the queue holds: a draw depends on the order of what is in it.
DYNAMIC = [
    DynamicMargin(gamma=0.5, queue_size=8),
    DynamicMargin(gamma=3.0, tau=2.0, queue=False),
    DynamicMargin(gamma=2.0, tau=5.0, solver="exact", queue_size=8),
]
# A normalised gap, and the ones of the paper's ablations.
ADAPTIVE = [
    {"statistics": "ema"},
    {"statistics": "batch", "gamma": 0.3, "margin_scale": "unit"},
    {"statistics": "reference", "implicit_reference": "policy"},
    {"statistics": "dataset", "mean": 0.2, "std": 3.0, "implicit_reference": "sequence_kl"},
    {"normalize": False, "implicit_reference": "inverse_reference"},
]


def adaptive(reward, options) -> AdaptiveMargin:
    return adaptive_margin(reward, **{"alpha": 0.4, "gamma": 1.0} | options)


def every_margin(reward) -> list:
    return [*DYNAMIC, *(adaptive(reward, options) for options in ADAPTIVE)]


def with_links(reward, margins, links: int = 2) -> Iterator[PairwiseLoss]:
    """Every margin with some links, which take turns: over all rewards each meets each."""
    for place, margin in enumerate(margins):
        start = links * REWARDS.index(reward) + place
        for turn in range(start, start + links):
            yield PairwiseLoss(reward, margin, LINKS[turn % len(LINKS)])


def pairs(batch: LogpBatch, places: list[int]) -> LogpBatch:
    """The pairs of these numbers, in this order."""
    half = batch.size // 2
    rows = torch.tensor([*places, *(place + half for place in places)])
    chosen = {name: getattr(batch, name).detach()[rows] for name in batch.given - {"kl"}}
    chosen["policy"].requires_grad_()
    return LogpBatch(**chosen, kl=batch.kl)


def gradient(loss: torch.Tensor, batch: LogpBatch) -> torch.Tensor:
    return torch.autograd.grad(loss, batch.policy, retain_graph=True)[0]


def close(found: torch.Tensor, wanted: torch.Tensor, rtol: float = 1e-10) -> None:
    scale = max(1.0, wanted.detach().abs().max().item())
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol * scale)


@each_reward
def test_dynamic_margins_share_the_budget_and_rise_with_the_reward_margin(reward):
    drawn = DynamicMargin(gamma=0.5, queue_size=8, sample_size=8)
    for loss in with_links(reward, (*DYNAMIC, drawn), links=1):
        margin, statistics = loss.margin, loss.statistics()
        for batch in BATCHES:
            pool = statistics(loss.observe(batch))
            there = pool.margins.isfinite()
            # All of the pool: this batch's, and what is drawn of those before.
            solved, past = margin.solve(pool.margins)[there], pool.margins[there]
            assert solved.sum().item() == pytest.approx(past.shape[0] * margin.gamma, rel=1e-12)
            rising = solved[past.argsort()]
            assert (rising.diff() >= -1e-12 * margin.gamma).all() and rising[-1] > rising[0]
            assert torch.equal(loss(batch, pool).target_margins, solved[: batch.size // 2])


@each_reward
def test_without_a_budget_the_loss_is_the_plain_one(reward):
    for loss in with_links(reward, DYNAMIC):
        plain = compute(PairwiseLoss(reward, link=loss.link), BATCHES[0])
        # At γ₀ = 0 exactly, and in the limit.
        for rtol in (0.0, 1e-6):
            small = dataclasses.replace(loss.margin, gamma=1e-3 * rtol)
            found = compute(dataclasses.replace(loss, margin=small), BATCHES[0])
            close(found.losses, plain.losses, rtol)
            close(gradient(found.loss, BATCHES[0]), gradient(plain.loss, BATCHES[0]), rtol)


@each_reward
def test_margins_are_constants_of_the_step(reward):
    for loss in with_links(reward, every_margin(reward)):
        statistics = loss.statistics()
        for batch in BATCHES[:2]:
            found = compute(loss, batch, statistics)
            constant = dataclasses.replace(loss, margin=GivenMargin(found.target_margins))
            wanted = constant(batch)
            close(found.losses, wanted.losses, 1e-14)
            close(gradient(found.loss, batch), gradient(wanted.loss, batch), 1e-14)


def moved(batch: LogpBatch, per_token: bool, scale: float, shift: float) -> LogpBatch:
    """The batch with the gap of its log-ratios scaled and shifted, by its reference."""
    ratios = scale * (batch.policy.detach() - batch.reference)
    half = batch.size // 2
    ratios[:half] += shift * (batch.lengths[:half] if per_token else 1)
    return dataclasses.replace(batch, reference=batch.policy.detach() - ratios)


@each_reward
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 3.0), (0.25, 0.0), (7.0, -2.0), (-1.5, 0.5)])
def test_adaptive_margins_do_not_see_where_the_gap_lies_nor_how_far_it_spreads(
    reward, scale, shift
):
    def margins_of(margin, batches):
        loss = PairwiseLoss(reward, margin)
        statistics = loss.statistics()
        return [compute(loss, batch, statistics).target_margins - 1 for batch in batches]

    others = [moved(batch, reward.per_token, scale, shift) for batch in BATCHES]
    for options in ({"statistics": "ema"}, {"statistics": "batch"}, {"statistics": "dataset"}):
        first, second = options, options
        if options["statistics"] == "dataset":
            first = options | {"mean": 0.5, "std": 2.0}
            second = options | {"mean": 0.5 * scale + shift, "std": 2.0 * abs(scale)}
        found = margins_of(adaptive(reward, second), others)
        wanted = margins_of(adaptive(reward, first), BATCHES)
        for ours, true in zip(found, wanted, strict=True):
            close(ours, math.copysign(1, scale) * true, 1e-9)
    linear = adaptive(reward, {"normalize": False})
    found, wanted = margins_of(linear, others), margins_of(linear, BATCHES)
    for ours, true in zip(found, wanted, strict=True):
        close(ours, scale * true + 0.4 * reward.beta * shift, 1e-9)


@each_reward
def test_the_gap_is_per_token_where_the_reward_is_and_in_its_unit(reward):
    batch = BATCHES[0]
    longer = dataclasses.replace(batch, lengths=2 * batch.lengths)
    # A declared fact, found again by what the reward does.
    assert reward.per_token != torch.equal(reward(batch), reward(longer))
    margin = adaptive_margin(reward, alpha=0.4, normalize=False)
    ratios = batch.policy.detach() - batch.reference
    if reward.per_token:
        ratios = ratios / batch.lengths
    chosen, rejected = (0.4 * reward.beta * ratios).chunk(2)
    close(compute(PairwiseLoss(reward, margin), batch).target_margins, chosen - rejected, 1e-14)
    other = adaptive_margin(reward, length_normalized=not reward.per_token)
    assert other.gap.length_normalized != margin.gap.length_normalized
    assert adaptive_margin(reward, margin_scale="unit").scale == 1.0


@each_reward
def test_pairs_in_another_order_have_the_same_margins(reward):
    order = [4, 0, 5, 2, 1, 3]
    for loss in with_links(reward, every_margin(reward)):
        first, second = loss.statistics(), loss.statistics()
        for batch in BATCHES[:2]:
            shuffled = pairs(batch, order)
            found, wanted = compute(loss, shuffled, first), compute(loss, batch, second)
            close(found.target_margins, wanted.target_margins[order])
            close(found.losses, wanted.losses[order])
            rows = [*order, *(place + 6 for place in order)]
            close(gradient(found.loss, shuffled), gradient(wanted.loss, batch)[rows])


@each_reward
def test_a_pair_that_is_not_finite_leaves_the_others(reward):
    batch, bad, keep = BATCHES[0], 2, [0, 1, 3, 4, 5]
    poisoned = batch.policy.detach().clone()
    poisoned[bad] = math.nan
    dirty = dataclasses.replace(batch, policy=poisoned.requires_grad_())
    clean = pairs(batch, keep)
    rows = [*keep, *(place + 6 for place in keep)]
    for loss in with_links(reward, every_margin(reward)):
        first, second = loss.statistics(), loss.statistics()
        found, wanted = compute(loss, dirty, first), compute(loss, clean, second)
        close(found.target_margins[keep], wanted.target_margins)
        close(found.losses[keep], wanted.losses)
        assert found.losses[bad].isnan()
        slopes = gradient(found.losses[keep].sum(), dirty)[rows]
        close(slopes, gradient(wanted.losses.sum(), clean))
        later = [compute(loss, BATCHES[1], each).losses for each in (first, second)]
        close(*later)


@each_reward
def test_a_pair_alone_has_the_mean_margin(reward):
    one = pairs(BATCHES[0], [3])
    alone = [
        *DYNAMIC,
        *(adaptive(reward, {"statistics": source}) for source in ("ema", "batch")),
    ]
    for loss in with_links(reward, alone):
        found = compute(loss, one)
        constant = ConstantMargin(gamma=loss.margin.gamma)
        wanted = compute(dataclasses.replace(loss, margin=constant), one)
        close(found.losses, wanted.losses, 1e-12)
        close(gradient(found.loss, one), gradient(wanted.loss, one), 1e-12)
