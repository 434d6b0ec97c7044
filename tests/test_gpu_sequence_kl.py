"""On a GPU: `sequence_kl` of every engine against float64, bit-equal runs, bounded memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from divergences import Two, computed_kl, make_two, ours, true_kl, weights_of
from truth import TRANSFORMS, Case, assert_gradients, largest_error, leaves_of

from fused_prefopt import sequence_kl
from fused_prefopt.ops.engines import ENGINES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
# Sums of up to 13 tokens absolute in nats, gradients relative (Frobenius), against float64.
TOLERANCE = {
    torch.float32: (6e-5, 3e-6),
    torch.float16: (6e-5, 1e-3),
    torch.bfloat16: (6e-5, 4e-3),
}


def on_device(two: Two) -> Two:
    def moved(case: Case) -> Case:
        bias = None if case.bias is None else case.bias.cuda()
        tensors = {"hidden": case.hidden.cuda(), "weight": case.weight.cuda(), "bias": bias}
        return replace(case, **tensors, labels=case.labels.cuda())

    return Two(*(moved(case) for case in two))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_engines_match_float64(engine, transform, dtype):
    two = make_two(5, 14, 64, 1031, transform=transform, other="bias", dtype=dtype)
    two, (values, gradients) = on_device(two), TOLERANCE[dtype]
    weights = weights_of(two).cuda()
    got, truth = computed_kl(two, weights=weights, engine=engine), true_kl(two, weights=weights)
    assert largest_error(got.sums, truth.sums) <= values
    assert_gradients(got, truth, gradients)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_runs_are_bit_equal_and_do_not_wait(engine):
    two = on_device(make_two(4, 33, 64, 1031, transform="all", dtype=torch.bfloat16))
    count = int((two.policy.labels[:, 1:] != -100).sum())

    def run() -> list[torch.Tensor]:
        case = leaves_of(two.policy, (True, True, True))
        out = ours(two._replace(policy=case), engine=engine, num_labels=count)
        loss = (out.kl - out.policy).sum()
        return [out.kl.detach(), *torch.autograd.grad(loss, (case.hidden, case.weight, case.bias))]

    first = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("engine", ENGINES)
def test_memory_stays_within_the_workspace(engine):
    rows, vocab, size, mebibyte = 8192, 65_536, 256, 2**20
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    hidden, weight = draw(1, rows, size).requires_grad_(), draw(vocab, size).requires_grad_()
    others = draw(1, rows, size), draw(vocab, size)
    labels = torch.randint(vocab, (1, rows), generator=generator, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = sequence_kl(hidden, weight, *others, labels, engine=engine, workspace_mb=128)
    (out.kl + out.policy).sum().backward()
    gradients = hidden.grad.nbytes + weight.grad.nbytes
    extra = torch.cuda.max_memory_allocated() - before - gradients
    assert extra <= 2 * 128 * mebibyte
