"""The op against eager float64: every engine, path, transform and dtype; special numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import OP, SIZES, dtypes, per_machine
from truth import (
    KERNEL_ENGINES,
    PATHS,
    TRAINING_PATHS,
    TRANSFORMS,
    Case,
    assert_right,
    computed,
    covering,
    largest_error,
    leaves_of,
    make_case,
    needs_of,
    nothing_labelled,
    on_engines,
    relative,
    tight,
    true_logits,
    true_logps,
    true_result,
    upstream_of,
)

from fused_prefopt import sequence_logps, token_logps

# Per token in nats at |logit| <= 30, and gradients, relative (Frobenius).
TORCH = {torch.float32: (1e-5, 2e-6), torch.bfloat16: (1e-4, 4e-3), torch.float16: (1e-4, 1e-3)}
WIDE = {"sequences": 4, "length": 37, "hidden_size": 96, "vocab": 331}


def all_labelled(case: Case) -> Case:
    return replace(case, labels=case.labels.clamp(min=0))


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("path", PATHS)
def test_large_logits_match_float64(path, transform, dtype):
    case = make_case(4, 37, 24, 331, dtype=dtype, **TRANSFORMS[transform])
    if transform == "plain":
        assert true_logits(case.double()).abs().max() > 29.5
    values, gradients = TORCH[dtype]
    got = assert_right(case, values, gradients, path=path)
    truth = true_logps(case.double()).sum(1)
    assert largest_error(got.sums, truth) <= values * case.labels.shape[1]
    assert got.tokens.dtype == got.sums.dtype == torch.float32


@pytest.mark.parametrize(
    ("where", "transform", "dtype", "size"),
    # An engine works in another way on each path, and transforms meet both.
    covering(product(KERNEL_ENGINES, PATHS), TRANSFORMS, dtypes(*OP), SIZES),
)
@pytest.mark.interpreted
@pytest.mark.executed
def test_triton_engines_match_float64(where, transform, dtype, size):
    engine, path = where
    case = make_case(*size, dtype=dtype, **TRANSFORMS[transform])
    got = assert_right(case, *OP[dtype], path=path, engine=engine)
    truth = true_logps(case.double()).sum(1)
    assert largest_error(got.sums, truth) <= OP[dtype][0] * case.labels.shape[1]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.usefixtures("tiny_tiles")
def test_every_transform_in_many_tiles(path, transform):
    case = make_case(**TRANSFORMS[transform], largest=20.0)
    assert_right(case, 1e-5, 2e-6, path=path, **tight(path))


@pytest.mark.parametrize("hidden_size", [96, 500, 896])
def test_fp32_is_as_exact_as_its_matmul(hidden_size):
    # One fp32 matmul of this width may itself be 1.3e-5 off at logits of 30: eager shows how much.
    case = make_case(4, 37, hidden_size, 331)
    truth = true_logps(case.double())
    eager = true_logps(case).double() - truth
    ours = token_logps(case.hidden, case.head, case.labels).double() - truth
    assert ours.abs().max() <= max(1e-5, 1.05 * eager.abs().max())
    assert ours.norm() <= 1.1 * eager.norm()


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
    got = assert_right(case, 1e-13, 1e-12, path=path)
    assert got.sums.dtype == got.tokens.dtype == torch.float64


@pytest.mark.interpreted
@pytest.mark.parametrize("engine", KERNEL_ENGINES)
def test_triton_engines_refuse_float64(engine):
    case = make_case(dtype=torch.float64)
    with pytest.raises(ValueError, match="computes in fp32 at most, got float64"):
        sequence_logps(case.hidden, case.head, case.labels, engine=engine)


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


@pytest.mark.parametrize(("engine", "path"), on_engines(product(["torch", *KERNEL_ENGINES], PATHS)))
def test_nothing_labelled(engine, path):
    case = nothing_labelled(make_case(3, 5, bias=True))
    got = computed(case, needs=needs_of(path), path=path, engine=engine)
    assert torch.equal(got.sums, torch.zeros(3)) and torch.equal(got.tokens, torch.zeros(3, 5))
    for grad, need in zip(got.grads, needs_of(path), strict=True):
        assert (grad is None) != need
        assert grad is None or torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize(
    ("engine", "path", "dtype"),
    on_engines(
        [
            *product(["torch"], PATHS, [torch.float32, torch.bfloat16]),
            *product(KERNEL_ENGINES, TRAINING_PATHS, [torch.float32]),
        ]
    ),
)
def test_two_runs_and_a_second_backward_agree_to_the_bit(engine, path, dtype):
    size = (4, 37, 96, 331) if engine == "torch" else (3, 9, 24, 101)
    case = leaves_of(make_case(*size, dtype=dtype, **TRANSFORMS["all"]), needs_of(path))
    leaves = [t for t in (case.hidden, case.weight, case.bias) if t.requires_grad]

    def run() -> list[list[torch.Tensor]]:
        options = {"path": path, "engine": engine}
        tokens = token_logps(case.hidden, case.head, case.labels, **options).detach()
        sums = sequence_logps(case.hidden, case.head, case.labels, **options).sums
        if not leaves:
            return [[tokens, sums]]
        loss = sums.square().sum()
        twice = (torch.autograd.grad(loss, leaves, retain_graph=retain) for retain in (True, False))
        return [[tokens, sums.detach(), *gradients] for gradients in twice]

    first, *others = (*run(), *run())
    for other in others:
        assert all(torch.equal(one, same) for one, same in zip(first, other, strict=True))


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
    case.bias[banned] = -math.inf
    inside = (case.labels >= banned.start) & (case.labels < banned.stop)
    case = replace(case, labels=case.labels.masked_fill(inside, 8))
    assert assert_right(case, 1e-5, 2e-6, path=path, **tight(path)).tokens.isfinite().all()


def test_the_logp_of_a_banned_token_is_minus_infinity_for_its_sequence_only():
    case = make_case(3, 4, bias=True)
    labels = case.labels.clamp(min=0)
    labels[labels == 5] = 6
    labels[1, 2] = 5
    case.bias[5] = -math.inf
    sums = sequence_logps(case.hidden, case.head, labels).sums
    assert sums[1] == -math.inf
    assert sums[[0, 2]].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("packed", [False, True])
def test_nan_stays_in_its_own_sequence(path, packed):
    case = all_labelled(make_case(4, 5))
    poisoned = case.hidden.clone()
    poisoned[2, 1] = math.nan

    def sums(hidden):
        hidden, labels, options = hidden.clone(), case.labels, {}
        if packed:
            options["sequence_ids"] = torch.arange(4).repeat_interleave(5)
            hidden, labels = hidden.flatten(0, 1), labels.flatten()
        hidden.requires_grad_(path != "evaluate")
        return sequence_logps(hidden, case.head, labels, path=path, **options).sums

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


# The interpreter multiplies no bf16 tiles.
NARROW = per_machine(
    [("cublas", torch.bfloat16), ("cublas", torch.float16), ("triton", torch.float16)],
    [each for each in product(KERNEL_ENGINES, dtypes()) if each[1] != torch.float32],
)


@pytest.mark.interpreted
@pytest.mark.executed
@pytest.mark.parametrize(("engine", "dtype"), NARROW)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("transform", "scale"), [("plain", 1.0), ("all", 1.0), ("all", 1e-9)])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_narrow_operands(engine, dtype, path, transform, scale):
    case = make_case(3, 9, 24, 101, dtype=dtype, **TRANSFORMS[transform])
    needs = needs_of(path)
    truth = true_result(case, needs=needs)
    # Master weights in fp32, as under autocast: their gradients can show what fp16 cannot.
    wide = leaves_of(replace(case, weight=case.weight.float()), needs)
    sums = sequence_logps(wide.hidden, wide.head, wide.labels, path=path, engine=engine).sums
    tokens = token_logps(wide.hidden, wide.head, wide.labels, path=path, engine=engine)
    assert largest_error(tokens, truth.tokens) <= 1e-5
    if path == "evaluate":
        return
    of_sums, of_tokens = upstream_of(case)
    loss = (sums.double() * of_sums).sum() + (tokens.double() * of_tokens).sum()
    (loss * scale).backward()
    tolerance = OP[dtype][1]
    if needs[1]:
        assert relative(wide.weight.grad / scale, truth.grads[1]) <= tolerance
    if scale == 1.0:
        assert relative(wide.hidden.grad, truth.grads[0]) <= tolerance


@pytest.mark.interpreted
@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_bf16_gradient_of_the_weight_is_rounded_once():
    case = make_case(3, 40, 24, 101, dtype=torch.bfloat16)
    assert_right(case, 1e-5, 8e-3, path="recompute", engine="cublas", needs=(True, True, False))
