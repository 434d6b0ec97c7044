"""The loss epilogues in the interpreter on CPU.

Truth is the torch loss with its torch statistic, in float64, on the same fp32 log-probs.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from loss_cases import random_batch

from fused_prefopt import epilogues
from fused_prefopt.epilogues import run_epilogue
from fused_prefopt.kernels.margin_solver import mirror_margins
from fused_prefopt.losses import (
    AdaptiveMargin,
    ConstantMargin,
    DirectRewardLoss,
    DynamicMargin,
    Hinge,
    Logistic,
    LogRatio,
    MeanLogp,
    Normalisation,
    PairwiseLoss,
    Robust,
    Squared,
    SumLogp,
    UnbiasedRobust,
    gap_of,
)
from fused_prefopt.losses import mirror_margins as true_margins
from fused_prefopt.statistics import margin_queue
from fused_prefopt.types import LogpBatch

pytestmark = pytest.mark.interpreted

REWARDS = [LogRatio(beta=0.3), MeanLogp(beta=2.5), SumLogp(beta=0.1)]
LINKS = [
    Logistic(),
    Logistic(label_smoothing=0.2),
    Robust(epsilon=0.1),
    UnbiasedRobust(epsilon=0.2),
    Hinge(delta=1.5),
    Squared(),
]
MARGINS = [
    ConstantMargin(gamma=0.7),
    AdaptiveMargin(
        gap=gap_of("ratio", length_normalized=True), gamma=0.5, alpha=0.2, stop_gradient=False
    ),
    DynamicMargin(gamma=2.0, tau=3.0, queue_size=20, sample_size=16),
]
NORMALISATIONS = [
    None,
    Normalisation(),
    Normalisation(statistics="batch"),
    Normalisation(statistics="dataset", mean=-0.3, std=1.7),
    Normalisation(statistics="reference", momentum=0.6),
]


def name_of(value) -> str:
    return type(value).__name__ if value is not None else "none"


def doubled(batch: LogpBatch) -> LogpBatch:
    """The same batch in float64, with a leaf of its own."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    values = {
        key: value.detach().double() if value is not None and value.is_floating_point() else value
        for key, value in values.items()
    }
    values["policy"].requires_grad_()
    return LogpBatch(**values)


def close(ours, truth, scale=1.0):
    """|ours − truth| <= 1e-6 max(scale, |truth|), and the same NaNs and infinities.

    `scale` is 1, or the size of the numbers that cancel in the result.
    """
    ours, truth = ours.detach().double(), truth.detach().double()
    assert ours.shape == truth.shape
    finite = truth.isfinite()
    torch.testing.assert_close(
        ours.where(~finite, 0.0), truth.where(~finite, 0.0), rtol=0, atol=0, equal_nan=True
    )
    error = (ours - truth).where(finite, 0.0).abs()
    bound = 1e-6 * truth.where(finite, 0.0).abs().clamp(min=scale)
    assert (error <= bound).all(), (error / bound).max()


def same_state(ours, truth):
    """Equal buffers, margins in the same places, and equal generators."""
    if ours is None:
        assert truth is None
        return
    found, wanted = ours.state_dict(), truth.state_dict()
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        if value.is_floating_point():
            assert torch.equal(value.isnan(), wanted[key].isnan()), key
            close(value.nan_to_num(), wanted[key].nan_to_num())
        else:
            assert torch.equal(value, wanted[key]), key


