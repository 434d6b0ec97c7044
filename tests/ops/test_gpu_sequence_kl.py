"""On a GPU: `sequence_kl` of every engine against float64, bit-equal runs, bounded memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from divergences import Two, computed_kl, make_two, near, ours, true_kl, weights_of
from rounding import bound_of, gradient_bound
from truth import TRANSFORMS, Case, assert_gradients, largest_error, leaves_of

from fused_prefopt import sequence_kl
from fused_prefopt.ops.engines import ENGINES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
DEVICE = "cuda"
MIB = 2**20
CHOICES = (*ENGINES, "auto")
# What the statistics of a row and its place in the batch take.
ROW_BYTES = 256
# Sums of up to 13 tokens absolute in nats, gradients relative (Frobenius), against float64.
TOLERANCE = {
    torch.float32: (6e-5, 3e-6),
    torch.float16: (6e-5, 1e-3),
    torch.bfloat16: (6e-5, 4e-3),
}


def on_device(two: Two) -> Two:
    def moved(case: Case) -> Case:
        bias = None if case.bias is None else case.bias.to(DEVICE)
        hidden, weight, labels = (t.to(DEVICE) for t in (case.hidden, case.weight, case.labels))
        return replace(case, hidden=hidden, weight=weight, bias=bias, labels=labels)

    return Two(*(moved(case) for case in two))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_engines_match_float64(engine, transform, dtype):
    two = make_two(5, 14, 64, 1031, transform=transform, other="bias", dtype=dtype)
    two, (values, gradients) = on_device(two), TOLERANCE[dtype]
    weights = weights_of(two).to(DEVICE)
    got, truth = computed_kl(two, weights=weights, engine=engine), true_kl(two, weights=weights)
    assert largest_error(got.sums, truth.sums) <= values
    assert_gradients(got, truth, gradients)


@pytest.mark.parametrize("engine", CHOICES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_deep_heads_match_float64(engine, dtype):
    two = on_device(near(make_two(1, 9, 4096, 301, dtype=dtype), 0.1))
    weights = weights_of(two).to(DEVICE)
    got, truth = computed_kl(two, weights=weights, engine=engine), true_kl(two, weights=weights)
    # Σ_v q_v (log q_v − log p_v) moves by what both log-probs are off, and by the error of each q_v
    # times how far its term lies from their sum: less than twice the divergence in all.
    tokens = two.policy.labels.shape[1] + truth.sums.max().item()
    assert largest_error(got.sums, truth.sums) <= 2 * tokens * bound_of(two.policy)
    assert_gradients(got, truth, gradient_bound(two.policy, TOLERANCE[dtype][1]))


@pytest.mark.parametrize("engine", CHOICES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_two_runs_are_bit_equal_and_do_not_wait(engine, dtype):
    two = on_device(make_two(4, 33, 64, 1031, transform="all", dtype=dtype))
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


@pytest.mark.parametrize("engine", CHOICES)
@pytest.mark.parametrize("workspace_mb", [128, 256])
def test_memory_stays_within_the_workspace(engine, workspace_mb):
    rows, vocab, size = 8192, 65_536, 256
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).bfloat16()

    hidden, weight = draw(1, rows + 1, size).requires_grad_(), draw(vocab, size).requires_grad_()
    others = draw(1, rows + 1, size), draw(vocab, size)
    labels = torch.randint(vocab, (1, rows + 1), generator=generator, device=DEVICE)

    def run() -> list[torch.Tensor]:
        options = {"engine": engine, "workspace_mb": workspace_mb, "num_labels": rows}
        out = sequence_kl(hidden, weight, *others, labels, **options)
        return list(torch.autograd.grad((out.kl + out.policy).sum(), (hidden, weight)))

    # The library's own workspace, which it allocates once, is not the op's.
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    gradients = sum(gradient.nbytes for gradient in kept)
    allowed = workspace_mb * MIB + 4 * rows * size + gradients + ROW_BYTES * rows
    assert extra <= allowed, f"{(extra - allowed) / MIB:.1f} MiB beyond"
