"""Sums of losses: the weighted sum of their terms, whose statistics go on as alone."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from loss_cases import extras_of, held, hidden_batch, random_batch, vector
from torch.nn.functional import logsigmoid

import fused_prefopt as fp
from fused_prefopt import preference
from fused_prefopt.losses import (
    DirectRewardLoss,
    OnPolicyWeights,
    PairwiseLoss,
    Term,
    WeightedSum,
    find,
)
from fused_prefopt.losses.metrics import TERM_LOSS
from fused_prefopt.statistics import TermStatistics

SMALL = {"queue_size": 16, "sample_size": 12}
# Name, weight and hyperparameters of each term.
SUMS = {
    "MPO": [("dpo", 0.8, {}), ("bco-pair", 0.2, {}), ("sft", 1.0, {})],
    "NLL per completion": [("sft", 0.3, {"nll": "sequence_mean"}), ("simpo", 1.0, {})],
    "NLL in nats": [("sft", 0.01, {"nll": "sum"}), ("ipo", 1.0, {})],
    "statistics": [
        ("gamma-dpo", 1.5, SMALL),
        ("alpha-dpo", 0.25, {}),
        ("beta-dpo", 1.0, {}),
        ("alpha-dpo", 1.0, {"statistics": "batch"}),
    ],
    "spanning": [("dr-dpo", 1.0, {}), ("gamma-simpo", 0.5, SMALL), ("aot", 2.0, {})],
    "scored": [("odpo", 1.0, {}), ("tdpo1", 0.5, {}), ("wpo", 0.1, {}), ("orpo", 1.0, {})],
    "completions": [("kto", 1.0, {"desirable_weight": 1.3}), ("dro", 0.1, {"log_z0": 1.0})],
    "one": [("dpo", 0.3, {"label_smoothing": 0.1})],
}
NAMES = ("name", "weight", "hyperparameters")


def sum_of(case: str, **options) -> fp.PreferenceLoss:
    return fp.PreferenceLoss(
        [dict(zip(NAMES, term, strict=True)) for term in SUMS[case]], **options
    )


def alone(case: str) -> list[fp.PreferenceLoss]:
    return [fp.PreferenceLoss(name, **options) for name, _, options in SUMS[case]]


def batches(case: str, dtype: torch.dtype = torch.float64, steps: int = 4) -> list[fp.LogpBatch]:
    sizes = (8, 12, 2, 10)[:steps]
    return [random_batch(size, seed, dtype) for seed, size in enumerate(sizes)]


@pytest.mark.parametrize("case", SUMS)
def test_a_sum_is_the_weighted_sum_of_its_terms(case):
    loss_fn, terms = sum_of(case), alone(case)
    weights = [weight for _, weight, _ in SUMS[case]]
    for step, batch in enumerate(batches(case)):
        for each in (loss_fn, *terms):
            each.train(step != 2)
        found, parts = loss_fn.from_logps(batch), [term.from_logps(batch) for term in terms]
        for name in ("loss", "losses"):
            wanted = sum(w * getattr(part, name) for w, part in zip(weights, parts, strict=True))
            torch.testing.assert_close(getattr(found, name), wanted, rtol=1e-14, atol=1e-14)
        slopes = [torch.autograd.grad(part.loss, batch.policy)[0] for part in parts]
        wanted = sum(w * slope for w, slope in zip(weights, slopes, strict=True))
        (gradient,) = torch.autograd.grad(found.loss, batch.policy)
        torch.testing.assert_close(gradient, wanted, rtol=1e-13, atol=1e-15)
        for label, part in zip(loss_fn.hyperparameters, parts, strict=True):
            assert torch.equal(found.metrics[f"{TERM_LOSS}{label}"], part.loss.detach())
    for label, term in zip(loss_fn.hyperparameters, terms, strict=True):
        kept = {} if term.statistics is None else term.statistics.state_dict()
        for name, value in kept.items():
            other = loss_fn.state_dict()[f"statistics.{label}.{name}"]
            torch.testing.assert_close(other, value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", SUMS)
def test_gradients_of_a_sum_are_those_of_finite_differences(case):
    loss, batch = sum_of(case).loss, random_batch(6, seed=3)
    statistics = loss.statistics()
    summaries = (None,) * len(loss.terms)
    if statistics is not None:
        summaries = statistics(loss.observe(batch))
    terms = tuple(
        dataclasses.replace(term, loss=held(term.loss, batch, summary))
        for term, summary in zip(loss.terms, summaries, strict=True)
    )
    fixed = WeightedSum(terms)

    def value(policy, divergence):
        moved = dataclasses.replace(batch, policy=policy, sequence_kl=divergence)
        return fixed(moved, summaries).loss

    inputs = batch.policy.detach().requires_grad_(), batch.sequence_kl.clone().requires_grad_()
    assert torch.autograd.gradcheck(value, inputs)


def test_rewards_are_those_of_the_first_term_that_trains_one():
    batch = random_batch(8)
    for case, leading in (("MPO", "dpo"), ("NLL in nats", "ipo"), ("completions", "kto")):
        index = [name for name, _, _ in SUMS[case]].index(leading)
        found, alike = sum_of(case).from_logps(batch), alone(case)[index].from_logps(batch)
        assert torch.equal(found.rewards, alike.rewards)
        if alike.target_margins is not None:
            assert torch.equal(found.target_margins, alike.target_margins)
        for name, value in alike.metrics.items():
            assert torch.equal(found.metrics[name], value), name
        assert sum_of(case).loss.reward == find(leading).build().reward
    assert fp.PreferenceLoss("sft + sft").loss.leading == 0
    assert fp.PreferenceLoss("0 dpo + sft + simpo").loss.leading == 2


def test_a_pair_that_one_term_cannot_judge_is_counted_once():
    batch = random_batch(8)
    reference = batch.reference.clone()
    reference[0] = torch.nan
    found = fp.PreferenceLoss("sft + dpo + simpo").from_logps(
        dataclasses.replace(batch, reference=reference)
    )
    assert found.losses.isfinite().tolist() == [False, True, True, True]
    assert found.metrics["nonfinite"] == 1


@pytest.mark.parametrize("case", ["statistics", "spanning"])
def test_statistics_resume_bit_by_bit(case):
    through, stopped = sum_of(case), sum_of(case)
    first, last = batches(case)[:2], batches(case)[2:]
    for each in (through, stopped):
        for batch in first:
            each.from_logps(batch)
    resumed = sum_of(case)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    for batch in last:
        one, other = through.from_logps(batch), resumed.from_logps(batch)
        assert torch.equal(one.losses, other.losses) and torch.equal(one.loss, other.loss)
    with pytest.raises(RuntimeError, match="statistics"):
        sum_of("MPO").load_state_dict(stopped.state_dict())


def test_a_saved_state_finds_its_terms_in_another_order():
    stopped = fp.PreferenceLoss("gamma-dpo + sft + gamma-simpo + alpha-dpo", **SMALL)
    for batch in batches("statistics"):
        stopped.from_logps(batch)
    resumed = fp.PreferenceLoss("0.5 alpha-dpo + gamma-simpo + 2 gamma-dpo", **SMALL)
    resumed.load_state_dict(stopped.state_dict())
    one, other = (each.eval().from_logps(random_batch(6, seed=9)) for each in (stopped, resumed))
    for name in ("alpha-dpo", "gamma-dpo", "gamma-simpo"):
        assert one.metrics[f"{TERM_LOSS}{name}"] == other.metrics[f"{TERM_LOSS}{name}"], name


def test_a_failure_in_one_statistic_leaves_all_as_they_were():
    loss_fn = sum_of("statistics")
    loss_fn.from_logps(random_batch(8))
    before = copy.deepcopy(loss_fn.state_dict())
    statistics = loss_fn.statistics
    assert isinstance(statistics, TermStatistics)
    observed = list(loss_fn.loss.observe(random_batch(6, seed=1)))
    with pytest.raises(TypeError):
        statistics([*observed[:2], None, observed[3]])
    for name, value in loss_fn.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert statistics.nonfinite == 0
    spoilt = observed[0].clone()
    spoilt[0] = torch.nan
    statistics([spoilt, *observed[1:]])
    assert statistics.nonfinite == 1


@pytest.mark.parametrize("case", ["MPO", "statistics", "scored"])
def test_one_pass_of_the_head_serves_all_terms(case, monkeypatch):
    given, passes = hidden_batch(), []
    plain = preference.sequence_logps

    def counted(*args, **kwargs):
        passes.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(preference, "sequence_logps", counted)
    inputs = [given[name].clone() for name in ("hidden", "weight")]
    for leaf in inputs:
        leaf.requires_grad_()
    loss_fn, terms = sum_of(case), alone(case)
    found = loss_fn(*inputs, given["labels"], **extras_of(given))
    assert len(passes) == 1
    weights = [weight for _, weight, _ in SUMS[case]]
    parts = [term(*inputs, given["labels"], **extras_of(given)).loss for term in terms]
    wanted = sum(w * part for w, part in zip(weights, parts, strict=True))
    slopes = [torch.autograd.grad(loss, inputs) for loss in (found.loss, wanted)]
    torch.testing.assert_close(found.loss, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-12)


def in_float64(batch: fp.LogpBatch) -> fp.LogpBatch:
    """The same numbers, with a leaf of its own."""
    fields = {name: getattr(batch, name).detach() for name in batch.given | {"policy", "lengths"}}
    exact = fp.LogpBatch(
        **{k: v.double() if v.is_floating_point() else v for k, v in fields.items()}
    )
    exact.policy.requires_grad_()
    return exact


@pytest.mark.interpreted
@pytest.mark.parametrize(("case", "weighting"), [*((case, False) for case in SUMS), ("MPO", True)])
def test_terms_with_a_kernel_are_launched_and_all_equal_float64(case, weighting, monkeypatch):
    launched, plain = [], preference.launch_loss

    def counted(loss, statistics, batch):
        result = plain(loss, statistics, batch)
        launched.append(result is not None)
        return result

    monkeypatch.setattr(preference, "launch_loss", counted)
    ours, truth = (
        sum_of(case, engine=engine, use_weighting=weighting) for engine in ("triton", "torch")
    )
    for step, batch in enumerate(batches(case, torch.float32)):
        exact = in_float64(batch)
        for each in (ours, truth):
            each.train(step != 2)
        found, wanted = ours.from_logps(batch), truth.from_logps(exact)
        (slope,) = torch.autograd.grad(found.loss, batch.policy)
        (true_slope,) = torch.autograd.grad(wanted.loss, exact.policy)
        for one, other in (
            (found.losses, wanted.losses),
            (found.loss, wanted.loss),
            (slope, true_slope),
        ):
            assert one.dtype == torch.float32
            assert (one - other).abs().max() <= 3e-6 * max(1.0, other.abs().max().item())
        assert found.metrics.keys() == wanted.metrics.keys()
    by_term = launched[: len(SUMS[case])]
    formed = {"dpo", "ipo", "simpo", "gamma-dpo", "gamma-simpo", "alpha-dpo", "dro"}
    assert by_term == [name in formed for name, _, _ in SUMS[case]]
    if truth.statistics is not None:
        assert ours.statistics.nonfinite == truth.statistics.nonfinite == 0


def test_weights_of_pairs_reach_every_term_that_has_not_the_same():
    batch = random_batch(8)
    factors = OnPolicyWeights()(batch)
    loss_fn = fp.PreferenceLoss("0.5 simpo + wpo + sft", use_weighting=True)
    simpo, wpo, sft = (
        fp.PreferenceLoss(name).from_logps(batch) for name in ("simpo", "wpo", "sft")
    )
    wanted = 0.5 * factors * simpo.losses + wpo.losses + factors * sft.losses
    found = loss_fn.from_logps(batch)
    torch.testing.assert_close(found.losses, wanted)
    torch.testing.assert_close(found.loss, wanted.mean())
    assert "collision" in loss_fn.loss.wants and "use_weighting=True" in repr(loss_fn)
    alike = fp.PreferenceLoss("dpo", use_weighting=True).from_logps(batch)
    torch.testing.assert_close(alike.losses, wpo.losses)
    for name in ("madpo", "omni-dpo"):
        own = fp.PreferenceLoss(name).from_logps(batch)
        both = fp.PreferenceLoss(name, use_weighting=True).from_logps(batch)
        torch.testing.assert_close(both.losses, factors * own.losses)
    for name in ("dr-dpo", "aot", "kto"):
        with pytest.raises(ValueError, match=f"use_weighting: got True with {name}, needs"):
            fp.PreferenceLoss(name, use_weighting=True)


@pytest.mark.parametrize("nll", ["token_mean", "sequence_mean", "sum"])
def test_a_likelihood_of_every_kind_beside_a_preference(nll):
    """RPO's α·NLL is the mean over completions, SimPO's and TRL's that over tokens."""
    batch = random_batch(8)
    (chosen, rejected), tokens = batch.policy.chunk(2), batch.lengths[:4]
    ratios = chosen - batch.reference[:4] - (rejected - batch.reference[4:])
    means = chosen / tokens - rejected / batch.lengths[4:]
    likelihood = {
        "token_mean": chosen.sum() / tokens.sum(),
        "sequence_mean": (chosen / tokens).mean(),
        "sum": chosen.mean(),
    }[nll]
    terms = [
        ("dpo", -logsigmoid(0.1 * ratios).mean()),
        ("simpo", -logsigmoid(2.5 * means - 1).mean()),
    ]
    for name, preference_term in terms:
        found = fp.PreferenceLoss(f"{name} + 0.3 nll", nll=nll).from_logps(batch).loss
        wanted = preference_term - 0.3 * likelihood
        slopes = [
            torch.autograd.grad(each, batch.policy, retain_graph=True)[0]
            for each in (found, wanted)
        ]
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
        torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-15)


