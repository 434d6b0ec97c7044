"""Weights of pairs and completions in every loss: 1 is none, 2 is twice, 0 is no gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from loss_cases import VARIANTS, compute, random_batch

from fused_prefopt import PreferenceLoss
from fused_prefopt.loss_kernel import launch_loss
from fused_prefopt.losses import ChosenNll, SoftMinimum, TransportLoss, find
from fused_prefopt.losses.metrics import WEIGHTS_MEAN, is_unweighted, mean
from fused_prefopt.types import LogpBatch

# In a pairwise loss a pair, in another a completion.
WEIGHTS = {True: [2.0, 0.0, 1.0, 3.0], False: [2.0, 0.0, 1.0, 3.0, 1.0, 0.0, 2.0, 1.0]}
BUILT = [
    pytest.param(name, find(name).build(**options), id=f"{name}-{options}")
    for name, options in VARIANTS
]
LOSSES = [each for each in BUILT if not isinstance(each.values[1], TransportLoss)]
SORTING = [each.values[1] for each in BUILT if isinstance(each.values[1], TransportLoss)]
every_loss = pytest.mark.parametrize(("name", "loss"), LOSSES)


def weighted(loss, batch: LogpBatch, weights=None) -> LogpBatch:
    """The batch with weights of its pairs or completions."""
    values = torch.tensor(WEIGHTS[loss.pairwise] if weights is None else weights)
    whole = values.repeat(2) if loss.pairwise else values
    return dataclasses.replace(batch, weights=whole.to(batch.policy.dtype))


def repeated(loss, batch: LogpBatch) -> LogpBatch:
    """Each pair or completion as many times as its weight says."""
    counts = torch.tensor(WEIGHTS[loss.pairwise]).long()
    rows = torch.arange(len(counts)).repeat_interleave(counts)
    if loss.pairwise:
        rows = torch.cat([rows, rows + len(counts)])
    fields = {name: getattr(batch, name) for name in batch.given}
    if loss.pairwise:
        # The same pair again is a list of its own.
        del fields["groups"], fields["completions"]
    return LogpBatch(**{name: x[rows] if x.dim() else x for name, x in fields.items()})


def gradient(loss: torch.Tensor, batch: LogpBatch) -> torch.Tensor:
    return torch.autograd.grad(loss, batch.policy)[0]


@every_loss
def test_weights_of_one_are_none_to_the_bit(name, loss):
    for dtype in (torch.float32, torch.float64):
        plain = random_batch(dtype=dtype)
        batch = weighted(loss, plain, [1.0] * len(WEIGHTS[loss.pairwise]))
        without, found = compute(loss, plain), compute(loss, batch)
        assert torch.equal(found.loss, without.loss) and torch.equal(found.losses, without.losses)
        assert torch.equal(gradient(found.loss, batch), gradient(without.loss, plain))
        assert found.metrics.pop(WEIGHTS_MEAN) == 1
        torch.testing.assert_close(found.metrics, without.metrics, rtol=1e-6, atol=1e-6)


@every_loss
def test_the_loss_is_the_weighted_mean_of_the_losses_and_its_gradient_theirs(name, loss):
    plain = random_batch()
    batch, weights = weighted(loss, plain), torch.tensor(WEIGHTS[loss.pairwise]).double()
    statistics, others = loss.statistics(), loss.statistics()
    without, found = compute(loss, plain, statistics), compute(loss, batch, others)
    slopes = gradient(found.loss, batch)
    gone = (weights == 0).repeat(2 if loss.pairwise else 1)
    assert (slopes[gone] == 0).all() and (slopes[~gone] != 0).any() == bool(slopes.any())
    if statistics is not None:
        # What is remembered is the same, whatever the weights.
        torch.testing.assert_close(
            statistics.state_dict(), others.state_dict(), rtol=0, atol=0, equal_nan=True
        )
    spanning = [each for each in getattr(loss, "regularisers", ()) if each.coupled]
    if spanning:
        return  # Below, by hand.
    torch.testing.assert_close(found.losses, without.losses, rtol=0, atol=0)
    if isinstance(getattr(loss, "reduction", None), SoftMinimum):
        time = loss.reduction.temperature
        truth = -time * ((weights * (-without.losses / time).exp()).sum() / weights.sum()).log()
    elif name == "dro":
        groups = [plain.groups == group for group in plain.groups.unique()]
        shares = [(weights * without.losses)[own].mean() for own in groups]
        truth = torch.stack(shares).mean()
    else:
        truth = (weights * without.losses).mean()
    torch.testing.assert_close(found.loss, truth, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(slopes, gradient(truth, plain), rtol=1e-10, atol=1e-14)


@every_loss
def test_a_weight_of_two_is_the_pair_twice(name, loss):
    if loss.statistics() is not None or name == "dro":
        return  # Their pairs know of each other: above.
    batch = weighted(loss, random_batch())
    several = repeated(loss, random_batch())
    found, wanted = compute(loss, batch), compute(loss, several)
    # A mean divides by the number of pairs, which here is smaller; the others by what is there.
    pairs, many = found.losses.shape[0], wanted.losses.shape[0]
    normalised = isinstance(getattr(loss, "reduction", None), SoftMinimum)
    nll = [each for each in getattr(loss, "regularisers", ()) if each.coupled]
    if not nll:
        factor = 1.0 if normalised else many / pairs
        torch.testing.assert_close(found.loss, factor * wanted.loss, rtol=1e-12, atol=1e-14)
    for metric, value in wanted.metrics.items():
        if not is_unweighted(metric):
            torch.testing.assert_close(found.metrics[metric], value, rtol=1e-10, atol=1e-12)
    assert found.metrics[WEIGHTS_MEAN] == many / pairs


@pytest.mark.parametrize("name", ["cpo", "sft"])
def test_a_mean_over_tokens_weighs_the_pairs_and_counts_all_tokens(name):
    loss, batch = find(name).build(), weighted(find(name).build(), random_batch())
    assert loss.regularisers == (ChosenNll(nll="token_mean"),)
    weights, (chosen, _) = torch.tensor(WEIGHTS[True]).double(), batch.policy.chunk(2)
    nll = -(weights * chosen).sum() / batch.lengths[:4].sum()
    own = dataclasses.replace(loss, regularisers=())
    truth = (weights * compute(own, batch).losses).mean() + nll
    found = compute(loss, batch).loss
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(found, batch), gradient(truth, batch), rtol=1e-12, atol=0)


@every_loss
def test_weights_of_zero_alone_are_a_loss_of_zero_and_no_metric(name, loss):
    batch = weighted(loss, random_batch(), [0.0] * len(WEIGHTS[loss.pairwise]))
    found = compute(loss, batch)
    assert found.loss == 0 and not gradient(found.loss, batch).any()
    assert all(value.isfinite() for value in found.metrics.values())


def test_weights_that_are_none_are_refused():
    batch = random_batch(4)
    for bad in (-0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf">= 0, got {bad} in row 3"):
            dataclasses.replace(batch, weights=torch.tensor([1.0, 1.0, 1.0, bad]))
    with pytest.raises(ValueError, match="weights: got dtype torch.int64, wanted a floating"):
        dataclasses.replace(batch, weights=torch.ones(4).long())
    with pytest.raises(ValueError, match=r"weights: got shape \(2,\), wanted \(4\)"):
        dataclasses.replace(batch, weights=torch.ones(2))
    unequal = dataclasses.replace(batch, weights=torch.tensor([1.0, 2.0, 1.0, 3.0]))
    with pytest.raises(ValueError, match="other ones in the rejected half"):
        PreferenceLoss("dpo").from_logps(unequal)
    assert SORTING
    for loss in SORTING:
        with pytest.raises(ValueError, match="weights: got some with a loss that sorts the pairs"):
            compute(loss, weighted(loss, batch, [1.0, 1.0]))


SUMS = ["0.8 dpo + 0.2 bco-pair + sft", "dpo + 0.5 dr-dpo + 0.1 ipo", "kto + 0.3 apo-zero-unpaired"]


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_that_of_its_weighted_terms(name):
    loss_fn = PreferenceLoss(name)
    batch = weighted(loss_fn.loss, random_batch())
    truth = sum(term.weight * compute(term.loss, batch).loss for term in loss_fn.loss.terms)
    found = loss_fn.from_logps(batch)
    torch.testing.assert_close(found.loss, truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(found.loss, batch), gradient(truth, batch))
    assert found.metrics[WEIGHTS_MEAN] == batch.weights.mean()


def test_a_sum_with_wpos_weights_has_both():
    loss_fn, single = (PreferenceLoss(name, use_weighting=True) for name in (SUMS[0], "bco-pair"))
    batch = weighted(loss_fn.loss, random_batch())
    plain = dataclasses.replace(batch, weights=None)
    losses, weights = single.from_logps(plain).losses, torch.tensor(WEIGHTS[True]).double()
    torch.testing.assert_close(single.from_logps(batch).loss, (weights * losses).mean())
    with pytest.raises(ValueError, match="weights: got some with use_weighting and sft"):
        loss_fn.from_logps(batch)


def test_a_reduction_of_its_own_is_given_the_weights():
    def largest(losses, weights=None):
        return (losses if weights is None else weights * losses).max()

    loss = dataclasses.replace(find("dpo").build(), reduction=largest)
    batch = weighted(loss, random_batch())
    weights = torch.tensor(WEIGHTS[True]).double()
    assert torch.equal(compute(loss, batch).loss, (weights * compute(loss, batch).losses).max())


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["dpo", "simpo", "alpha-dpo", "gamma-simpo", "dro"])
def test_a_loss_in_one_launch_heeds_weights(name):
    loss = find(name).build()
    single = weighted(loss, random_batch(dtype=torch.float32))
    ours, truths = loss.statistics(), loss.statistics()
    found = launch_loss(loss, ours, single)
    fields = {key: getattr(single, key).detach() for key in single.given}
    double = LogpBatch(**{k: v.double() if v.is_floating_point() else v for k, v in fields.items()})
    double.policy.requires_grad_()
    truth = compute(loss, double, truths)
    assert found is not None and found.metrics.keys() == truth.metrics.keys()
    for metric, value in truth.metrics.items():
        torch.testing.assert_close(found.metrics[metric].double(), value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss.double(), truth.loss, rtol=1e-6, atol=1e-6)
    slopes = gradient(found.loss, single).double()
    torch.testing.assert_close(slopes, gradient(truth.loss, double), rtol=1e-5, atol=1e-7)
    floating = dataclasses.replace(single, lengths=single.lengths.float())
    assert launch_loss(loss, loss.statistics(), floating) is None


def test_the_mean_divides_by_the_number_not_by_the_weights():
    assert mean(torch.tensor([4.0]), torch.tensor([0.5])) == 2
