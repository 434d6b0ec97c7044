"""Composed losses as one launch: what has a form, and the kernels in the interpreter on CPU.

Truth is the torch loss with its torch statistic, in float64, on the same fp32 log-probs. One file
of more than 450 lines, as every kernel is compared with the form that its loss is read as.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from itertools import product

import pytest
import torch
from loss_cases import VARIANTS, label, parts, random_batch
from machines import per_machine
from truth import covering

from fused_prefopt import PreferenceLoss, loss_kernel
from fused_prefopt.kernels.loss_form import LARGEST, LARGEST_GROUPED, PairForm, contracts
from fused_prefopt.loss_kernel import launch_loss, pair_form
from fused_prefopt.losses import (
    AdaptiveMargin,
    ConstantMargin,
    DirectRewardLoss,
    DynamicMargin,
    Hinge,
    Logistic,
    LogRatio,
    MeanLogp,
    MeanLogRatio,
    Normalisation,
    PairwiseLoss,
    Robust,
    Squared,
    SumLogp,
    SumMargin,
    UnbiasedRobust,
    find,
    gap_of,
    preset,
    published_settings,
)
from fused_prefopt.losses import mirror_margins as true_margins
from fused_prefopt.losses.adaptive_margin import IMPLICIT_REFERENCES, Gap
from fused_prefopt.statistics import RunningMoments, Statistic, margin_queue
from fused_prefopt.types import LogpBatch

DPO = PairwiseLoss(LogRatio(beta=0.1))
BOTH = SumMargin(own=ConstantMargin(gamma=1.0), added=DynamicMargin(gamma=1.0))
DRO = DirectRewardLoss(LogRatio(beta=0.1), log_z0=1.0)
BATCH = random_batch(8, 0, torch.float32)


class OtherReward(LogRatio):
    pass


def dynamic(**options) -> PairwiseLoss:
    return dataclasses.replace(DPO, margin=DynamicMargin(**{"gamma": 1.0} | options))


def adaptive(gap) -> PairwiseLoss:
    return dataclasses.replace(DPO, margin=AdaptiveMargin(gap=gap, gamma=1.0, alpha=0.1))


@pytest.mark.parametrize(
    ("loss", "batch"),
    [
        (DPO, random_batch(8)),
        (DPO, random_batch(0, 0, torch.float32)),
        (DPO, random_batch(7, 0, torch.float32)),
        (DPO, random_batch(2 * LARGEST + 2, 0, torch.float32)),
        (DPO, dataclasses.replace(BATCH, reference=None)),
        (DPO, dataclasses.replace(BATCH, reference=BATCH.reference.double())),
        (dataclasses.replace(DPO, reward=OtherReward(beta=0.1)), BATCH),
        (dataclasses.replace(DPO, link=lambda margins, targets: margins), BATCH),
        (dynamic(solver="exact"), BATCH),
        (dynamic(centered=True), BATCH),
        (dynamic(gamma=100.0, tau=1.0), BATCH),
        (dataclasses.replace(DPO, margin=BOTH), BATCH),
        (dynamic(sample_size=LARGEST + 1, queue_size=LARGEST + 1), BATCH),
        (adaptive(Gap(lambda batch: batch.policy, frozenset())), BATCH),
        (DRO, random_batch(0, 0, torch.float32)),
        (DRO, random_batch(LARGEST_GROUPED + 1, 0, torch.float32)),
        (dataclasses.replace(DRO, reward=OtherReward(beta=0.1)), BATCH),
    ],
)
def test_what_is_not_covered_is_left_alone(loss, batch):
    statistics = loss.statistics()
    before = (
        {} if statistics is None else {k: v.clone() for k, v in statistics.state_dict().items()}
    )
    assert launch_loss(loss, statistics, batch) is None
    for key, value in before.items():
        torch.testing.assert_close(
            statistics.state_dict()[key], value, rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("length_normalized", [True, False])
@pytest.mark.parametrize("name", IMPLICIT_REFERENCES)
def test_every_gap_of_the_paper_has_a_form_and_no_other(name, length_normalized):
    class Other(Gap):
        pass

    gap = gap_of(name, length_normalized=length_normalized)
    assert pair_form(adaptive(gap)) is not None
    if isinstance(gap, Gap):
        changed = Other(gap.value, gap.needs, gap.length_normalized)
        assert pair_form(adaptive(changed)) is None


def test_a_statistic_of_another_kind_is_not_covered():
    loss = adaptive(gap_of("ratio", length_normalized=True))
    assert launch_loss(loss, None, BATCH) is None
    assert launch_loss(loss, dynamic().statistics(), BATCH) is None
    assert launch_loss(dynamic(), RunningMoments(), BATCH) is None
    assert launch_loss(DPO, RunningMoments(), BATCH) is None


def test_forms_survive_packing():
    form = PairForm(reward_reference=-1, steps=20, start=3, beta=0.1, link_b=-0.25, tau=7.0)
    integers, numbers = form.packed()
    assert all(type(value) is int for value in integers)
    assert all(type(value) is float for value in numbers)
    assert PairForm.unpacked(integers, numbers) == form


def test_published_settings_contract_and_far_ones_do_not():
    for setting in published_settings().values():
        if "tau" in setting.hyperparameters:
            assert contracts(setting.hyperparameters["gamma"], setting.hyperparameters["tau"])
    assert not contracts(20.0, 10.0) and not contracts(1e6, 1e-6)


REWARDS = [LogRatio(beta=0.3), MeanLogRatio(beta=2.0), MeanLogp(beta=2.5), SumLogp(beta=0.1)]
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


def test_every_part_with_a_form_is_met_by_the_kernel_below():
    for kind, met in (("reward", REWARDS), ("margin", MARGINS), ("link", LINKS)):
        plain = PairwiseLoss(LogRatio(beta=0.1))
        formed = [
            part
            for part in parts(kind)
            if pair_form(dataclasses.replace(plain, **{kind: part})) is not None
        ]
        assert {type(part) for part in formed} == {type(part) for part in met}


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
        ours = launch_loss(self.loss, self.ours, batch)
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


# The emulator has no time for all of them: every two parts meet.
COMPOSITIONS = per_machine(
    list(product(REWARDS, MARGINS, LINKS)), covering(REWARDS, MARGINS, LINKS)
)


@pytest.mark.interpreted
@pytest.mark.executed
@pytest.mark.parametrize(("reward", "margin", "link"), COMPOSITIONS, ids=label)
def test_every_composition(reward, margin, link):
    pair = Pair(PairwiseLoss(reward, margin, link))
    for seed, size in enumerate((14, 22, 2)):
        pair.step(random_batch(size, seed, torch.float32))


GAPS = ["ratio", "policy", "reference", "inverse_reference", "sequence_kl"]
ADAPTIVE = GAPS, [True, False], NORMALISATIONS


@pytest.mark.interpreted
@pytest.mark.executed
@pytest.mark.parametrize(
    ("gap", "length_normalized", "normalisation"),
    per_machine(list(product(*ADAPTIVE)), covering(*ADAPTIVE)),
    ids=str,
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
        for seed, size in enumerate((2, 26)):  # from a single pair on
            pair.step(random_batch(size, seed, torch.float32))
        pair.train(False)
        pair.step(random_batch(8, 5, torch.float32))


@pytest.mark.interpreted
@pytest.mark.executed
def test_a_gap_without_a_spread_leaves_no_rounding_in_it():
    """A fused multiply-add would: E[x²] − E[x]² of a single large gap is exactly 0."""
    margin = AdaptiveMargin(
        gap=gap_of("ratio", length_normalized=True),
        gamma=0.4,
        alpha=0.1,
        normalisation=Normalisation(statistics="batch"),
        stop_gradient=False,
    )
    for seed in range(5):
        batch = random_batch(2, seed, torch.float32)
        batch.lengths.copy_(torch.tensor([7, 3]))
        with torch.no_grad():
            batch.policy[0] -= 2e4
        Pair(PairwiseLoss(LogRatio(beta=0.1), margin)).step(batch, scale=2e3)


@pytest.mark.interpreted
@pytest.mark.executed
@pytest.mark.parametrize("sizes", [(1, 7, 13, 2), (40, 3, 17), (5,) * 5])
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


@pytest.mark.interpreted
@pytest.mark.executed
@pytest.mark.parametrize(
    ("loss", "size", "steps"),
    [
        (dynamic(gamma=2.0, tau=5.0, queue_size=300), 300, 2),
        (PairwiseLoss(MeanLogp(beta=2.5), MARGINS[1]), 2200, 1),
        (DirectRewardLoss(LogRatio(beta=0.1), log_z0=50.0), 700, 1),
    ],
    ids=["a long queue", "an adaptive margin", "no pairs"],
)
def test_many_pairs(loss, size, steps):
    pair = Pair(loss)
    for seed in range(steps):
        pair.step(random_batch(size, seed, torch.float32))


# Of the other losses with published settings a part has no form: they run in torch.
LAUNCHED = ("alpha-dpo", "gamma-simpo", "repo")


@pytest.mark.interpreted
@pytest.mark.executed
@pytest.mark.parametrize(
    "name", [name for name, each in published_settings().items() if each.loss in LAUNCHED]
)
def test_published_settings(name):
    loss, options = preset(name)
    pair = Pair(find(loss).build(**options))
    for seed in range(3):
        pair.step(random_batch(254, seed, torch.float32))


@pytest.mark.interpreted
@pytest.mark.executed
@pytest.mark.parametrize("margin", MARGINS, ids=label)
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


@pytest.mark.interpreted
@pytest.mark.executed
@pytest.mark.parametrize("margin", MARGINS, ids=label)
@pytest.mark.parametrize("reward", REWARDS, ids=label)
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


@pytest.mark.interpreted
@pytest.mark.executed
def test_equal_rewards_are_not_won():
    batch = random_batch(6, 0, torch.float32)
    with torch.no_grad():
        batch.policy[[0, 3]] = batch.reference[[0, 3]] - 0.5
    ours = Pair(DPO).step(batch)
    assert ours.rewards[0] == ours.rewards[3]


@pytest.mark.interpreted
@pytest.mark.executed
def test_a_hinge_is_flat_where_it_begins_to_be():
    batch = random_batch(6, 0, torch.float32)
    with torch.no_grad():
        batch.policy.copy_(torch.tensor([-2.0, -1.0, -4.0, -3.5, -2.0, -5.25]))
    ours = Pair(PairwiseLoss(SumLogp(beta=1.0), link=Hinge(delta=1.5))).step(batch)
    assert ours.losses.tolist() == [0.0, 0.5, 0.25]


@pytest.mark.interpreted
@pytest.mark.executed
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize(
    "loss", [dataclasses.replace(DPO, link=Squared()), DRO], ids=["pairs", "no pairs"]
)
def test_losses_beyond_fp32_are_counted(loss):
    """The loss is what fp32 holds of it."""
    batch = random_batch(6, 0, torch.float32)
    with torch.no_grad():
        batch.policy[1] = -1e25
    ours = launch_loss(loss, None, batch)
    assert ours.losses.isinf().sum() == ours.metrics["nonfinite"] == 1


@pytest.mark.interpreted
@pytest.mark.executed
def test_small_losses_keep_their_digits():
    policy = torch.tensor([15.0, 25.0, 40.0, 80.0, 11.3, 0.0, 0.0, 0.0, 0.0, 0.0]).neg()
    policy = policy.roll(5).requires_grad_()
    batch = LogpBatch(policy, torch.ones(10, dtype=torch.int64))
    ours = launch_loss(PairwiseLoss(SumLogp(beta=1.0)), None, batch)
    truth = PairwiseLoss(SumLogp(beta=1.0))(doubled(batch))
    # Relative to each loss itself: −log σ(40) is 4e-18.
    torch.testing.assert_close(ours.losses.double(), truth.losses, rtol=2e-7, atol=0)


@pytest.mark.interpreted
@pytest.mark.executed
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


@pytest.mark.interpreted
@pytest.mark.executed
@pytest.mark.parametrize("name", ["dpo", "gamma-simpo", "alpha-dpo"])
def test_lists_meet_the_kernel_as_pairs(name, monkeypatch):
    groups, launched = torch.tensor([5, 1, 5, 2, 5, 1, 2, 2, 5, 2]), []
    monkeypatch.setattr(
        loss_kernel,
        "_launch_pairs",
        lambda *a, own=loss_kernel._launch_pairs: launched.append(a) or own(*a),
    )
    results = []
    for dtype, engine in ((torch.float32, "triton"), (torch.float64, "torch")):
        batch = random_batch(10, 6, torch.float32)
        batch = dataclasses.replace(batch, groups=groups, completions=None)
        batch = dataclasses.replace(batch, policy=batch.policy.detach().to(dtype).requires_grad_())
        loss_fn = PreferenceLoss(name, engine=engine)
        loss = loss_fn.from_logps(batch).loss
        results.append((loss, torch.autograd.grad(loss, batch.policy)[0], loss_fn.state_dict()))
    assert len(launched) == 1
    found, wanted = results
    torch.testing.assert_close(
        found, wanted, check_dtype=False, rtol=2e-5, atol=1e-6, equal_nan=True
    )


@pytest.mark.interpreted
@pytest.mark.executed
def test_half_precision_data_beside_fp32_log_probs():
    batch = random_batch(10, 0, torch.float32)
    batch = dataclasses.replace(
        batch, reference=batch.reference.half(), rewards=batch.rewards.half()
    )
    Pair(PairwiseLoss(LogRatio(beta=0.3))).step(batch)
    Pair(DirectRewardLoss(LogRatio(beta=0.3), log_z0=1.0)).step(batch)


@pytest.mark.interpreted
@pytest.mark.executed
def test_strided_data():
    batch = random_batch(22, 0, torch.float32)
    policy = batch.policy.detach()[::2].requires_grad_()
    fields = ("lengths", "reference", "rewards", "prompt", "prompt_reference", "groups")
    data = {name: getattr(batch, name)[::2] for name in fields}
    Pair(DirectRewardLoss(LogRatio(beta=0.3), log_z0=1.0)).step(LogpBatch(policy, **data))


def gather(monkeypatch, before: int, after: int) -> None:
    """Let statistics see the margins of other ranks before and after this one's."""
    ends = torch.linspace(-2, 3, before).double(), torch.linspace(0, 9, after).double()
    monkeypatch.setattr(Statistic, "gathers", property(lambda statistic: statistic.training))
    monkeypatch.setattr(
        margin_queue,
        "gather_over_ranks",
        lambda values, group, **_: (torch.cat([ends[0], values, ends[1]]), before),
    )


