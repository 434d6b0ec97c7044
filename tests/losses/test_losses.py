"""The losses: hand-worked values, limits and composition."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from loss_cases import GivenMargin, compute, random_batch, vector

from fused_prefopt.losses import (
    AdaptiveMargin,
    ConstantMargin,
    DynamicMargin,
    Logistic,
    LogRatio,
    MeanLogp,
    PairwiseLoss,
    SumLogp,
    find,
    gap_of,
)
from fused_prefopt.losses.pointwise import mean_over_groups
from fused_prefopt.types import LogpBatch


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_dpo_by_hand():
    batch = LogpBatch(
        policy=vector(-10, -20, -14, -18),
        reference=vector(-12, -19, -13, -20),
        lengths=torch.tensor([5, 5, 5, 5]),
    )
    # Δ = 2, −1 | −1, 2: margins 3 and −3, at β = 0.5: 1.5 and −1.5.
    result = compute(find("dpo").build(beta=0.5), batch)
    assert result.losses.tolist() == pytest.approx([softplus(-1.5), softplus(1.5)])
    assert result.loss.item() == pytest.approx((softplus(-1.5) + softplus(1.5)) / 2)
    smoothed = compute(find("dpo").build(beta=0.5, label_smoothing=0.25), batch)
    first = 0.75 * softplus(-1.5) + 0.25 * softplus(1.5)
    assert smoothed.losses[0].item() == pytest.approx(first)


def test_simpo_by_hand():
    batch = LogpBatch(policy=vector(-10, -30), lengths=torch.tensor([5, 10]))
    # L̄ = −2 and −3: m = 2 · 1, γ = 0.5.
    result = compute(find("simpo").build(beta=2.0, gamma=0.5), batch)
    assert result.losses.item() == pytest.approx(softplus(-1.5))
    assert result.target_margins.tolist() == [0.5]


def test_alpha_dpo_by_hand():
    batch = LogpBatch(
        policy=vector(-10, -8, -30, -20),
        reference=vector(-12, -8, -30, -20),
        lengths=torch.tensor([2, 2, 10, 10]),
    )
    # u = 2(−5+3), 2(−4+2) = −4, −4; gaps 1, 0; μ = σ = 0.5; z = 1, −1; margins 0.5 ± 0.1·2.
    result = compute(find("alpha-dpo").build(beta=2.0, gamma=0.5, alpha=0.1), batch)
    assert result.target_margins.tolist() == pytest.approx([0.7, 0.3])
    assert result.losses.tolist() == pytest.approx([softplus(4.7), softplus(4.3)])
    unit = find("alpha-dpo").build(beta=2.0, gamma=0.5, alpha=0.1, margin_scale="unit")
    assert compute(unit, batch).target_margins.tolist() == pytest.approx([0.6, 0.4])
    for scale in ("beta", "unit"):
        plain = find("alpha-dpo").build(
            beta=2.0, gamma=0.5, alpha=0.1, normalize=False, margin_scale=scale
        )
        assert compute(plain, batch).target_margins.tolist() == pytest.approx([0.7, 0.5])
    given = find("alpha-dpo").build(
        beta=2.0, gamma=0.5, alpha=0.1, statistics="dataset", mean=-1.0, std=2.0
    )
    assert compute(given, batch).target_margins.tolist() == pytest.approx([0.7, 0.6])


@pytest.mark.parametrize(
    ("implicit_reference", "gap"),
    [
        ("ratio", 2 / 2 - 3 / 10),
        ("policy", -10 / 2 + 30 / 10),
        ("reference", -12 / 2 + 33 / 10),
        ("inverse_reference", 12 / 2 - 33 / 10),
        ("sequence_kl", 1.5 - 0.25),
    ],
)
def test_gaps_by_hand(implicit_reference, gap):
    batch = LogpBatch(
        policy=vector(-10, -30),
        reference=vector(-12, -33),
        lengths=torch.tensor([2, 10]),
        sequence_kl=vector(0.25, 1.5),
    )
    found = gap_of(implicit_reference, length_normalized=True)(batch)
    assert found.tolist() == pytest.approx([gap])


def test_dro_by_hand():
    batch = LogpBatch(
        policy=vector(-10, -20, -30),
        reference=vector(-12, -20, -29),
        lengths=torch.tensor([5, 5, 5]),
        rewards=vector(1, 2, 3),
        prompt=vector(-4, -4, -6),
        prompt_reference=vector(-5, -5, -6),
        groups=torch.tensor([7, 7, 2]),
    )
    # βΔ = 1, 0, −0.5; log Z = 1+2, 1+2, 2; targets s − βΔ − β log Z = −1.5, 0.5, 2.5.
    result = compute(find("dro").build(beta=0.5, log_z0=2.0), batch)
    assert result.losses.tolist() == pytest.approx([2.25, 0.25, 6.25])
    assert result.loss.item() == pytest.approx(((2.25 + 0.25) / 2 + 6.25) / 2)
    assert result.rewards.tolist() == pytest.approx([1, 0, -0.5])
    assert result.metrics["log_z/mean"].item() == pytest.approx(8 / 3)
    alone = compute(
        find("dro").build(beta=0.5, log_z0=2.0), dataclasses.replace(batch, groups=None)
    )
    assert alone.loss.item() == pytest.approx((2.25 + 0.25 + 6.25) / 3)


def test_mean_over_groups_in_any_order():
    values = vector(1, 10, 3, 20, 30, 5)
    groups = torch.tensor([4, -1, 4, -1, -1, 9])
    assert mean_over_groups(values, groups).item() == pytest.approx((2 + 20 + 5) / 3)


def test_metrics_by_hand():
    batch = LogpBatch(
        policy=vector(-10, -20, -14, -18),
        reference=vector(-12, -19, -13, -20),
        lengths=torch.tensor([5, 5, 5, 5]),
    )
    loss = PairwiseLoss(LogRatio(beta=0.5), GivenMargin(vector(1.0, 3.0)))
    metrics = {name: value.item() for name, value in loss(batch).metrics.items()}
    assert metrics == {
        "rewards/chosen": 0.25,
        "rewards/rejected": 0.25,
        "rewards/accuracies": 0.5,
        "rewards/margins": 0.0,
        "logps/chosen": -15.0,
        "logps/rejected": -16.0,
        "kl/chosen": 0.5,
        "kl/rejected": 0.5,
        "margin/mean": 2.0,
        "margin/std": 1.0,
        "nonfinite": 0.0,
    }


def test_alpha_zero_is_simpo_exactly():
    batch = random_batch()
    simpo = compute(find("simpo").build(beta=10.0, gamma=4.0), batch)
    alpha = compute(find("alpha-dpo").build(beta=10.0, gamma=4.0, alpha=0.0), batch)
    assert torch.equal(simpo.losses, alpha.losses)
    gradients = [torch.autograd.grad(out.loss, batch.policy)[0] for out in (simpo, alpha)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("solver", ["mirror", "exact"])
def test_large_tau_is_the_fixed_margin(solver):
    batch = random_batch()
    simpo = compute(find("simpo").build(beta=10.0, gamma=4.0), batch)
    gamma = compute(find("gamma-simpo").build(gamma=4.0, tau=1e12, solver=solver), batch)
    torch.testing.assert_close(gamma.losses, simpo.losses, rtol=1e-9, atol=1e-9)


def test_large_margins_do_not_overflow():
    batch = LogpBatch(policy=vector(-1e6, -1, -1, -1e6), lengths=torch.tensor([1, 1, 1, 1]))
    result = compute(PairwiseLoss(SumLogp(beta=1.0)), batch)
    assert result.losses.tolist() == [1e6 - 1, 0.0]


REWARDS = [LogRatio(beta=0.1), MeanLogp(beta=2.0), SumLogp(beta=0.05)]
MARGINS = [
    ConstantMargin(gamma=0.5),
    DynamicMargin(gamma=0.5, tau=1.0),
    AdaptiveMargin(gap=gap_of("ratio", length_normalized=True), gamma=0.5, alpha=0.1),
]


@pytest.mark.parametrize("reward", REWARDS, ids=lambda part: type(part).__name__)
@pytest.mark.parametrize("margin", MARGINS, ids=lambda part: type(part).__name__)
@pytest.mark.parametrize("link", [Logistic(), Logistic(label_smoothing=0.1)], ids=str)
def test_every_reward_margin_and_link_compose(reward, margin, link):
    batch = random_batch()
    loss = PairwiseLoss(reward, margin, link)
    result = compute(loss, batch)
    chosen, rejected = reward(batch).chunk(2)
    assert torch.equal(result.losses, link(chosen - rejected, result.target_margins))
    assert loss.needs == reward.needs | margin.needs


def test_regulariser():
    class ChosenNll:
        needs = frozenset()

        def __call__(self, batch):
            return -batch.policy.chunk(2)[0] / batch.lengths.chunk(2)[0]

    batch = LogpBatch(policy=vector(-10, -30), lengths=torch.tensor([5, 10]))
    result = PairwiseLoss(MeanLogp(beta=2.0), regularisers=(ChosenNll(),))(batch)
    assert result.loss.item() == pytest.approx(softplus(-2.0) + 2.0)