class Pair:
    """A loss whose kernel and truth take the same steps, each with a statistic of its own."""

    def __init__(self, loss):
        self.loss = loss
        self.ours = loss.statistics()
        self.truth = copy.deepcopy(self.ours)

    def train(self, mode=True):
        for statistic in (self.ours, self.truth):
            if statistic is not None:
                statistic.train(mode)

    def step(self, batch: LogpBatch, scale=1.0):
        """Take a batch, compare everything, and return the kernel's result."""
        batch = dataclasses.replace(batch, policy=batch.policy.detach().requires_grad_())
        true_batch = doubled(batch)
        observed = self.loss.observe(true_batch)
        summary = None if self.truth is None else self.truth(observed)
        truth = self.loss(true_batch, summary)
        ours = run_epilogue(self.loss, self.ours, batch)
        assert ours is not None
        assert ours.loss.dtype == ours.losses.dtype == torch.float32
        close(ours.losses, truth.losses, scale)
        close(ours.loss, truth.loss, scale)
        close(ours.rewards, truth.rewards, scale)
        assert (ours.target_margins is None) == (truth.target_margins is None)
        if ours.target_margins is not None:
            close(ours.target_margins, truth.target_margins, scale)
        assert ours.metrics.keys() == truth.metrics.keys()
        for key, value in truth.metrics.items():
            close(ours.metrics[key], value, scale)
        same_state(self.ours, self.truth)

        weights = torch.linspace(-1, 2, truth.losses.shape[0], dtype=torch.float64)
        for reduce in (
            lambda result: result.loss,
            lambda result: (result.losses * weights.to(result.losses.dtype)).sum(),
            lambda result: 3 * result.loss + result.losses.square().sum(),
        ):
            (found,) = torch.autograd.grad(reduce(ours), batch.policy, retain_graph=True)
            (wanted,) = torch.autograd.grad(reduce(truth), true_batch.policy, retain_graph=True)
            # A gradient has an upstream factor, the loss itself in the last of these.
            finite = truth.losses[truth.losses.isfinite()]
            close(found, wanted, max(scale, finite.abs().max().item() if len(finite) else 1))
        return ours


@pytest.mark.parametrize("link", LINKS, ids=name_of)
@pytest.mark.parametrize("margin", MARGINS, ids=name_of)
@pytest.mark.parametrize("reward", REWARDS, ids=name_of)
def test_every_composition(reward, margin, link):
    pair = Pair(PairwiseLoss(reward, margin, link))
    for seed, size in enumerate((14, 22, 2)):
        pair.step(random_batch(size, seed, torch.float32))


@pytest.mark.parametrize("normalisation", NORMALISATIONS, ids=str)
@pytest.mark.parametrize("length_normalized", [True, False])
@pytest.mark.parametrize(
    "gap", ["ratio", "policy", "reference", "inverse_reference", "sequence_kl"]
)
def test_adaptive_margins(gap, length_normalized, normalisation):
    for stop_gradient in (True, False):
        margin = AdaptiveMargin(
            gap=gap_of(gap, length_normalized=length_normalized),
            gamma=0.4,
            alpha=0.1,
            scale=2.5,
            normalisation=normalisation,
            stop_gradient=stop_gradient,
        )
        pair = Pair(PairwiseLoss(MeanLogp(beta=2.5), margin))
        pair.train(False)  # with nothing seen yet
        pair.step(random_batch(6, 7, torch.float32))
        pair.train()
        for seed, size in enumerate((2, 10, 26)):  # from a single pair on
            pair.step(random_batch(size, seed, torch.float32))
        pair.train(False)
        pair.step(random_batch(8, 5, torch.float32))


@pytest.mark.parametrize("sizes", [(1, 7, 13, 2), (40, 3, 17), (5,) * 7])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"queue": False},
        {"queue_size": 16, "sample_size": 12},
        {"queue_size": 3, "sample_size": 100},
        {"queue_size": 50, "sample_size": 1},
        {"queue_size": 2500, "steps": 1},
    ],
    ids=str,
)
def test_dynamic_margins_and_their_queue(options, sizes):
    pair = Pair(PairwiseLoss(LogRatio(beta=0.5), DynamicMargin(gamma=2.0, tau=5.0, **options)))
    for seed, pairs in enumerate(sizes):
        pair.step(random_batch(2 * pairs, seed, torch.float32))
        pair.train(False)
        pair.step(random_batch(6, 50 + seed, torch.float32))
        pair.train()


@pytest.mark.parametrize(("gamma", "tau"), [(4.0, 10.0), (0.375, 10.0), (5.0, 20.0), (3.0, 3.0)])
def test_published_settings_of_dynamic_margins(gamma, tau):
    margin = DynamicMargin(gamma=gamma, tau=tau, queue_size=300)
    pair = Pair(PairwiseLoss(MeanLogp(beta=10.0), margin))
    for seed in range(3):
        pair.step(random_batch(254, seed, torch.float32))