def test_sums_of_other_losses_are_refused():
    pairs, points = PairwiseLoss(find("dpo").build().reward), find("dro").build()
    assert isinstance(points, DirectRewardLoss)
    with pytest.raises(ValueError, match="without terms"):
        WeightedSum(())
    with pytest.raises(ValueError, match="got a, on pairs, with b, on single completions"):
        WeightedSum((Term("a", pairs), Term("b", points)))
    with pytest.raises(ValueError, match=r"got terms named \['a', 'a'\], wanted another name"):
        WeightedSum((Term("a", pairs), Term("a", pairs)))
    with pytest.raises(ValueError, match="weight of a: got nan"):
        Term("a", pairs, float("nan"))
    with pytest.raises(ValueError, match="summary: got NoneType"):
        sum_of("statistics").loss(random_batch(4))
    with pytest.raises(ValueError, match="0.8 dpo .* needs `reference`"):
        sum_of("MPO").from_logps(fp.LogpBatch(vector(-1, -2), torch.arange(2)))


@pytest.mark.slow
def test_a_compiled_sum_is_compiled_once():
    torch.compiler.reset()
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    loss_fn, plain = (fp.PreferenceLoss("alpha-dpo + 0.5 beta-dpo") for _ in range(2))
    compiled, seen = torch.compile(loss_fn.from_logps, backend=count), []
    for step in range(4):
        got, wanted = (each(random_batch(8, step)) for each in (compiled, plain.from_logps))
        torch.testing.assert_close(got.losses, wanted.losses)
        seen.append(len(graphs))
    assert 0 < seen[0] == seen[-1]
