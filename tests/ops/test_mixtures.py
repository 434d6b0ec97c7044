"""Log-probs under mixtures of two heads' logits, by `sequence_kl`, against eager float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from divergences import Two, by_token, make_two, ours
from machines import OP, SIZES, dtypes
from test_kl import PAIRS, SUMS, TORCH
from truth import (
    SMALLEST,
    covering,
    largest_error,
    leaves_of,
    make_case,
    on_engines,
    picked,
    true_logits,
)
from waits import LargestTensor

from fused_prefopt import LowRank, sequence_kl

EPSILON = 0.3


def true_mixtures(two: Two, epsilon: float = EPSILON, *, shift: bool = True) -> torch.Tensor:
    """(2, S, T) of the labels under softmax((1 ± ε) z ∓ ε r), in float64."""
    two = two.double()
    logits, others = (true_logits(case) for case in two)
    labels = two.policy.labels
    if shift:
        labels, logits, others = labels[:, 1:], logits[:, :-1], others[:, :-1]
    banned = logits.isneginf()
    found = []
    for own in (1 + epsilon, 1 - epsilon):
        mixed = (own * logits + (1 - own) * others).masked_fill(banned, -math.inf)
        found.append(picked(mixed.log_softmax(-1), labels))
    return torch.stack(found)


def mixtures(two: Two, epsilon: float = EPSILON, **options) -> torch.Tensor:
    out = ours(two, perturbation=epsilon, **options)
    return torch.stack([out.extrapolated, out.interpolated])


def tokens(two: Two, **options) -> torch.Tensor:
    """(2, S, T): each row is a sequence of its own."""
    out = by_token(two, perturbation=EPSILON, **options)
    return torch.stack([out.extrapolated, out.interpolated]).view(2, *two.policy.labels.shape)


@pytest.mark.parametrize(
    ("heads", "dtype", "workspace_mb"), covering(PAIRS, list(TORCH), [256, SMALLEST])
)
@pytest.mark.usefixtures("tiny_tiles")
def test_tokens_match_float64(heads, dtype, workspace_mb):
    two = make_two(transform=heads[0], other=heads[1], dtype=dtype, largest=15.0)
    got = tokens(two, workspace_mb=workspace_mb)
    assert largest_error(got, true_mixtures(two, shift=False)) <= 2 * TORCH[dtype][0]


@pytest.mark.interpreted
@pytest.mark.executed
@pytest.mark.parametrize(
    ("heads", "dtype", "size"),
    covering([*PAIRS[:-1], ("all", "softcap")], dtypes(*OP), SIZES),
)
def test_the_engine_of_kernels_matches_float64(heads, dtype, size):
    two = make_two(*size, transform=heads[0], other=heads[1], dtype=dtype, largest=15.0)
    got, truth = mixtures(two, engine="cublas"), true_mixtures(two).sum(2)
    assert largest_error(got, truth) <= 2 * SUMS * size[1] / 13


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (3, 5, 11, 37), (1, 9, 33, 64)])
@pytest.mark.usefixtures("tiny_tiles")
def test_ragged_shapes_in_many_tiles_of_kernels(shape):
    two = make_two(*shape, largest=9.0)
    got = mixtures(two, engine="triton", workspace_mb=SMALLEST)
    assert largest_error(got, true_mixtures(two).sum(2)) <= 1e-4


@pytest.mark.parametrize(
    ("engine", "dtype"),
    on_engines(
        [("torch", torch.float32), ("torch", torch.bfloat16), ("torch", torch.float64)]
        + [("triton", torch.float32)]
    ),
)
def test_a_model_is_its_own_mixture(engine, dtype):
    policy = make_case(3, 9, 16, 71, dtype=dtype, largest=30.0, bias=True, softcap=25.0)
    out = ours(Two(policy, policy), engine=engine, perturbation=0.01)
    assert torch.equal(out.extrapolated, out.policy) and torch.equal(out.interpolated, out.policy)


@pytest.mark.parametrize("perturbation", [None, EPSILON])
def test_what_else_the_pass_returns_and_its_gradients_stay_as_they_are(perturbation):
    two = make_two(4, 9, 13, 43, transform="all", other="bias")
    found = []
    for each in (None, perturbation):
        case = leaves_of(two.policy, (True, True, True))
        out = ours(two._replace(policy=case), perturbation=each)
        grads = torch.autograd.grad(
            (out.kl * out.policy).sum(), [case.hidden, case.weight, case.bias]
        )
        found.append((out.kl, out.policy, out.reference, out.lengths, *grads))
        given = (out.extrapolated, out.interpolated)
        assert all((value is None) == (each is None) for value in given)
        assert each is None or not any(value.requires_grad for value in given)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("engine", on_engines(["torch", "triton"]))
def test_low_rank_terms_packed_rows_and_weights_of_tokens(engine):
    two = make_two(4, 9, transform="all", other="bias")
    policy, reference = two
    generator = torch.Generator().manual_seed(5)
    heads, wide = [], []
    for case in two:
        a = torch.randn(3, case.weight.shape[1], generator=generator)
        b = torch.randn(case.weight.shape[0], 3, generator=generator) / 3
        heads.append(replace(case.head, low_rank=(LowRank(a, b, 0.4),)))
        merged = case.weight.double() + 0.4 * b.double() @ a.double()
        wide.append(replace(case.double(), weight=merged))
    truth = true_mixtures(Two(*wide))
    weights = torch.rand(policy.labels.shape, generator=generator)
    out = sequence_kl(
        policy.hidden.flatten(0, 1),
        heads[0],
        reference.hidden.flatten(0, 1),
        heads[1],
        policy.labels.flatten(),
        sequence_ids=torch.arange(4).repeat_interleave(9),
        num_sequences=5,
        token_weights=weights.flatten(),
        perturbation=EPSILON,
        engine=engine,
    )
    wanted = (truth * weights[:, 1:].double()).sum(2)
    for got, each in zip((out.extrapolated, out.interpolated), wanted, strict=True):
        assert largest_error(got[:4], each) <= 1e-4
        assert got[4] == 0


@pytest.mark.parametrize("engine", on_engines(["torch", "triton"]))
@pytest.mark.usefixtures("tiny_tiles")
def test_tokens_that_a_model_may_not_say(engine):
    two = make_two(3, 5, transform="bias", other="bias", labelled=1.0)
    two.policy.labels.clamp_(min=7)
    two.policy.bias[2:5] = -math.inf
    two.reference.bias[3:5] = -math.inf
    got = mixtures(two, engine=engine, workspace_mb=SMALLEST)
    assert largest_error(got, true_mixtures(two).sum(2)) <= 1e-4
    # (1 + ε) z − ε r is infinite where r is −inf; the policy's share of it is none for the other.
    two.reference.bias[1] = -math.inf
    got = mixtures(two, engine=engine, workspace_mb=SMALLEST)
    assert got[0].isnan().all()
    assert largest_error(got[1], true_mixtures(two)[1].sum(1)) <= 1e-4


def test_nan_stays_in_its_own_sequence():
    two = make_two(4, 5, labelled=1.0)
    clean = mixtures(two)
    two.reference.hidden[2, 1] = math.nan
    got, others = mixtures(two), [0, 1, 3]
    assert got[:, 2].isnan().all()
    assert torch.equal(got[:, others], clean[:, others])


def test_no_tensor_of_tokens_by_vocabulary():
    two = make_two(1, 401, 8, 1000, labelled=1.0)
    with LargestTensor() as largest:
        mixtures(two, workspace_mb=0.25)
    assert largest.entries <= 400 * 1000 / 8


@pytest.mark.parametrize("value", [0, 1, -0.1, math.nan, "0.1"])
def test_a_perturbation_out_of_range(value):
    with pytest.raises(ValueError, match="perturbation: got"):
        ours(make_two(), perturbation=value)
