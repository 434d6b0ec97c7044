"""Entropies of tokens with their gradients, and further statistics, against eager float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from machines import OP, SIZES, dtypes
from policies import moved, policies
from truth import (
    KERNEL_ENGINES,
    SMALLEST,
    TRANSFORMS,
    aligned,
    assert_gradients,
    covering,
    largest_error,
    leaves_of,
    make_case,
    needs_of,
    true_logits,
)

from fused_prefopt import LMHead, LowRank, token_logps, token_policy, token_statistics

VALUES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
STATISTICS = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float64: 1e-12}
GRADIENTS = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("workspace_mb", [256, SMALLEST])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", list(VALUES))
@pytest.mark.usefixtures("tiny_tiles")
def test_policies_match_float64(dtype, transform, workspace_mb):
    case = make_case(3, 9, 12, 41, dtype=dtype, largest=12.0, **TRANSFORMS[transform])
    got, truth = policies(case, needs_of("recompute"), workspace_mb=workspace_mb)
    assert largest_error(got.sums, truth.sums) <= VALUES[dtype]
    assert largest_error(got.tokens, truth.tokens) <= VALUES[dtype]
    assert_gradients(got, truth, GRADIENTS[dtype])


@pytest.mark.interpreted
@pytest.mark.executed
@pytest.mark.parametrize(
    ("how", "transform", "dtype", "size"),
    covering(product(KERNEL_ENGINES, [256, SMALLEST]), TRANSFORMS, dtypes(*OP), SIZES),
)
def test_policies_of_kernels_match_float64(how, transform, dtype, size):
    engine, workspace_mb = how
    case = make_case(*size, dtype=dtype, largest=12.0, **TRANSFORMS[transform])
    got, truth = policies(case, needs_of("recompute"), engine=engine, workspace_mb=workspace_mb)
    assert largest_error(got.sums, truth.sums) <= 1e-5
    assert largest_error(got.tokens, truth.tokens) <= 1e-5
    assert_gradients(got, truth, OP[dtype][1])


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False)])
def test_part_of_the_tensors(needs):
    got, truth = policies(make_case(bias=True, largest=8.0), needs)
    assert_gradients(got, truth, 2e-5)


def test_a_low_rank_term():
    case = make_case(largest=6.0, dtype=torch.float64).double()
    torch.manual_seed(0)
    a, b = torch.randn(2, 11).double() / 4, torch.randn(29, 2).double() / 4
    terms = [value.clone().requires_grad_() for value in (a, b)]
    head = LMHead(case.weight, low_rank=(LowRank(*terms, scaling=0.5),))
    policy = token_policy(case.hidden, head, case.labels)
    (policy.logps.sum() + 0.3 * policy.entropies.sum()).backward()
    eager = [value.clone().requires_grad_() for value in (a, b)]
    logits = case.hidden @ (case.weight + 0.5 * eager[1] @ eager[0]).t()
    logps = logits.log_softmax(-1)
    entropies = moved(-(logps.exp() * logps).sum(-1), case.labels)
    (aligned(logps, case.labels).sum() + 0.3 * entropies.sum()).backward()
    for ours, wanted in zip(terms, eager, strict=True):
        torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-10, atol=1e-11)


def test_log_probs_are_those_of_token_logps():
    case = leaves_of(make_case(), (True, True, False))
    policy = token_policy(case.hidden, case.head, case.labels)
    wanted = token_logps(case.hidden, case.head, case.labels, path="recompute")
    torch.testing.assert_close(policy.logps, wanted, rtol=0, atol=1e-6)
    ours = torch.autograd.grad(policy.logps.sum(), case.hidden)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(wanted.sum(), case.hidden)[0])


def test_probabilities_of_zero_add_nothing():
    # exp(-2000) is 0, and its logarithm must not meet it as 0 · inf.
    hidden = torch.tensor([[[50.0, 0.0], [1e-36, 1.0]]], requires_grad=True)
    weight = torch.tensor([[40.0, 1.0], [-40.0, 2.0], [-1e36, 3.0]], requires_grad=True)
    policy = token_policy(hidden, weight, torch.tensor([[0, 0]]), shift=False)
    policy.entropies.sum().backward()
    assert 0 <= policy.entropies[0, 0] < 1e-15 and policy.entropies[0, 1] > 0
    assert bool(hidden.grad.isfinite().all()) and bool(weight.grad.isfinite().all())


def test_the_gradient_by_entropies_alone_has_no_part_along_the_uniform_direction():
    case = leaves_of(make_case(bias=True), (True, True, True))
    token_policy(case.hidden, case.head, case.labels).entropies.sum().backward()
    assert abs(float(case.bias.grad.sum())) < 1e-4 < float(case.bias.grad.abs().sum())


def test_nothing_labelled_gives_zeros():
    case = leaves_of(make_case(), (True, True, False))
    policy = token_policy(case.hidden, case.head, torch.full_like(case.labels, -100))
    (policy.logps + policy.entropies).sum().backward()
    assert not policy.entropies.any() and not case.weight.grad.any()


@pytest.mark.parametrize("path", ["local", "stash", "evaluate"])
def test_other_paths_are_refused(path):
    case = leaves_of(make_case(), (True, True, False))
    with pytest.raises(ValueError, match="entropies need 'recompute'"):
        token_policy(case.hidden, case.head, case.labels, path=path)


@pytest.mark.parametrize("workspace_mb", [256, SMALLEST])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", list(STATISTICS))
@pytest.mark.usefixtures("tiny_tiles")
def test_statistics_match_float64(dtype, transform, workspace_mb):
    case = make_case(3, 9, 12, 41, dtype=dtype, **TRANSFORMS[transform])
    # Every other label is the most likely token, where a random one hardly ever is.
    likely = true_logits(case.double()).argmax(-1)
    case.labels[:, 2::2] = likely[:, 1:-1:2].where(case.labels[:, 2::2] != -100, -100)
    got = token_statistics(case.hidden, case.head, case.labels, workspace_mb=workspace_mb)
    logits = true_logits(case.double())
    logps = logits.log_softmax(-1)
    tolerance = {"rtol": 1e-5, "atol": STATISTICS[dtype]}
    torch.testing.assert_close(got.logps.double(), aligned(logps, case.labels), **tolerance)
    entropies = moved(-(logps.exp() * logps).sum(-1), case.labels)
    torch.testing.assert_close(got.entropies.double(), entropies, **tolerance)
    collisions = moved((2 * logps).logsumexp(-1), case.labels)
    torch.testing.assert_close(got.collisions.double(), collisions, **tolerance)
    means = moved(logits.mean(-1), case.labels)
    torch.testing.assert_close(got.mean_logits.double(), means, **tolerance)
    best = moved(logits.argmax(-1) + 1, case.labels) - 1
    assert torch.equal(got.correct, (best == case.labels) & (best >= 0))
    assert got.correct.any() and not got.correct.all()


def test_statistics_have_no_gradient_and_the_same_log_probs_as_the_op():
    case = make_case()
    case.hidden.requires_grad_()
    got = token_statistics(case.hidden, case.head, case.labels)
    assert not got.logps.requires_grad
    assert torch.equal(got.logps, token_logps(case.hidden, case.head, case.labels).detach())


def test_statistics_of_the_packed_layout():
    case = make_case(3, 6)
    ids = torch.arange(3).repeat_interleave(6)
    packed = token_statistics(
        case.hidden.flatten(0, 1), case.head, case.labels.flatten(), sequence_ids=ids
    )
    padded = token_statistics(case.hidden, case.head, case.labels)
    assert torch.equal(packed.entropies, padded.entropies.flatten())
    assert torch.equal(packed.correct, padded.correct.flatten())


def test_statistics_of_nothing():
    case = make_case()
    got = token_statistics(case.hidden, case.head, torch.full_like(case.labels, -100))
    assert not got.entropies.any() and not got.correct.any()


def test_a_uniform_distribution_has_the_entropy_of_its_size():
    got = token_statistics(
        torch.zeros(1, 2, 4), torch.randn(50, 4), torch.tensor([[3, 7]]), shift=False
    )
    torch.testing.assert_close(got.entropies, torch.full((1, 2), 50.0).log())


@pytest.mark.interpreted
@pytest.mark.executed
@pytest.mark.parametrize(
    ("transform", "size", "dtype"), covering(["plain", "all"], SIZES, dtypes(torch.float32))
)
def test_statistics_of_kernels_equal_the_torch_engines_in_float64(transform, size, dtype):
    case = make_case(*size, dtype=dtype, **TRANSFORMS[transform])
    got, wanted = (
        token_statistics(each.hidden, each.head, each.labels, engine=engine)
        for each, engine in ((case, "triton"), (case.double(), "torch"))
    )
    assert torch.equal(got.correct, wanted.correct)
    for name in ("logps", "entropies", "collisions", "mean_logits"):
        found, right = getattr(got, name).double(), getattr(wanted, name)
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
