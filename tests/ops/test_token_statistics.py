"""Entropy, collision, mean logit and correctness of tokens against eager float64."""

from __future__ import annotations

import pytest
import torch
from policies import moved
from truth import SMALLEST, TRANSFORMS, aligned, make_case, true_logits

from fused_prefopt import token_logps, token_statistics

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("workspace_mb", [256, SMALLEST])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.usefixtures("tiny_tiles")
def test_against_float64(dtype, transform, workspace_mb):
    case = make_case(3, 9, 12, 41, dtype=dtype, **TRANSFORMS[transform])
    # Every other label is the most likely token, where a random one hardly ever is.
    likely = true_logits(case.double()).argmax(-1)
    case.labels[:, 2::2] = likely[:, 1:-1:2].where(case.labels[:, 2::2] != -100, -100)
    got = token_statistics(case.hidden, case.head, case.labels, workspace_mb=workspace_mb)
    logits = true_logits(case.double())
    logps = logits.log_softmax(-1)
    tolerance = {"rtol": 1e-5, "atol": TOLERANCE[dtype]}
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


def test_no_gradient_and_the_same_log_probs_as_the_op():
    case = make_case()
    case.hidden.requires_grad_()
    got = token_statistics(case.hidden, case.head, case.labels)
    assert not got.logps.requires_grad
    assert torch.equal(got.logps, token_logps(case.hidden, case.head, case.labels).detach())


def test_the_packed_layout():
    case = make_case(3, 6)
    ids = torch.arange(3).repeat_interleave(6)
    packed = token_statistics(
        case.hidden.flatten(0, 1), case.head, case.labels.flatten(), sequence_ids=ids
    )
    padded = token_statistics(case.hidden, case.head, case.labels)
    assert torch.equal(packed.entropies, padded.entropies.flatten())
    assert torch.equal(packed.correct, padded.correct.flatten())


def test_nothing_labelled():
    case = make_case()
    got = token_statistics(case.hidden, case.head, torch.full_like(case.labels, -100))
    assert not got.entropies.any() and not got.correct.any()


def test_a_uniform_distribution_has_the_entropy_of_its_size():
    got = token_statistics(
        torch.zeros(1, 2, 4), torch.randn(50, 4), torch.tensor([[3, 7]]), shift=False
    )
    torch.testing.assert_close(got.entropies, torch.full((1, 2), 50.0).log())
