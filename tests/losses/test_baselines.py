"""What the compared methods promise beyond their golden values: identities, limits, edges."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from loss_cases import compute, random_batch

from fused_prefopt.losses import find
from fused_prefopt.types import LogpBatch


def losses(name, batch=None, **options):
    return compute(find(name).build(**options), batch or random_batch()).losses


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(("robust", "plain"), [("robust-dpo", "dpo"), ("robust-simpo", "simpo")])
def test_without_flips_robust_is_plain(robust, plain, unbiased):
    options = {} if plain == "dpo" else {"gamma": 0.7}
    wanted = losses(plain, **options)
    got = losses(robust, epsilon=0.0, unbiased=unbiased, **options)
    torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-14)


def test_losses_without_their_extra_are_dpo():
    wanted = losses("dpo")
    for name, options in (
        ("length-dpo", {"alpha": 0.0}),
        ("odpo", {"alpha": 0.0}),
        ("tdpo2", {"alpha": 0.0}),
    ):
        torch.testing.assert_close(losses(name, **options), wanted, rtol=1e-14, atol=1e-14)


def test_ipo_is_zero_where_the_log_ratios_differ_by_its_target():
    policy = torch.tensor([-3.0, -8.0], dtype=torch.float64)
    batch = LogpBatch(policy, torch.tensor([2, 3]), reference=torch.tensor([-4.0, -4.0]).double())
    # (1) − (−4) = 5 = 1 / (2 τ)
    assert losses("ipo", batch, tau=0.1).item() == pytest.approx(0.0, abs=1e-15)


def test_orpo_by_hand():
    policy, lengths = torch.tensor([-2.0, -6.0]).double(), torch.tensor([2, 3])
    odds = [math.log(math.exp(-x) / (1 - math.exp(-x))) for x in (1.0, 2.0)]
    wanted = 1.0 + 0.1 * math.log1p(math.exp(odds[1] - odds[0]))
    assert losses("orpo", LogpBatch(policy, lengths)).item() == pytest.approx(wanted, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logp", [0.0, -1e-12, -1e-4, -1e4])
@pytest.mark.parametrize("name", ["orpo", "cpo", "slic-hf", "cal-dpo", "ipo", "kto", "tdpo1"])
def test_extreme_log_probs_stay_finite(name, logp, dtype):
    batch = random_batch(4, dtype=dtype)
    policy = torch.tensor([logp, -3.0, -2.0, logp], dtype=dtype, requires_grad=True)
    lengths = torch.tensor([0 if logp == 0 else 5, 3, 4, 0 if logp == 0 else 2])
    result = compute(find(name).build(), dataclasses.replace(batch, policy=policy, lengths=lengths))
    assert result.losses.isfinite().all()
    (gradient,) = torch.autograd.grad(result.loss, policy)
    assert gradient.isfinite().all()


def test_orpo_of_a_certain_completion_is_the_same_in_every_dtype():
    # An empty completion has no log-odds of its own: its mean token is certain.
    found = []
    for dtype in (torch.float32, torch.float64):
        policy = torch.tensor([-2.0, 0.0], dtype=dtype, requires_grad=True)
        (loss,) = losses("orpo", LogpBatch(policy, torch.tensor([2, 0])))
        (gradient,) = torch.autograd.grad(loss, policy)
        assert gradient[1] == 0
        found.append(loss.item())
    odds = math.log(math.exp(-1.0) / (1 - math.exp(-1.0)))
    assert found == pytest.approx([1.0 + 0.1 * (30 * math.log(10) - odds)] * 2, rel=1e-6)


def test_cpo_counts_the_tokens_of_the_whole_batch():
    policy = torch.tensor([-4.0, -9.0, -5.0, -5.0]).double()
    batch = LogpBatch(policy, torch.tensor([2, 8, 3, 3]))
    plain = losses("cpo", batch, nll_weight=0.0)
    torch.testing.assert_close(losses("cpo", batch) - plain, torch.full((2,), 13 / 10).double())


def test_tdpo_divergences_pass_their_gradient_where_the_method_says():
    for name, expected in (("tdpo1", True), ("tdpo2", False)):
        kl = torch.tensor([1.0, 2.0, 3.0, 4.0]).double().requires_grad_()
        batch = dataclasses.replace(random_batch(4), sequence_kl=kl)
        (gradient,) = torch.autograd.grad(compute(find(name).build(), batch).loss, kl)
        assert bool(gradient[:2].abs().sum() > 0) is expected
        assert gradient[2:].abs().sum() > 0


def test_kto_without_a_kl_takes_the_batchs_own_and_no_gradient_through_it():
    batch = dataclasses.replace(random_batch(6), kl=None)
    rewards = 0.1 * (batch.policy - batch.reference).detach()
    level = rewards.mean().clamp(min=0)
    wanted = torch.where(
        batch.desirable, 1 - torch.sigmoid(rewards - level), 1 - torch.sigmoid(level - rewards)
    )
    result = compute(find("kto").build(), batch)
    torch.testing.assert_close(result.losses, wanted, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(result.loss, batch.policy)
    sign = 1 - 2 * batch.desirable.double()
    slope = wanted * (1 - wanted) * sign * 0.1 / 6
    torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-14)


def test_aliases():
    assert find("rpo").name == "reward-distillation"
    assert find("rdpo").name == "robust-dpo" and find("r-dpo").name == "length-dpo"
    assert find("dpop").name == "dpo-positive" and find("alphapo").name == "alpha-po"