@pytest.mark.parametrize("margin", MARGINS, ids=name_of)
def test_nonfinite_values_are_skipped_and_counted(margin):
    pair = Pair(PairwiseLoss(MeanLogp(beta=1.0), margin))
    for seed in range(3):
        batch = random_batch(14, seed, torch.float32)
        with torch.no_grad():
            batch.policy[2], batch.policy[8], batch.policy[4] = math.nan, -math.inf, -math.inf
        pair.step(batch)
    pair.step(random_batch(14, 9, torch.float32))
    if pair.ours is not None:
        assert pair.ours.nonfinite == 9
    all_lost = random_batch(4, 1, torch.float32)
    with torch.no_grad():
        all_lost.policy.fill_(math.nan)
    pair.step(all_lost)


@pytest.mark.parametrize("margin", MARGINS, ids=name_of)
@pytest.mark.parametrize("reward", REWARDS, ids=name_of)
def test_extreme_log_probs_and_empty_completions(reward, margin):
    batch = random_batch(10, 3, torch.float32)
    with torch.no_grad():
        batch.policy[0], batch.policy[6], batch.policy[3], batch.policy[8] = -1e4, -1e4, -3e-7, 0.0
        batch.policy[4] = batch.reference[4] = 0.0
    batch.lengths[[4, 8]] = 0
    # Log-probs of 1e4 have exact fp32 values, but what is returned of them has 24 bits: the error
    # is measured against the rewards that cancel.
    scale = (reward.beta * batch.policy.detach().abs()).max().item()
    pair = Pair(PairwiseLoss(reward, margin, Logistic(label_smoothing=0.1)))
    pair.step(batch, scale)


def test_small_losses_keep_their_digits():
    policy = torch.tensor([15.0, 25.0, 40.0, 80.0, 11.3, 0.0, 0.0, 0.0, 0.0, 0.0]).neg()
    policy = policy.roll(5).requires_grad_()
    batch = LogpBatch(policy, torch.ones(10, dtype=torch.int64))
    ours = run_epilogue(PairwiseLoss(SumLogp(beta=1.0)), None, batch)
    truth = PairwiseLoss(SumLogp(beta=1.0))(doubled(batch))
    # Relative to each loss itself: −log σ(40) is 4e-18.
    torch.testing.assert_close(ours.losses.double(), truth.losses, rtol=2e-7, atol=0)


@pytest.mark.parametrize("groups", [None, "random", "one", "own"])
@pytest.mark.parametrize("size", [1, 2, 37, 96])
def test_direct_reward(size, groups):
    batch = random_batch(size, size, torch.float32)
    generator = torch.Generator().manual_seed(size)
    ids = {
        None: None,
        "random": torch.randint(-3, 5, (size,), generator=generator) * 10**12,
        "one": torch.full((size,), 7, dtype=torch.int32),
        "own": torch.randperm(size, generator=generator),
    }[groups]
    batch = dataclasses.replace(batch, groups=ids)
    Pair(DirectRewardLoss(LogRatio(beta=0.1), log_z0=50.0)).step(batch)
    with torch.no_grad():
        batch.policy[0] = math.inf
    Pair(DirectRewardLoss(LogRatio(beta=0.1), log_z0=-3.0)).step(batch)


def test_half_precision_data_beside_fp32_log_probs():
    batch = random_batch(10, 0, torch.float32)
    batch = dataclasses.replace(
        batch, reference=batch.reference.half(), rewards=batch.rewards.half()
    )
    Pair(PairwiseLoss(LogRatio(beta=0.3))).step(batch)
    Pair(DirectRewardLoss(LogRatio(beta=0.3), log_z0=1.0)).step(batch)


def test_strided_data():
    batch = random_batch(22, 0, torch.float32)
    policy = batch.policy.detach()[::2].requires_grad_()
    fields = ("lengths", "reference", "rewards", "prompt", "prompt_reference", "groups")
    data = {name: getattr(batch, name)[::2] for name in fields}
    Pair(DirectRewardLoss(LogRatio(beta=0.3), log_z0=1.0)).step(LogpBatch(policy, **data))


