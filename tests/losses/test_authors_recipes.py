"""What the authors' code does where it departs from the paper, computed again in floats."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from loss_cases import compute, random_batch

from fused_prefopt import PreferenceLoss
from fused_prefopt.losses import DynamicMargin, DynamicScale, LogRatio, PairwiseLoss, find
from fused_prefopt.statistics import ReferenceMean, RunningMean
from fused_prefopt.types import LogpBatch

SIZES = (8, 14, 2, 10)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_ratios(batch: LogpBatch) -> list[float]:
    """Δ_w − Δ_l of the pairs."""
    ratios, half = (batch.policy - batch.reference).tolist(), batch.size // 2
    return [w - r for w, r in zip(ratios[:half], ratios[half:], strict=True)]


def mean_margins(batch: LogpBatch) -> list[float]:
    """L̄_w − L̄_l of the pairs."""
    means, half = (batch.policy / batch.lengths).tolist(), batch.size // 2
    return [w - r for w, r in zip(means[:half], means[half:], strict=True)]


def assert_equal(result, batch: LogpBatch, losses: list[float], slopes: list[float]) -> None:
    """Losses of the pairs, their mean, and its slope along each chosen log-prob."""
    assert result.losses.tolist() == pytest.approx(losses, rel=1e-9, abs=1e-12)
    assert result.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    (gradient,) = torch.autograd.grad(result.loss, batch.policy)
    wanted = [slope / len(slopes) for slope in slopes]
    assert gradient[: len(slopes)].tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-14)


class GammaDpoCode:
    """γ-DPO of the γ-PO repository; its queue here starts empty, and all of it is drawn."""

    def __init__(self, beta: float, gamma: float, tau: float, epsilon: float) -> None:
        self.beta, self.gamma, self.tau, self.epsilon = beta, gamma, tau, epsilon
        self.past: list[float] = []

    def targets(self, margins: list[float]) -> list[float]:
        pool = self.past + margins
        n, rate = len(pool), min(0.5 / self.tau, 1.0)
        p, gammas = [1 / n] * n, []
        for _ in range(20):
            # What is kept are the γ_i that went into the last update.
            gammas = [self.gamma * n * q for q in p]
            grads = [
                self.tau * (1 + math.log(n * (q + 1e-10))) + self.gamma * n * sigmoid(g - m) / n
                for q, g, m in zip(p, gammas, pool, strict=True)
            ]
            p = [q * math.exp(-rate * grad) for q, grad in zip(p, grads, strict=True)]
            p = [q / sum(p) for q in p]
        self.past += margins
        return [g - self.gamma for g in gammas[-len(margins) :]]

    def step(self, batch: LogpBatch) -> tuple[list[float], list[float]]:
        margins = [self.beta * x for x in log_ratios(batch)]
        losses, slopes = [], []
        for m, target in zip(margins, self.targets(margins), strict=True):
            x, e = m - target, self.epsilon
            losses.append(-(1 - e) * math.log(sigmoid(x)) - e * math.log(sigmoid(-x)))
            slopes.append(self.beta * (e * sigmoid(x) - (1 - e) * sigmoid(-x)))
        return losses, slopes


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
@pytest.mark.parametrize("tau", [0.3, 10.0])
def test_centred_margins_are_those_of_the_code(tau, epsilon):
    code = GammaDpoCode(0.3, 1.5, tau, epsilon)
    loss = find("gamma-dpo").build(
        beta=0.3, gamma=1.5, tau=tau, steps=19, centered=True, label_smoothing=epsilon
    )
    statistics = loss.statistics()
    for seed, size in enumerate(SIZES):
        batch = random_batch(size, seed)
        assert_equal(compute(loss, batch, statistics), batch, *code.step(batch))


@pytest.mark.parametrize("solver", ["mirror", "exact"])
def test_centred_margins_are_the_papers_less_their_mean(solver):
    paper = DynamicMargin(gamma=1.5, tau=1.0, solver=solver)
    centred = dataclasses.replace(paper, centered=True)
    batch = random_batch(12)
    results = [
        compute(PairwiseLoss(LogRatio(beta=0.1), margin), batch) for margin in (paper, centred)
    ]
    wanted = results[0].target_margins - 1.5
    torch.testing.assert_close(results[1].target_margins, wanted, rtol=1e-14, atol=1e-15)
    assert results[1].target_margins.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert results[1].target_margins.abs().max() > 0.05
    # A pair without a margin takes no part: it is asked for the mean.
    poisoned = batch.policy.detach().clone()
    poisoned[2] = math.nan
    dirty = dataclasses.replace(batch, policy=poisoned)
    assert compute(PairwiseLoss(LogRatio(beta=0.1), centred), dirty).target_margins[2] == 0


class BetaCode:
    """β-DPO and β-SimPO of the γ-PO repository, where its draw takes every pair."""

    def __init__(self, margins, beta: float, gamma: float, alpha: float) -> None:
        self.margins, self.beta, self.gamma, self.alpha = margins, beta, gamma, alpha
        self.average = 0.0
        self.floored = 0

    def step(self, batch: LogpBatch, training: bool = True):
        ratios = self.margins(batch)
        level = sum(self.beta * x for x in ratios) / len(ratios)
        used = self.beta * (1 + self.alpha * (level - self.average))
        self.floored += used < 1e-3
        used = max(1e-3, used)
        excess = [used * (x - self.gamma / self.beta) for x in ratios]
        if training:
            self.average = 0.9 * self.average + 0.1 * level
        self.used = used
        losses = [-math.log(sigmoid(x)) for x in excess]
        return losses, [-used * sigmoid(-x) for x in excess]


@pytest.mark.parametrize("alpha", [0.1, 4.0])
@pytest.mark.parametrize(
    ("name", "margins", "beta", "gamma"),
    [("beta-dpo", log_ratios, 0.1, 0.0), ("beta-simpo", mean_margins, 2.0, 0.7)],
)
def test_scales_are_those_of_the_code(name, margins, beta, gamma, alpha):
    code = BetaCode(margins, beta, gamma, alpha)
    loss_fn = PreferenceLoss(
        name, beta=beta, gamma=gamma, alpha=alpha, statistics="reference", level="batch"
    )
    for seed, size in enumerate((*SIZES, *SIZES)):
        batch = random_batch(size, seed)
        losses, slopes = code.step(batch)
        if name == "beta-simpo":
            slopes = [slope / n for slope, n in zip(slopes, batch.lengths.tolist(), strict=False)]
        output = loss_fn.from_logps(batch)
        assert_equal(output, batch, losses, slopes)
        assert output.metrics["beta/mean"].item() == pytest.approx(code.used, rel=1e-9)
        # The code goes on averaging in evaluation; here it only looks.
        aside = random_batch(6, 50 + seed)
        wanted, _ = code.step(aside, training=False)
        found = loss_fn.eval().from_logps(aside).losses.tolist()
        assert found == pytest.approx(wanted, rel=1e-9)
        loss_fn.train()
    assert code.floored > 0 or alpha == 0.1


def test_a_baseline_that_was_saved_goes_on():
    def fresh() -> PreferenceLoss:
        return PreferenceLoss("beta-dpo", statistics="reference", level="batch", alpha=2.0)

    whole, first, second = fresh(), fresh(), fresh()
    for seed in range(3):
        for each in (whole, first):
            each.from_logps(random_batch(8, seed))
    second.load_state_dict(first.state_dict(), strict=True)
    for seed in range(3, 6):
        batch = random_batch(8, seed)
        assert torch.equal(whole.from_logps(batch).losses, second.from_logps(batch).losses)
    # It matters: a fresh one differs.
    batch = random_batch(8, 9)
    assert not torch.equal(whole.from_logps(batch).losses, fresh().from_logps(batch).losses)


def test_a_state_of_the_other_baseline_is_refused():
    ours, theirs = (PreferenceLoss("beta-dpo", statistics=kind) for kind in ("ema", "reference"))
    with pytest.raises(RuntimeError, match="statistics.scale.weight"):
        ours.load_state_dict(theirs.state_dict())
    with pytest.raises(RuntimeError, match="statistics.scale.weight"):
        theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("beta", [0.1, 2.5])
def test_the_bound_of_the_code_is_one_of_beta(beta):
    assert find("beta-dpo").build(beta=beta).scale == DynamicScale()
    scale = find("beta-dpo").build(beta=beta, statistics="reference").scale
    assert scale.smallest * beta == pytest.approx(1e-3, rel=1e-15)
    with pytest.raises(ValueError, match="smallest: got 0.0, wanted a finite number > 0"):
        DynamicScale(smallest=0.0)
    with pytest.raises(ValueError, match="baseline: got 'code', wanted one of 'ema', 'reference'"):
        DynamicScale(baseline="code")


def test_the_papers_form_is_the_default():
    composed = PairwiseLoss(LogRatio(beta=0.1), DynamicMargin(gamma=0.5))
    assert find("gamma-dpo").build() == composed and not composed.margin.centered
    for name in ("beta-dpo", "beta-simpo"):
        assert type(find(name).build().scale.statistics()) is RunningMean
        code = find(name).build(statistics="reference").scale
        assert type(code.statistics()) is ReferenceMean
