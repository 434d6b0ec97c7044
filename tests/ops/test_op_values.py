"""Values of the op: against float64, on every path, with every head transform."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from truth import (
    SMALLEST,
    TRAINING_PATHS,
    TRANSFORMS,
    Case,
    computed,
    largest_error,
    make_case,
    needs_of,
    true_logits,
    true_logps,
    true_result,
)

from fused_prefopt import LMHead, sequence_logps, token_logps

PATHS = ("evaluate", *TRAINING_PATHS)
# Ours against float64, per token, at |logit| <= 30.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}
WIDE = {"sequences": 4, "length": 37, "hidden_size": 96, "vocab": 331}


def all_labelled(case: Case) -> Case:
    return replace(case, labels=case.labels.clamp(min=0))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("path", PATHS)
def test_token_logps_at_large_logits_match_float64(path, dtype):
    case = make_case(4, 37, 24, 331, dtype=dtype)
    assert true_logits(case.double()).abs().max() > 29.5
    truth = true_result(case, needs=needs_of(path))
    got = computed(case, needs=needs_of(path), path=path)
    assert largest_error(got.tokens, truth.tokens) <= TOLERANCE[dtype]
    assert largest_error(got.sums, truth.sums) <= TOLERANCE[dtype] * case.labels.shape[1]
    assert got.tokens.dtype == got.sums.dtype == torch.float32


@pytest.mark.parametrize("hidden_size", [96, 500, 896])
def test_fp32_is_as_exact_as_its_matmul(hidden_size):
    # One fp32 matmul of this width may itself be 1.3e-5 off at logits of 30: eager shows how much.
    case = make_case(4, 37, hidden_size, 331)
    truth = true_logps(case.double())
    eager = true_logps(case).double() - truth
    ours = token_logps(case.hidden, case.head, case.labels).double() - truth
    assert ours.abs().max() <= max(1e-5, 1.05 * eager.abs().max())
    assert ours.norm() <= 1.1 * eager.norm()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.usefixtures("tiny_tiles")
def test_every_transform_matches_float64(path, transform):
    case = make_case(**TRANSFORMS[transform], largest=20.0)
    options = {} if path == "local" else {"workspace_mb": SMALLEST}
    truth = true_result(case, needs=needs_of(path))
    got = computed(case, needs=needs_of(path), path=path, **options)
    assert largest_error(got.tokens, truth.tokens) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_half_precision_beats_eager_by_far(transform, dtype):
    case = make_case(**WIDE, **TRANSFORMS[transform], dtype=dtype)
    truth = true_logps(case.double())
    eager = largest_error(true_logps(case), truth)
    ours = largest_error(token_logps(case.hidden, case.head, case.labels), truth)
    assert ours < eager / 100


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_all_paths_agree(transform):
    case = make_case(**TRANSFORMS[transform])
    results = [computed(case, needs=needs_of(path), path=path) for path in PATHS]
    for other in results[1:]:
        assert largest_error(other.tokens, results[0].tokens) <= 4e-6
        assert largest_error(other.sums, results[0].sums) <= 4e-6 * case.labels.shape[1]


@pytest.mark.parametrize("path", PATHS)
def test_float64_inputs_are_computed_in_float64(path):
    case = make_case(dtype=torch.float64, **TRANSFORMS["all"])
    truth, got = (
        true_result(case, needs=needs_of(path)),
        computed(case, needs=needs_of(path), path=path),
    )
    assert got.sums.dtype == got.tokens.dtype == torch.float64
    assert largest_error(got.tokens, truth.tokens) <= 1e-13


@pytest.mark.parametrize("shift", [True, False])
def test_sums_lengths_and_means_follow_from_token_logps(shift):
    case = make_case(5, 9)
    out = sequence_logps(case.hidden, case.head, case.labels, shift=shift)
    tokens = token_logps(case.hidden, case.head, case.labels, shift=shift)
    labelled = case.labels[:, 1:] if shift else case.labels
    assert torch.equal(out.lengths, (labelled != -100).sum(1))
    assert out.lengths.dtype == torch.int64
    assert torch.equal(out.sums, tokens.double().sum(1).float())
    torch.testing.assert_close(out.means, tokens.sum(1) / out.lengths, rtol=1e-6, atol=0)
    if shift:
        assert torch.equal(tokens[:, 0], torch.zeros(5))


def test_sums_of_long_sequences_do_not_drift():
    case = all_labelled(make_case(2, 3001, 4, 17, largest=20.0))
    truth = true_logps(case.double()).sum(1)
    sums = sequence_logps(case.hidden, case.head, case.labels).sums
    assert ((sums.double() - truth).abs() / truth.abs()).max() <= 1e-6


@pytest.mark.parametrize("path", PATHS)
def test_an_empty_completion_gives_zero_sum_length_and_mean(path):
    case = make_case(3, 5)
    labels = case.labels.clone()
    labels[1] = -100
    hidden = case.hidden.requires_grad_(path != "evaluate")
    out = sequence_logps(hidden, case.head, labels, path=path)
    assert (out.sums[1], out.lengths[1], out.means[1]) == (0, 0, 0)
    assert (out.sums[[0, 2]] < 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
def test_two_runs_are_bit_equal(path, dtype):
    case = make_case(**WIDE, dtype=dtype, **TRANSFORMS["all"])
    options = {"needs": needs_of(path), "path": path}
    first, second = computed(case, **options), computed(case, **options)
    assert torch.equal(first.sums, second.sums)
    assert torch.equal(first.tokens, second.tokens)
    for one, other in zip(first.grads, second.grads, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    largest=st.sampled_from([1e-30, 1e-3, 1.0, 30.0, 300.0, 1e4, 1e8, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    path=st.sampled_from(PATHS),
    transform=st.sampled_from(sorted(TRANSFORMS)),
    argmax=st.booleans(),
)
def test_no_logp_is_ever_positive(seed, largest, dtype, path, transform, argmax):
    case = make_case(dtype=dtype, largest=largest, seed=seed, **TRANSFORMS[transform])
    if argmax:  # near one-hot: every label is the likeliest token
        case = replace(case, labels=true_logits(case.double()).argmax(-1))
    got = computed(case, needs=needs_of(path), path=path, shift=False)
    truth = true_logps(case.double(), shift=False)
    assert (got.tokens <= 0).all() and (got.sums <= 0).all()
    finite = truth.abs() < 1e30
    assert got.tokens[finite].isfinite().all()
    for grad in got.grads:
        assert grad is None or not grad.isnan().any()


@pytest.mark.parametrize("path", TRAINING_PATHS)
def test_widely_spread_logits_are_finite_and_right(path):
    case = make_case(3, 7, 11, 200, largest=400.0)  # exp(z − lse) is denormal or zero for most
    truth = true_result(case, needs=needs_of(path))
    got = computed(case, needs=needs_of(path), path=path)
    assert ((got.tokens - truth.tokens).abs() <= 1e-6 * truth.tokens.abs() + 1e-4).all()
    for ours, right in zip(got.grads, truth.grads, strict=True):
        if right is not None:
            torch.testing.assert_close(ours.double(), right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("banned", [slice(20, 25), slice(0, 6), slice(9, 18)])
@pytest.mark.usefixtures("tiny_tiles")
def test_tokens_banned_by_a_bias_of_minus_infinity(path, banned):
    case = make_case(bias=True)
    bias, labels = case.bias.clone(), case.labels.clone()
    bias[banned] = -math.inf
    inside = (labels >= banned.start) & (labels < banned.stop)
    case = replace(case, bias=bias, labels=labels.masked_fill(inside, 8))
    needs = needs_of(path)
    options = {} if path == "local" else {"workspace_mb": SMALLEST}
    truth, got = true_result(case, needs=needs), computed(case, needs=needs, path=path, **options)
    assert got.tokens.isfinite().all()
    assert largest_error(got.tokens, truth.tokens) <= 1e-5
    for ours, right in zip(got.grads, truth.grads, strict=True):
        if right is not None:
            assert (ours.double() - right).norm() <= 2e-6 * right.norm()


def test_the_logp_of_a_banned_token_is_minus_infinity_for_its_sequence_only():
    case = make_case(3, 4, bias=True)
    labels = case.labels.clamp(min=0)
    labels[labels == 5] = 6
    labels[1, 2] = 5
    bias = case.bias.clone()
    bias[5] = -math.inf
    sums = sequence_logps(case.hidden, LMHead(case.weight, bias), labels).sums
    assert sums[1] == -math.inf
    assert sums[[0, 2]].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("packed", [False, True])
def test_nan_stays_in_its_own_sequence(path, packed):
    case = all_labelled(make_case(4, 5))
    poisoned = case.hidden.clone()
    poisoned[2, 1] = math.nan

    def sums(hidden):
        hidden = hidden.clone().requires_grad_(path != "evaluate")
        if not packed:
            return sequence_logps(hidden, case.head, case.labels, path=path).sums
        ids = torch.arange(4).repeat_interleave(5)
        return sequence_logps(
            hidden.flatten(0, 1), case.head, case.labels.flatten(), sequence_ids=ids, path=path
        ).sums

    clean, got = sums(case.hidden), sums(poisoned)
    assert got[2].isnan()
    assert torch.equal(got[[0, 1, 3]], clean[[0, 1, 3]])


def test_nan_in_an_unlabelled_row_is_never_seen():
    case = make_case(3, 6)
    labels = case.labels.clamp(min=0)
    labels[1, 4:] = -100
    poisoned = case.hidden.clone()
    poisoned[1, 3:] = math.nan  # row 3 would predict label 4
    poisoned[0, -1] = math.nan  # the last row predicts nothing
    poisoned.requires_grad_()
    weight = case.weight.requires_grad_()
    out = sequence_logps(poisoned, weight, labels)
    out.sums.sum().backward()
    assert torch.equal(out.sums, sequence_logps(case.hidden, weight, labels).sums)
    assert poisoned.grad.isfinite().all() and weight.grad.isfinite().all()
