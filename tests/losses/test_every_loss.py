"""What every registered loss must do: gradients, dtypes, edges."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from loss_cases import VARIANTS, compute, held, random_batch

from fused_prefopt.losses import available_losses, find
from fused_prefopt.types import LogpBatch

FIELDS = tuple(sorted(random_batch().given))
REGISTERED = available_losses()
PAIRWISE = [name for name, info in REGISTERED.items() if info.pairwise]
STATEFUL = [name for name, info in REGISTERED.items() if info.stateful]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_gradcheck(name, options):
    loss = find(name).build(**options)
    batch = random_batch()
    statistics = loss.statistics()
    summary = None if statistics is None else statistics(loss.observe(batch))
    # Finite differences would see through a stopped gradient: hold what is stopped.
    stopped = held(loss, batch, summary)

    def value(policy: torch.Tensor) -> torch.Tensor:
        return stopped(dataclasses.replace(batch, policy=policy), summary).loss

    assert torch.autograd.gradcheck(value, (batch.policy,), eps=1e-6, atol=1e-8, rtol=1e-6)
    (wanted,) = torch.autograd.grad(value(batch.policy), batch.policy)
    (found,) = torch.autograd.grad(loss(batch, summary).loss, batch.policy)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", REGISTERED)
def test_only_the_loss_carries_a_gradient(name):
    result = compute(find(name).build(), random_batch())
    assert result.loss.requires_grad and result.losses.requires_grad
    extras = [result.rewards, result.target_margins, *result.metrics.values()]
    assert not any(value.requires_grad for value in extras if value is not None)
    assert all(value.dim() == 0 for value in result.metrics.values())


@pytest.mark.parametrize("name", REGISTERED)
def test_dtype_of_the_batch(name):
    for dtype in (torch.float32, torch.float64):
        result = compute(find(name).build(), random_batch(dtype=dtype))
        tensors = [result.loss, result.losses, result.rewards, *result.metrics.values()]
        assert {tensor.dtype for tensor in tensors} == {dtype}


@pytest.mark.parametrize("name", REGISTERED)
def test_inputs_are_left_alone_and_runs_are_equal(name):
    batch, untouched = random_batch(), random_batch()
    first = compute(find(name).build(), batch)
    second = compute(find(name).build(), batch)
    assert torch.equal(first.losses, second.losses)
    for field in FIELDS:
        assert torch.equal(getattr(batch, field), getattr(untouched, field))


EXTREMES = [
    (0.0, -3.0, -2.0, 0.0),
    (-1e-12, -3.0, -2.0, -1e-12),
    (-1e4, -3.0, -2.0, -1e4),
    (-1e-12, -1e4, -1e4, -1e-12),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logps", EXTREMES, ids=str)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_extreme_log_probs_stay_finite(name, options, logps, dtype):
    policy = torch.tensor(logps, dtype=dtype, requires_grad=True)
    lengths = torch.tensor([0 if logp == 0 else 3 for logp in logps])
    batch = dataclasses.replace(random_batch(4, dtype=dtype), policy=policy, lengths=lengths)
    result = compute(find(name).build(**options), batch)
    assert result.losses.isfinite().all() and result.loss.isfinite()
    (gradient,) = torch.autograd.grad(result.loss, policy)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_two_empty_completions_are_a_pair(name, options):
    zeros = torch.zeros(2, dtype=torch.float64)
    batch = dataclasses.replace(
        random_batch(2),
        policy=zeros.clone().requires_grad_(),
        lengths=torch.zeros(2, dtype=torch.int64),
        reference=zeros,
        sequence_kl=zeros,
        collision=zeros,
    )
    result = compute(find(name).build(**options), batch)
    assert result.loss.isfinite() and result.rewards.isfinite().all()
    (gradient,) = torch.autograd.grad(result.loss, batch.policy)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", REGISTERED)
def test_an_empty_completion_has_the_mean_of_its_sum(name):
    batch = random_batch()
    lengths, policy = batch.lengths.clone(), batch.policy.detach().clone()
    reference = batch.reference.clone()
    policy[[1, 6]], reference[[1, 6]] = 0, 0
    batch = dataclasses.replace(batch, policy=policy.requires_grad_(), reference=reference)
    rewards = []
    for tokens in (0, 1):
        lengths[[1, 6]] = tokens
        result = compute(find(name).build(), dataclasses.replace(batch, lengths=lengths))
        assert result.loss.isfinite()
        assert torch.autograd.grad(result.loss, policy)[0].isfinite().all()
        rewards.append(result.rewards)
    assert torch.equal(*rewards)


@pytest.mark.parametrize("name", REGISTERED)
def test_single_pair(name):
    batch = random_batch(2)
    result = compute(find(name).build(), batch)
    assert result.losses.isfinite().all()
    assert all(value.isfinite() for value in result.metrics.values())
    assert torch.autograd.grad(result.loss, batch.policy)[0].isfinite().all()


@pytest.mark.parametrize("name", REGISTERED)
def test_no_sequences(name):
    batch = random_batch(0)
    result = compute(find(name).build(), batch)
    assert result.loss.item() == 0 and result.losses.shape == (0,)
    assert torch.autograd.grad(result.loss, batch.policy)[0].shape == (0,)


@pytest.mark.parametrize("name", REGISTERED)
def test_nan_stays_in_its_pair(name):
    clean = random_batch(8)
    if REGISTERED[name].pairwise:
        keep, bad = torch.tensor([0, 1, 3, 4, 5, 7]), 2
    else:
        keep, bad = torch.tensor([0, 1, 3, 4, 5, 6, 7]), 2
    poisoned = clean.policy.detach().clone()
    poisoned[bad] = math.nan
    dirty = dataclasses.replace(clean, policy=poisoned)
    parts = {field: getattr(clean, field)[keep] for field in FIELDS if field != "kl"}
    parts["kl"] = clean.kl
    loss = find(name).build()
    first, second = loss.statistics(), loss.statistics()
    got, wanted = compute(loss, dirty, first), compute(loss, LogpBatch(**parts), second)
    others = [i for i in range(got.losses.shape[0]) if i != bad]
    torch.testing.assert_close(got.losses[others], wanted.losses, rtol=1e-12, atol=1e-12)
    assert got.losses[bad].isnan() and got.metrics["nonfinite"].item() == 1
    later = random_batch(6, seed=1)
    torch.testing.assert_close(
        compute(loss, later, first).losses,
        compute(loss, later, second).losses,
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("name", STATEFUL)
def test_statistics_see_no_graph(name):
    assert not find(name).build().observe(random_batch()).requires_grad


@pytest.mark.parametrize("name", STATEFUL)
def test_accumulated_gradients_are_the_sum_of_the_micro_batches(name):
    loss = find(name).build()
    micro = [random_batch(4, seed=seed) for seed in range(3)]
    apart, together = loss.statistics(), loss.statistics()
    wanted = []
    for batch in micro:
        result = compute(loss, batch, apart)
        wanted.append(torch.autograd.grad(result.loss, batch.policy)[0])
    # All forwards before the first backward: later updates must not reach into earlier graphs.
    results = [compute(loss, batch, together) for batch in micro]
    sum(result.loss for result in results).backward()
    for batch, gradient in zip(micro, wanted, strict=True):
        torch.testing.assert_close(batch.policy.grad, gradient, rtol=1e-14, atol=0)
    for key, value in apart.state_dict().items():
        torch.testing.assert_close(
            value, together.state_dict()[key], rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("name", [name for name in STATEFUL if name in PAIRWISE])
def test_missing_summary(name):
    with pytest.raises(ValueError, match="summary: got NoneType"):
        find(name).build()(random_batch())


@pytest.mark.parametrize("name", PAIRWISE)
def test_odd_number_of_sequences(name):
    with pytest.raises(ValueError, match="7 sequences, wanted an even number"):
        find(name).build().observe(random_batch(7))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_cuda_never_waits_and_agrees_with_cpu(name, options):
    loss = find(name).build(**options)
    batch = random_batch()
    wanted = compute(loss, batch)
    fields = {field: getattr(batch, field).detach().cuda() for field in FIELDS}
    fields["policy"].requires_grad_()
    statistics = loss.statistics()
    if statistics is not None:
        statistics.cuda()
    compute(loss, LogpBatch(**fields), copy.deepcopy(statistics))
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = compute(loss, LogpBatch(**fields), statistics)
        got.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.losses.cpu(), wanted.losses, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(wanted.loss, batch.policy)
    torch.testing.assert_close(fields["policy"].grad.cpu(), gradient, rtol=1e-12, atol=1e-15)