@pytest.mark.parametrize("margin", MARGINS, ids=name_of)
def test_statistics_of_several_ranks_come_from_their_module(margin, monkeypatch):
    before, after = torch.linspace(-2, 3, 4), torch.linspace(0, 9, 5)
    monkeypatch.setattr(epilogues, "gathers", lambda statistic: statistic.training)
    monkeypatch.setattr(
        margin_queue,
        "gather_over_ranks",
        lambda values, group: (torch.cat([before.double(), values, after.double()]), 4),
    )
    pair = Pair(PairwiseLoss(LogRatio(beta=0.3), margin))
    for seed in range(3):
        pair.step(random_batch(14, seed, torch.float32))
    pair.train(False)
    pair.step(random_batch(14, 5, torch.float32))


def test_a_gathered_pool_that_is_too_large_is_solved_without_the_kernel(monkeypatch):
    monkeypatch.setattr(epilogues, "gathers", lambda statistic: True)
    monkeypatch.setattr(epilogues, "LARGEST", 10)
    pair = Pair(PairwiseLoss(LogRatio(beta=0.3), MARGINS[2]))
    for seed in range(2):
        pair.step(random_batch(22, seed, torch.float32), scale=20)


def test_two_runs_give_the_same_bits():
    results = []
    for _ in range(2):
        pair = Pair(PairwiseLoss(LogRatio(beta=0.5), DynamicMargin(gamma=1.0, tau=10.0)))
        outputs = [pair.step(random_batch(62, seed, torch.float32)) for seed in range(2)]
        results.append([t for out in outputs for t in (out.losses, out.loss, out.target_margins)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 37, 256, 1021])
@pytest.mark.parametrize(("gamma", "tau"), [(4.0, 10.0), (5.0, 20.0), (3.0, 3.0), (0.2, 0.1)])
def test_margin_solver(gamma, tau, size, dtype):
    margins = torch.linspace(-20, 20, size, dtype=dtype)
    if size > 2:
        margins[[0, size // 2]] = torch.tensor([math.nan, math.inf], dtype=dtype)
    found = mirror_margins(margins, gamma, tau, 20)
    truth = true_margins(margins, gamma=gamma, tau=tau, steps=20)
    assert (found - truth).abs().max() <= 5e-7 * max(1, gamma)
    # The budget is kept in float64.
    part = found[margins.isfinite()]
    assert part.mean().item() == pytest.approx(gamma, rel=2e-7)


def test_margin_solver_refuses_what_it_cannot_do():
    assert mirror_margins(torch.zeros(0), 1.0, 1.0).shape == (0,)
    with pytest.raises(ValueError, match="margins: got 4097, wanted at most 4096"):
        mirror_margins(torch.zeros(4097), 1.0, 1.0)
    with pytest.raises(ValueError, match="gamma, tau: got 100.0, 1.0"):
        mirror_margins(torch.zeros(3), 100.0, 1.0)


@pytest.mark.parametrize("margin", MARGINS, ids=name_of)
def test_registered_ops(margin, monkeypatch):
    calls = []
    epilogue = epilogues._Epilogue.apply

    def record(policy, op, *arguments):
        calls.append((op, (policy.detach(), *arguments)))
        return epilogue(policy, op, *arguments)

    monkeypatch.setattr(epilogues._Epilogue, "apply", record)
    loss = PairwiseLoss(LogRatio(beta=0.3), margin)
    run_epilogue(loss, loss.statistics(), random_batch(8, 0, torch.float32))
    run_epilogue(DirectRewardLoss(LogRatio(beta=0.3), 1.0), None, random_batch(8, 0, torch.float32))
    for op, arguments in calls:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_results_may_be_changed_in_place():
    batch = random_batch(8, 0, torch.float32)
    result = run_epilogue(PairwiseLoss(LogRatio(beta=0.3)), None, batch)
    loss = result.loss.clone()
    result.loss.div_(4).backward()
    quarter = batch.policy.grad.clone()
    batch.policy.grad = None
    again = run_epilogue(PairwiseLoss(LogRatio(beta=0.3)), None, batch)
    again.loss.backward()
    torch.testing.assert_close(4 * quarter, batch.policy.grad)
    assert torch.equal(loss, again.loss)
