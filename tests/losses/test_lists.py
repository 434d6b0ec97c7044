"""Lists of rated completions as pairs of them, and what they have in common with pairs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from loss_cases import compute, random_batch, vector
from rated_lists import GROUPS, PAIRS, SCORES, beaten, lists, mean_over_lists, members, part
from waits import Inside, watched

from fused_prefopt import LogpBatch, PreferenceLoss, sequence_logps, token_statistics
from fused_prefopt.losses import OnPolicyWeights, available_losses, find, pairs_of_lists
from fused_prefopt.losses.metrics import LIST_PAIRS, WEIGHTS_MEAN
from fused_prefopt.losses.whole_batch import whole_batch

PAIRWISE = [name for name, info in available_losses().items() if info.pairwise]
SORTING = ("aot", "aot-unpaired")
RANKINGS = ["pl-dpo", "lipo-lambda", "listnet-dpo"]


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


@pytest.mark.parametrize("name", ["dpo", *RANKINGS])
def test_far_apart_in_float32_and_scores_and_numbers_of_any_kind(name):
    ratios = vector(
        1000.0, -1000.0, 500.0, -999.0, 0.5, -0.5, 1000.0, 999.0, 3.0, -1000.0, 7.0, 0.0
    )
    plain = {"reference": vector(*[0.0] * 12), "rewards": SCORES.round()}
    wanted = lists(policy=ratios.requires_grad_(), **plain)
    loss = PreferenceLoss(name, beta=1.0).from_logps(wanted).loss
    (slopes,) = torch.autograd.grad(loss, ratios)
    single = ratios.detach().float().requires_grad_()
    for scores in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8):
        batch = LogpBatch(
            single,
            wanted.lengths,
            reference=wanted.reference.float(),
            rewards=plain["rewards"].to(scores),
            groups=-GROUPS.to(torch.int8) if scores.is_floating_point else GROUPS * 2**58,
        )
        found = PreferenceLoss(name, beta=1.0).from_logps(batch).loss
        (gradient,) = torch.autograd.grad(found, single)
        torch.testing.assert_close(found.double(), loss.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient.double(), slopes, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", [name for name in PAIRWISE if "rewards" in find(name).build().needs]
)
def test_scores_of_any_kind_are_their_numbers(name):
    for kind, low, high in ((torch.int8, -100, 100), (torch.uint8, 0, 200), (torch.bool, 0, 1)):
        scores = torch.where(SCORES > 0.7, high, low)
        found, wanted = (
            PreferenceLoss(name).from_logps(lists(rewards=scores.to(each)))
            for each in (kind, torch.float64)
        )
        assert torch.equal(found.losses, wanted.losses) and wanted.losses.any()


def test_the_numbers_of_lists_may_be_any_integers():
    for groups in (GROUPS + 2**60, GROUPS.to(torch.int8) + 118):
        pairs = pairs_of_lists(lists(groups=groups)).batch
        found, wanted = whole_batch(pairs).batch, pairs_of_lists(lists()).batch
        for name in ("groups", "completions"):
            ours, theirs = getattr(found, name), getattr(wanted, name)
            assert torch.equal(ours[:, None] == ours, theirs[:, None] == theirs)


def test_a_score_that_is_nan_is_refused():
    scores = SCORES.clone()
    scores[5] = math.nan
    with pytest.raises(ValueError, match=r"rewards: wanted a score .* got NaN in row 5"):
        PreferenceLoss("dpo").from_logps(lists(rewards=scores))


@pytest.mark.parametrize("name", ["dpo", "gamma-dpo", "cpo", *RANKINGS])
def test_a_list_waits_once_and_adds_in_one_order(monkeypatch, name):
    class Added(Inside):
        """Sums of floating numbers in whatever order threads come."""

        found: set[str] = set()

        def seen(self, func, args, kwargs):
            if "scatter_add" in func._schema.name and args[0].is_floating_point():
                self.found.add(str(func))
            return func(*args, **kwargs)

    batch, loss_fn = lists(), PreferenceLoss(name)
    waits, added = watched(monkeypatch), Added()
    for each in (waits, added):
        with each:
            loss_fn.from_logps(batch).loss.backward()
    # The number of pairs is the shape of all that follows.
    assert waits.found == ["aten.nonzero.default in lists:pairs_of_lists"]
    assert added.found == set()


@pytest.mark.slow
def test_compiled_lists_are_compiled_again_for_their_second_number_of_pairs_alone():
    torch.compiler.reset()
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    loss_fn = PreferenceLoss("pl-dpo")
    compiled, seen = torch.compile(loss_fn.from_logps, backend=count), []
    for different in (2, 6, 11):
        batch = lists(rewards=torch.arange(12.0).clamp(max=different))
        found, wanted = (each(batch) for each in (compiled, loss_fn.from_logps))
        torch.testing.assert_close(found.losses, wanted.losses)
        slopes = [torch.autograd.grad(each.loss, batch.policy)[0] for each in (found, wanted)]
        torch.testing.assert_close(*slopes)
        seen.append(len(graphs))
    assert 0 < seen[0] < seen[1] == seen[-1]


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


def test_weights_of_pairs_and_of_tokens_in_lists():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 11, (12, 6), generator=generator)
    tokens = torch.rand(12, 6, generator=generator, dtype=torch.float64)
    given = {"groups": GROUPS, "rewards": SCORES, "reference": lists().reference}
    out = sequence_logps(hidden, head, labels, token_weights=tokens)
    collision = token_statistics(hidden, head, labels).collisions * tokens
    batch = LogpBatch(out.sums, out.lengths, collision=collision.sum(1), **given)
    factors = OnPolicyWeights()(pairs_of_lists(batch).batch)
    own = pairs_of_lists(batch).batch.groups[:9]
    for name in ("dpo", *RANKINGS):
        loss_fn = PreferenceLoss(name, use_weighting=True)
        found = loss_fn(hidden, head, labels, token_weights=tokens, **given)
        losses = factors * PreferenceLoss(name).from_logps(batch).losses
        wanted = sum(losses[own == group].mean() for group, pairs in PAIRS.items() if pairs) / 5
        torch.testing.assert_close(found.loss, wanted)
        slopes = [
            torch.autograd.grad(each, hidden, retain_graph=True)[0] for each in (found.loss, wanted)
        ]
        torch.testing.assert_close(*slopes)
    summed = PreferenceLoss("pl-dpo + 0.5 dpo", use_weighting=True).from_logps(batch)
    alone = [
        PreferenceLoss(name, use_weighting=True).from_logps(batch) for name in ("pl-dpo", "dpo")
    ]
    torch.testing.assert_close(summed.loss, alone[0].loss + 0.5 * alone[1].loss)
    over_tokens = [{"name": "sft", "hyperparameters": {"nll": "token_mean"}}, "dpo"]
    with pytest.raises(ValueError, match=r"weights: .*use_weighting and sft.* lists give theirs"):
        PreferenceLoss(over_tokens, use_weighting=True).from_logps(batch)


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
    # Before anything is computed.
    unscored = {name: given[name] for name in ("groups", "reference")}
    with pytest.raises(ValueError, match=r"lists .* needs `rewards`"):
        PreferenceLoss("dpo")(None, None, None, **unscored)
    for name in SORTING:
        with pytest.raises(ValueError, match="sorts the pairs, .* nor lists"):
            PreferenceLoss(name).from_logps(batch)


def test_dro_takes_the_same_layout():
    found = PreferenceLoss("dro").from_logps(lists())
    assert torch.equal(found.loss, compute(find("dro").build(), lists()).loss)