@pytest.mark.interpreted
@pytest.mark.executed
@pytest.mark.parametrize("margin", MARGINS, ids=label)
def test_statistics_of_several_ranks_come_from_their_module(margin, monkeypatch):
    gather(monkeypatch, 4, 5)
    pair = Pair(PairwiseLoss(LogRatio(beta=0.3), margin))
    for seed in range(3):
        pair.step(random_batch(14, seed, torch.float32))
    pair.train(False)
    pair.step(random_batch(14, 5, torch.float32))


@pytest.mark.interpreted
def test_a_gathered_pool_that_is_too_large_is_solved_without_the_kernel(monkeypatch):
    gather(monkeypatch, 4, 6)
    # As many as the queue would draw beside the pairs of this rank alone.
    monkeypatch.setattr(loss_kernel, "LARGEST", 16)
    pair = Pair(PairwiseLoss(LogRatio(beta=0.3), MARGINS[2]))
    for seed in range(2):
        pair.step(random_batch(14, seed, torch.float32), scale=20)


@pytest.mark.interpreted
def test_two_runs_give_the_same_bits():
    results = []
    for _ in range(2):
        pair = Pair(PairwiseLoss(LogRatio(beta=0.5), DynamicMargin(gamma=1.0, tau=10.0)))
        outputs = [pair.step(random_batch(62, seed, torch.float32)) for seed in range(2)]
        results.append([t for out in outputs for t in (out.losses, out.loss, out.target_margins)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


SOLVED = (
    [(4.0, 10.0), (5.0, 20.0), (3.0, 3.0), (0.2, 0.1)],
    [1, 2, 37, 256, 1021],
    [torch.float32, torch.float64],
)


@pytest.mark.interpreted
@pytest.mark.executed
@pytest.mark.parametrize(
    ("budget", "size", "dtype"), per_machine(list(product(*SOLVED)), covering(*SOLVED))
)
def test_margin_solver(budget, size, dtype):
    from fused_prefopt.kernels.margin_solver import mirror_margins

    gamma, tau = budget

    margins = torch.linspace(-20, 20, size, dtype=dtype)
    if size > 2:
        margins[[0, size // 2]] = torch.tensor([math.nan, math.inf], dtype=dtype)
    found = mirror_margins(margins, gamma, tau, 20)
    truth = true_margins(margins, gamma=gamma, tau=tau, steps=20)
    assert (found - truth).abs().max() <= 5e-7 * max(1, gamma)
    # The budget is kept in float64.
    part = found[margins.isfinite()]
    assert part.mean().item() == pytest.approx(gamma, rel=2e-7)


@pytest.mark.interpreted
def test_margin_solver_refuses_what_it_cannot_do():
    from fused_prefopt.kernels.margin_solver import mirror_margins

    assert mirror_margins(torch.zeros(0), 1.0, 1.0).shape == (0,)
    with pytest.raises(ValueError, match="margins: got 4097, wanted at most 4096"):
        mirror_margins(torch.zeros(4097), 1.0, 1.0)
    with pytest.raises(ValueError, match="gamma, tau: got 100.0, 1.0"):
        mirror_margins(torch.zeros(3), 100.0, 1.0)


@pytest.mark.interpreted
@pytest.mark.parametrize("margin", MARGINS, ids=label)
def test_registered_ops(margin, monkeypatch):
    calls = []
    launch = loss_kernel._LaunchedLoss.apply

    def record(policy, op, *arguments):
        calls.append((op, (policy.detach(), *arguments)))
        return launch(policy, op, *arguments)

    monkeypatch.setattr(loss_kernel._LaunchedLoss, "apply", record)
    loss = PairwiseLoss(LogRatio(beta=0.3), margin)
    launch_loss(loss, loss.statistics(), random_batch(8, 0, torch.float32))
    launch_loss(DirectRewardLoss(LogRatio(beta=0.3), 1.0), None, random_batch(8, 0, torch.float32))
    for op, arguments in calls:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.interpreted
def test_results_may_be_changed_in_place():
    batch = random_batch(8, 0, torch.float32)
    result = launch_loss(PairwiseLoss(LogRatio(beta=0.3)), None, batch)
    loss = result.loss.clone()
    result.loss.div_(4).backward()
    quarter = batch.policy.grad.clone()
    batch.policy.grad = None
    again = launch_loss(PairwiseLoss(LogRatio(beta=0.3)), None, batch)
    again.loss.backward()
    torch.testing.assert_close(4 * quarter, batch.policy.grad)
    assert torch.equal(loss, again.loss)


def has_form(loss) -> bool:
    """Whether a loss's parts have one, whatever the batch."""
    return isinstance(loss, DirectRewardLoss) or (
        isinstance(loss, PairwiseLoss) and pair_form(loss) is not None
    )


BUILT = [(name, options, find(name).build(**options)) for name, options in VARIANTS]
FORMS = [each for each in BUILT if has_form(each[2])]


def built(cases):
    # A loss that prints its functions, with their addresses, is no name of a case.
    ids = [f"{name}-{options}" for name, options, _ in cases]
    return pytest.mark.parametrize(("name", "options", "loss"), cases, ids=ids)


def test_the_losses_that_the_package_is_about_have_a_form():
    names = {name for name, _, _ in FORMS}
    assert names >= {"dpo", "simpo", "alpha-dpo", "gamma-simpo", "dro", "repo", "sigmoid-norm"}
    assert {str(options) for name, options, _ in FORMS if name == "simpo"} >= {"{'link': 'hinge'}"}


@built([each for each in BUILT if each not in FORMS])
def test_a_registered_loss_without_a_form_goes_the_other_way(name, options, loss):
    assert launch_loss(loss, loss.statistics(), BATCH) is None


@pytest.mark.interpreted
@pytest.mark.executed
@built(FORMS)
def test_every_registered_loss_with_a_form(name, options, loss):
    pair = Pair(loss)
    for seed, size in enumerate((14, 2)):
        batch = random_batch(size, seed, torch.float32)
        # What is returned has 24 bits: the error is measured against the rewards that cancel.
        pair.step(batch, loss.reward(batch).abs().max().item())
