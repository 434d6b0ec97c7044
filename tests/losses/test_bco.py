"""BCO by hand: its losses over several batches, each way of the reward shift, and TRL's own."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from loss_cases import random_batch

from fused_prefopt import PreferenceLoss
from fused_prefopt.losses.metrics import REWARD_SHIFT

BETA, MOMENTUM = 0.3, 0.8
# The last batch of an epoch is short, and one has completions of one kind alone.
SIZES = (8, 12, 4, 6)
LAMBDAS = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
KINDS = ("none", "ema", "mean", "batch_mean")


def batches() -> list:
    found = [random_batch(size, seed) for seed, size in enumerate(SIZES)]
    found[2] = dataclasses.replace(found[2], desirable=torch.ones(4).bool())
    return found


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


class Level:
    """δ after each batch of rewards, with Python's own numbers."""

    def __init__(self, kind: str):
        self.kind, self.every, self.means = kind, [], []
        self.averages: dict[bool, tuple[float, float]] = {}

    def after(self, rewards: list[float], desirable: list[bool]) -> float:
        self.every += rewards
        self.means.append(mean(rewards))
        for which in set(desirable):
            own = [r for r, good in zip(rewards, desirable, strict=True) if good == which]
            value, weight = self.averages.get(which, (0.0, 0.0))
            self.averages[which] = (
                MOMENTUM * value + (1 - MOMENTUM) * mean(own),
                MOMENTUM * weight + (1 - MOMENTUM),
            )
        return {
            "none": 0.0,
            "ema": mean([value / weight for value, weight in self.averages.values()]),
            "mean": mean(self.every),
            "batch_mean": mean(self.means),
        }[self.kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bco-pair", "bco"])
def test_losses_and_gradients_by_hand(name, kind):
    lambdas = LAMBDAS if name == "bco" else {}
    loss_fn = PreferenceLoss(name, beta=BETA, reward_shift=kind, momentum=MOMENTUM, **lambdas)
    level = Level(kind)
    for batch in batches():
        size = batch.size
        good = (torch.arange(size) < size // 2 if name == "bco-pair" else batch.desirable).tolist()
        ratios = (batch.policy - batch.reference).tolist()
        delta = level.after([BETA * ratio for ratio in ratios], good)
        losses, slopes = [], []
        for ratio, desirable in zip(ratios, good, strict=True):
            sign = 1 if desirable else -1
            factor = lambdas.get("desirable_weight" if desirable else "undesirable_weight", 1.0)
            gap = sign * (BETA * ratio - delta)
            losses.append(-factor * log_sigmoid(gap))
            # d −log σ(gap) = −σ(−gap): δ takes no part.
            slopes.append(-factor * sign * BETA * math.exp(log_sigmoid(-gap)))
        if name == "bco-pair":
            half = size // 2
            losses = [sum(pair) for pair in zip(losses[:half], losses[half:], strict=True)]
        slopes = [slope / len(losses) for slope in slopes]
        result = loss_fn.from_logps(batch)
        (gradient,) = torch.autograd.grad(result.loss, batch.policy)
        assert result.losses.tolist() == pytest.approx(losses, rel=1e-12)
        assert result.loss.item() == pytest.approx(mean(losses), rel=1e-12)
        assert gradient.tolist() == pytest.approx(slopes, rel=1e-12)
        # Rewards are logged as they are; the shift beside them.
        assert result.rewards.tolist() == pytest.approx([BETA * ratio for ratio in ratios])
        if name == "bco" or kind != "none":
            assert result.metrics[REWARD_SHIFT].item() == pytest.approx(delta, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("name", ["bco-pair", "bco"])
def test_evaluation_reads_the_level_and_an_empty_batch_changes_nothing(name, kind):
    loss_fn = PreferenceLoss(name, reward_shift=kind)
    first, second, *_ = batches()
    # Before any training it is the batch's own.
    own = PreferenceLoss(name, reward_shift=kind).from_logps(second).metrics[REWARD_SHIFT]
    assert loss_fn.eval().from_logps(second).metrics[REWARD_SHIFT] == own
    level = loss_fn.train().from_logps(first).metrics[REWARD_SHIFT]
    state = {key: value.clone() for key, value in loss_fn.state_dict().items()}
    empty = dataclasses.replace(
        random_batch(0), policy=torch.zeros(0, dtype=torch.float64, requires_grad=True)
    )
    for batch, training in ((second, False), (empty, True)):
        result = loss_fn.train(training).from_logps(batch)
        assert result.metrics[REWARD_SHIFT] == level
    assert result.loss == 0
    assert all(torch.equal(value, state[key]) for key, value in loss_fn.state_dict().items())


@pytest.mark.parametrize("name", ["bco-pair", "bco"])
def test_weights_do_not_move_the_level(name):
    # UDM's weights are given as weights of the rows: each loss counts so often, δ sees all alike.
    batch = random_batch()
    weights = torch.linspace(0.2, 2, 4, dtype=torch.float64).repeat(2)
    plain, weighted = (PreferenceLoss(name, reward_shift="mean") for _ in range(2))
    losses = plain.from_logps(batch).losses
    result = weighted.from_logps(dataclasses.replace(batch, weights=weights))
    torch.testing.assert_close(result.losses, losses, rtol=0, atol=0)
    wanted = (weights[: losses.shape[0]] * losses).mean()
    torch.testing.assert_close(result.loss, wanted, rtol=1e-12, atol=0)


def test_the_single_completions_equal_trls_trainer():
    module = pytest.importorskip("trl.experimental.bco.bco_trainer")
    accelerator = SimpleNamespace(use_distributed=False)
    trainer = SimpleNamespace(
        beta=BETA,
        running=module.RunningMoments(accelerator),
        match_underlying_distribution=True,
        _get_udm_weight=lambda embeddings: embeddings,
    )
    loss_fn = PreferenceLoss("bco", beta=BETA, reward_shift="mean")
    for number, batch in enumerate(batches()):
        good = batch.desirable
        weights = torch.ones(batch.size, dtype=torch.float64)
        weights[~good] = torch.linspace(0.5, 1.5, int((~good).sum()), dtype=torch.float64)
        training = number != 1
        theirs, *_, delta = module.BCOTrainer.bco_loss(
            trainer,
            batch.policy[good],
            batch.policy[~good],
            batch.reference[good],
            batch.reference[~good],
            None,
            weights[~good],
            do_train=training,
        )
        result = loss_fn.train(training).from_logps(dataclasses.replace(batch, weights=weights))
        # TRL keeps the mean of its rewards in float32.
        torch.testing.assert_close(result.loss, theirs.mean(), rtol=1e-6, atol=0)
        gradients = [
            torch.autograd.grad(loss, batch.policy, retain_graph=True)[0]
            for loss in (result.loss, theirs.mean())
        ]
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
        assert result.metrics[REWARD_SHIFT].item() == pytest.approx(float(delta), rel=1e-6)
