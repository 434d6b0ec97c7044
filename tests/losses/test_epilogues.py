"""The loss epilogues: what is left to the torch losses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from loss_cases import random_batch

from fused_prefopt.epilogue_forms import pair_form
from fused_prefopt.epilogues import run_epilogue
from fused_prefopt.kernels.forms import LARGEST, LARGEST_GROUPED, PairForm, contracts
from fused_prefopt.losses import (
    AdaptiveMargin,
    DirectRewardLoss,
    DynamicMargin,
    LogRatio,
    PairwiseLoss,
    gap_of,
)
from fused_prefopt.losses.gaps import IMPLICIT_REFERENCES, Gap
from fused_prefopt.statistics import RunningMoments

DPO = PairwiseLoss(LogRatio(beta=0.1))
DRO = DirectRewardLoss(LogRatio(beta=0.1), log_z0=1.0)
BATCH = random_batch(8, 0, torch.float32)


class OtherReward(LogRatio):
    pass


class ChosenNll:
    needs: frozenset[str] = frozenset()

    def __call__(self, batch):
        return -batch.policy.chunk(2)[0]


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
        (dataclasses.replace(DPO, regularisers=(ChosenNll(),)), BATCH),
        (dataclasses.replace(DPO, reward=OtherReward(beta=0.1)), BATCH),
        (dataclasses.replace(DPO, link=lambda margins, targets: margins), BATCH),
        (dynamic(solver="exact"), BATCH),
        (dynamic(centered=True), BATCH),
        (dynamic(gamma=100.0, tau=1.0), BATCH),
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
    assert run_epilogue(loss, statistics, batch) is None
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
    form = pair_form(adaptive(gap))
    policy, reference, kl = {
        "ratio": (1, -1, 0),
        "policy": (1, 0, 0),
        "reference": (0, 1, 0),
        "inverse_reference": (0, -1, 0),
        "sequence_kl": (0, 0, 1),
    }[name]
    per_token = int(length_normalized and not kl)
    assert (form.gap_policy, form.gap_reference, form.gap_kl) == (policy, reference, kl)
    assert form.gap_per_token == per_token
    if isinstance(gap, Gap):
        changed = Other(gap.value, gap.needs, gap.length_normalized)
        assert pair_form(adaptive(changed)) is None


def test_a_statistic_of_another_kind_is_not_covered():
    loss = adaptive(gap_of("ratio", length_normalized=True))
    assert run_epilogue(loss, None, BATCH) is None
    assert run_epilogue(loss, dynamic().statistics(), BATCH) is None
    assert run_epilogue(dynamic(), RunningMoments(), BATCH) is None
    assert run_epilogue(DPO, RunningMoments(), BATCH) is None


def test_forms_survive_packing():
    form = PairForm(reward_reference=-1, steps=20, start=3, beta=0.1, link_b=-0.25, tau=7.0)
    integers, numbers = form.packed()
    assert all(type(value) is int for value in integers)
    assert all(type(value) is float for value in numbers)
    assert PairForm.unpacked(integers, numbers) == form


@pytest.mark.parametrize(
    ("gamma", "tau"), [(4.0, 10.0), (0.375, 10.0), (5.0, 20.0), (3.0, 3.0), (0.5, 10.0)]
)
def test_published_settings_contract(gamma, tau):
    assert contracts(gamma, tau)


def test_far_settings_do_not_contract():
    assert not contracts(20.0, 10.0)
    assert not contracts(1e6, 1e-6)
