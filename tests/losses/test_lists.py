"""Lists of rated completions: pairs of them, rankings, and what they have in common with pairs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from loss_cases import compute, random_batch, vector

from fused_prefopt import LogpBatch, PreferenceLoss
from fused_prefopt.losses import (
    ConstantMargin,
    LogRatio,
    MeanLogp,
    PairwiseLoss,
    PlackettLuce,
    TopOne,
    available_losses,
    find,
    pairs_of_lists,
)
from fused_prefopt.losses.metrics import LIST_PAIRS, WEIGHTS_MEAN

PAIRWISE = [name for name, info in available_losses().items() if info.pairwise]
SORTING = ("aot", "aot-unpaired")
# Lists of 4, 1, 3, 2 and 2 completions, mixed; the fourth list is all one score, the first has a
# tie.
GROUPS = torch.tensor([7, 3, 7, 5, 9, 5, 7, 2, 9, 5, 7, 2])
SCORES = vector(2.0, 1.0, 0.5, 3.0, 1.0, -1.0, 2.0, 0.0, 1.0, 0.0, -1.0, 4.0)
# 4 completions with one tie: 5 pairs; none; 3; none; 1.
PAIRS = {7: 5, 3: 0, 5: 3, 9: 0, 2: 1}


def lists(**fields) -> LogpBatch:
    batch = random_batch(12, seed=4)
    fields = {"groups": GROUPS, "rewards": SCORES, "completions": None} | fields
    return dataclasses.replace(batch, **fields)


def beaten(winner: int) -> list[int]:
    return [j for j in range(12) if GROUPS[j] == GROUPS[winner] and SCORES[j] < SCORES[winner]]


def members(group: int) -> list[int]:
    return [i for i in range(12) if GROUPS[i] == group]


def mean_over_lists(of_list: Callable[[int], torch.Tensor | float]) -> torch.Tensor:
    return sum(of_list(group) for group in PAIRS) / len(PAIRS)


def test_every_two_completions_of_different_score_are_a_pair_and_lists_count_alike():
    batch = lists()
    found = pairs_of_lists(batch)
    wanted = [(i, j) for i in range(12) for j in beaten(i)]
    assert found.batch.completions.reshape(2, -1).t().tolist() == [list(pair) for pair in wanted]
    index = found.batch.completions
    for name in batch.given - {"kl", "weights"}:
        assert torch.equal(getattr(found.batch, name), getattr(batch, name)[index])
    shares = [9 / (5 * PAIRS[int(GROUPS[i])]) for i, _ in wanted]
    torch.testing.assert_close(found.batch.weights, vector(*shares).repeat(2))
    assert found.mean == 9 / 5
    ratios = (batch.policy - batch.reference).detach()
    result = PreferenceLoss("dpo", beta=0.3).from_logps(batch)

    def of_list(group: int):
        pairs = [(i, j) for i in members(group) for j in beaten(i)]
        losses = [math.log1p(math.exp(-0.3 * (ratios[i] - ratios[j]))) for i, j in pairs]
        return sum(losses) / max(1, len(losses))

    torch.testing.assert_close(result.loss.item(), mean_over_lists(of_list))
    assert result.losses.shape == (9,) and result.rewards.shape == (18,)
    assert result.metrics[LIST_PAIRS] == 9 / 5 and WEIGHTS_MEAN not in result.metrics


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
    with pytest.raises(ValueError, match=r"margin: got .*0.7.* with TopOne"):
        PairwiseLoss(LogRatio(beta=1.0), ConstantMargin(gamma=0.7), ranking=TopOne())


def lists_of_two(pairs: LogpBatch, order: torch.Tensor) -> LogpBatch:
    """Pairs as lists, their completions in another order."""
    half = pairs.size // 2
    scores = pairs.rewards.abs().sort(descending=True).values.reshape(2, -1).flatten()
    fields = {name: getattr(pairs, name) for name in pairs.given}
    fields |= {"groups": torch.arange(half).repeat(2), "rewards": scores}
    return LogpBatch(**{name: x[order] if x.dim() else x for name, x in fields.items()})


@pytest.mark.parametrize("name", [name for name in PAIRWISE if name not in SORTING])
def test_lists_of_two_are_their_pairs(name):
    pairs = dataclasses.replace(random_batch(8, seed=2), groups=None, completions=None)
    straight = lists_of_two(pairs, torch.arange(8))
    pairs = dataclasses.replace(pairs, rewards=straight.rewards)
    # Chosen and rejected by turns: the pairs stay in their order.
    mixed = torch.arange(8).reshape(2, 4).t().flatten()
    wanted = PreferenceLoss(name).from_logps(pairs)
    (slopes,) = torch.autograd.grad(wanted.loss, pairs.policy)
    for order in (torch.arange(8), mixed):
        batch = lists_of_two(pairs, order)
        found = PreferenceLoss(name).from_logps(batch)
        (gradient,) = torch.autograd.grad(found.loss, pairs.policy)
        assert torch.equal(found.loss, wanted.loss) and torch.equal(found.losses, wanted.losses)
        assert torch.equal(gradient, slopes) and torch.equal(found.rewards, wanted.rewards)
        del found.metrics[LIST_PAIRS]
        torch.testing.assert_close(found.metrics, wanted.metrics, rtol=1e-14, atol=1e-14)


def test_on_pairs_plackett_luce_is_dpo():
    pairs = random_batch(8)
    for batch in (pairs, dataclasses.replace(pairs, groups=None, completions=None)):
        found, wanted = (
            PreferenceLoss(name, beta=0.4).from_logps(batch) for name in ("pl-dpo", "dpo")
        )
        assert torch.equal(found.losses, wanted.losses)


@pytest.mark.parametrize("name", ["dpo", "gamma-simpo", "pl-dpo", "lipo-lambda", "listnet-dpo"])
def test_a_completion_that_is_nan_spoils_its_list_alone_and_none_is_no_loss(name):
    batch = lists()
    policy = batch.policy.detach().clone()
    policy[3] = math.nan
    batch = dataclasses.replace(batch, policy=policy.requires_grad_())
    own = pairs_of_lists(batch).batch.groups.chunk(2)[0] == 5
    losses = PreferenceLoss(name).from_logps(batch).losses
    assert losses[~own].isfinite().all() and losses[own].isnan().any()
    # No list has two different scores, or there is none at all.
    for alike in (lists(rewards=torch.ones(12).double()), part(lists(), slice(0, 0))):
        result = PreferenceLoss(name).from_logps(alike)
        (slopes,) = torch.autograd.grad(result.loss, alike.policy)
        assert result.loss == 0 and not slopes.any() and result.metrics[LIST_PAIRS] == 0


def part(batch: LogpBatch, rows: slice) -> LogpBatch:
    fields = {name: getattr(batch, name) for name in batch.given}
    return LogpBatch(**{name: x[rows] if x.dim() else x for name, x in fields.items()})


def test_weights_are_those_of_lists():
    weights = vector(1.0, 1.0, 1.0, 2.0, 1.0, 2.0, 1.0, 0.0, 1.0, 2.0, 1.0, 0.0)
    for name in ("dpo", "pl-dpo"):
        loss_fn = PreferenceLoss(name)
        found = loss_fn.from_logps(lists(weights=weights))
        alone = {
            group: loss_fn.from_logps(part(lists(), torch.tensor(members(group)))).loss
            for group in (7, 5)
        }
        torch.testing.assert_close(found.loss, (alone[7] + 2 * alone[5]) / 5)
        assert WEIGHTS_MEAN in found.metrics
    with pytest.raises(ValueError, match="weights: got other ones"):
        PreferenceLoss("dpo").from_logps(lists(weights=torch.arange(12.0)))


@pytest.mark.parametrize("name", ["gamma-simpo", "alpha-dpo", "cpo", "dr-dpo", "dpo + 0.1 sft"])
def test_statistics_and_sums_see_the_pairs(name):
    batch, loss_fn, other = lists(), PreferenceLoss(name), PreferenceLoss(name)
    found = loss_fn.from_logps(batch)
    wanted = other.from_logps(pairs_of_lists(batch).batch)
    assert torch.equal(found.loss, wanted.loss)
    states = loss_fn.state_dict(), other.state_dict()
    torch.testing.assert_close(*states, rtol=0, atol=0, equal_nan=True)


def test_hidden_states_of_lists_and_what_is_refused():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 11, (12, 6), generator=generator)
    given = {"groups": GROUPS, "rewards": SCORES, "reference": lists().reference}
    found = PreferenceLoss("pl-dpo")(hidden, head, labels, **given)
    logps = (hidden @ head.t()).log_softmax(-1)[:, :-1].gather(2, labels[:, 1:, None]).sum((1, 2))
    batch = LogpBatch(logps, torch.full((12,), 5), **given)
    wanted = PreferenceLoss("pl-dpo").from_logps(batch)
    torch.testing.assert_close(found.loss, wanted.loss)
    slopes = [torch.autograd.grad(each.loss, hidden)[0] for each in (found, wanted)]
    torch.testing.assert_close(*slopes)
    with pytest.raises(ValueError, match=r"ld_alpha: got 0.5 with lists, needs pairs"):
        PreferenceLoss("dpo", ld_alpha=0.5)(hidden, head, labels, **given)
    with pytest.raises(ValueError, match=r"lists .* needs `rewards`"):
        PreferenceLoss("dpo").from_logps(dataclasses.replace(batch, rewards=None))
    for name in SORTING:
        with pytest.raises(ValueError, match="sorts the pairs, .* nor lists"):
            PreferenceLoss(name).from_logps(batch)


def test_dro_takes_the_same_layout():
    found = PreferenceLoss("dro").from_logps(lists())
    assert torch.equal(found.loss, compute(find("dro").build(), lists()).loss)
