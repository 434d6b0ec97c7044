"""The table of losses, line by line: names, aliases, defaults, needs, and formulas in floats."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from loss_cases import compute, random_batch

from fused_prefopt.losses import available_losses, find, published_settings
from fused_prefopt.types import LogpBatch


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return math.exp(log_sigmoid(x))


@dataclass(frozen=True)
class Side:
    """One completion: L, |y|, L_ref, score, K, Σ log Σ p²."""

    logp: float
    tokens: int
    reference: float
    score: float
    kl: float
    collision: float

    @property
    def mean(self) -> float:
        return self.logp / self.tokens

    @property
    def ratio(self) -> float:
        return self.logp - self.reference

    @property
    def odds(self) -> float:
        return math.log(math.exp(self.mean) / (1 - math.exp(self.mean)))


def sides(batch: LogpBatch) -> list[Side]:
    columns = (batch.policy, batch.lengths, batch.reference, batch.rewards, batch.sequence_kl)
    rows = zip(*(column.tolist() for column in (*columns, batch.collision)), strict=True)
    return [Side(*row) for row in rows]


Pairs = list[tuple[Side, Side]]


def each(rule: Callable[[Side, Side], float]) -> Callable[[Pairs], list[float]]:
    return lambda pairs: [rule(w, r) for w, r in pairs]


def smoothed(m: float, epsilon: float) -> float:
    return -(1 - epsilon) * log_sigmoid(m) - epsilon * log_sigmoid(-m)


def dpo(beta: float, w: Side, r: Side) -> float:
    return beta * (w.ratio - r.ratio)


def simpo(beta: float, w: Side, r: Side) -> float:
    return beta * (w.mean - r.mean)


def robust(margin, beta: float, epsilon: float, gamma: float, unbiased: bool):
    def rule(w: Side, r: Side) -> float:
        m = margin(beta, w, r)
        kept, flipped = log_sigmoid(m - gamma), log_sigmoid(-m - gamma)
        if unbiased:
            return (-(1 - epsilon) * kept + epsilon * flipped) / (1 - 2 * epsilon)
        return -(1 - epsilon) * kept - epsilon * flipped

    return each(rule)


def cpo(beta: float, weight: float, nll: str) -> Callable[[Pairs], list[float]]:
    def rule(pairs: Pairs) -> list[float]:
        tokens = -sum(w.logp for w, _ in pairs) / sum(w.tokens for w, _ in pairs)
        found = []
        for w, r in pairs:
            term = {"sum": -w.logp, "sequence_mean": -w.mean, "token_mean": tokens}[nll]
            found.append(-log_sigmoid(beta * (w.logp - r.logp)) + weight * term)
        return found

    return rule


def odpo(beta: float, alpha: float, f: Callable[[float], float]) -> Callable[[Pairs], list[float]]:
    return each(
        lambda w, r: -log_sigmoid(dpo(beta, w, r) - alpha * f(max(w.score - r.score, 1e-6)))
    )


def cal_dpo(beta: float):
    half = 1 / (2 * beta)
    return each(
        lambda w, r: -log_sigmoid(w.ratio - r.ratio) + (w.ratio - half) ** 2 + (r.ratio + half) ** 2
    )


def beta_scaled(margin, beta: float, gamma: float, alpha: float, level: str, code: bool = False):
    def rule(pairs: Pairs) -> list[float]:
        margins = [margin(beta, w, r) for w, r in pairs]
        average = sum(margins) / len(margins)
        # Of the first batch the bias-corrected average is its own mean; the code's is still 0.
        baseline, smallest = (0.0, 1e-3 / beta) if code else (average, 1e-3)
        found = []
        for m in margins:
            scale = max(smallest, 1 + alpha * ((m if level == "pair" else average) - baseline))
            found.append(-log_sigmoid(scale * (m - gamma)))
        return found

    return rule


def alpha_dpo(
    beta: float,
    gamma: float,
    alpha: float,
    gap: Callable[[Side], float],
    *,
    reward: Callable[[Side], float] = lambda side: side.mean,
    scale: float | None = None,
    normalize: bool = True,
) -> Callable[[Pairs], list[float]]:
    def rule(pairs: Pairs) -> list[float]:
        gaps = [gap(w) - gap(r) for w, r in pairs]
        mean = sum(gaps) / len(gaps)
        std = math.sqrt(max(0.0, sum(x * x for x in gaps) / len(gaps) - mean**2))
        s = beta if scale is None else scale
        found = []
        for (w, r), value in zip(pairs, gaps, strict=True):
            z = (value - mean) / max(std, 1e-6) if normalize else value
            found.append(-log_sigmoid(beta * (reward(w) - reward(r)) - gamma - alpha * s * z))
        return found

    return rule


def gamma_po(
    margin, beta: float, gamma: float, tau: float, centre: float = 0.0, epsilon: float = 0.0
) -> Callable[[Pairs], list[float]]:
    def rule(pairs: Pairs) -> list[float]:
        margins, n = [margin(beta, w, r) for w, r in pairs], len(pairs)
        p, rate = [1 / n] * n, min(0.5 / tau, 1.0)
        for _ in range(20):
            grads = [
                tau * (1 + math.log(n * (q + 1e-10))) + gamma / (1 + math.exp(m - gamma * n * q))
                for q, m in zip(p, margins, strict=True)
            ]
            p = [q * math.exp(-rate * grad) for q, grad in zip(p, grads, strict=True)]
            p = [q / sum(p) for q in p]
        targets = [gamma * n * q - centre for q in p]
        return [smoothed(m - target, epsilon) for m, target in zip(margins, targets, strict=True)]

    return rule


def mean_ratio(side: Side) -> float:
    return side.ratio / side.tokens


# Name, options, formula of the pairs.
ROWS: list[tuple[str, dict, Callable[[Pairs], list[float]]]] = [
    ("dpo", {}, each(lambda w, r: smoothed(dpo(0.1, w, r), 0.0))),
    ("dpo", {"label_smoothing": 0.2}, each(lambda w, r: smoothed(dpo(0.1, w, r), 0.2))),
    ("simpo", {}, each(lambda w, r: smoothed(simpo(2.5, w, r) - 1.0, 0.0))),
    ("simpo", {"label_smoothing": 0.2}, each(lambda w, r: smoothed(simpo(2.5, w, r) - 1, 0.2))),
    ("robust-dpo", {}, robust(dpo, 0.1, 0.1, 0.0, False)),
    ("robust-dpo", {"gamma": 0.4, "unbiased": True}, robust(dpo, 0.1, 0.1, 0.4, True)),
    ("robust-simpo", {"beta": 2.0}, robust(simpo, 2.0, 0.1, 0.0, False)),
    (
        "robust-simpo",
        {"beta": 2.0, "gamma": 0.4, "epsilon": 0.2, "unbiased": True},
        robust(simpo, 2.0, 0.2, 0.4, True),
    ),
    ("ipo", {}, each(lambda w, r: (w.ratio - r.ratio - 5.0) ** 2)),
    (
        "ipo",
        {"length_normalized": True},
        each(lambda w, r: (w.ratio / w.tokens - r.ratio / r.tokens - 5.0) ** 2),
    ),
    ("cpo", {}, cpo(0.1, 1.0, "token_mean")),
    ("cpo", {"nll": "sum", "nll_weight": 0.3}, cpo(0.1, 0.3, "sum")),
    ("cpo", {"nll": "sequence_mean"}, cpo(0.1, 1.0, "sequence_mean")),
    ("orpo", {}, each(lambda w, r: -w.mean - 0.1 * log_sigmoid(w.odds - r.odds))),
    (
        "length-dpo",
        {},
        each(lambda w, r: -log_sigmoid(dpo(0.1, w, r) - 0.05 * (w.tokens - r.tokens))),
    ),
    ("slic-hf", {}, each(lambda w, r: max(0.0, 1 - (w.logp - r.logp)) - 0.1 * w.logp)),
    ("odpo", {}, odpo(0.1, 1.0, math.log)),
    ("odpo", {"offset": "identity", "alpha": 0.5}, odpo(0.1, 0.5, lambda x: x)),
    ("reward-distillation", {}, each(lambda w, r: (w.score - r.score - dpo(0.1, w, r)) ** 2)),
    ("cal-dpo", {}, cal_dpo(0.1)),
    ("tdpo1", {}, each(lambda w, r: -log_sigmoid(dpo(0.1, w, r) - 0.1 * (r.kl - w.kl)))),
    ("tdpo2", {}, each(lambda w, r: -log_sigmoid(dpo(0.1, w, r) - 0.05 * (r.kl - w.kl)))),
    ("beta-dpo", {}, beta_scaled(dpo, 0.1, 0.0, 0.1, "pair")),
    ("beta-dpo", {"level": "batch"}, beta_scaled(dpo, 0.1, 0.0, 0.1, "batch")),
    (
        "beta-dpo",
        {"statistics": "reference", "level": "batch", "alpha": 2.0},
        beta_scaled(dpo, 0.1, 0.0, 2.0, "batch", code=True),
    ),
    (
        "beta-simpo",
        {"statistics": "reference", "gamma": 0.3, "alpha": 20.0},
        beta_scaled(simpo, 0.1, 0.3, 20.0, "pair", code=True),
    ),
    ("beta-simpo", {}, beta_scaled(simpo, 0.1, 0.0, 0.1, "pair")),
    ("beta-simpo", {"beta": 2.0, "gamma": 0.3}, beta_scaled(simpo, 2.0, 0.3, 0.1, "pair")),
    ("alpha-dpo", {}, alpha_dpo(10, 4, 0.05, mean_ratio)),
    (
        "alpha-dpo",
        {"length_normalized": False},
        alpha_dpo(10, 4, 0.05, lambda y: y.ratio, reward=lambda y: y.logp),
    ),
    ("alpha-dpo", {"margin_scale": "unit"}, alpha_dpo(10, 4, 0.05, mean_ratio, scale=1.0)),
    ("alpha-dpo", {"normalize": False}, alpha_dpo(10, 4, 0.05, mean_ratio, normalize=False)),
    ("alpha-dpo", {"statistics": "batch"}, alpha_dpo(10, 4, 0.05, mean_ratio)),
    ("alpha-dpo", {"implicit_reference": "policy"}, alpha_dpo(10, 4, 0.05, lambda y: y.mean)),
    (
        "alpha-dpo",
        {"implicit_reference": "reference"},
        alpha_dpo(10, 4, 0.05, lambda y: y.reference / y.tokens),
    ),
    (
        "alpha-dpo",
        {"implicit_reference": "inverse_reference"},
        alpha_dpo(10, 4, 0.05, lambda y: -y.reference / y.tokens),
    ),
    ("alpha-dpo", {"implicit_reference": "sequence_kl"}, alpha_dpo(10, 4, 0.05, lambda y: -y.kl)),
    ("gamma-dpo", {"gamma": 0.5}, gamma_po(dpo, 0.1, 0.5, 10.0)),
    ("gamma-dpo", {"centered": True}, gamma_po(dpo, 0.1, 0.5, 10.0, centre=0.5)),
    ("gamma-dpo", {"label_smoothing": 0.2}, gamma_po(dpo, 0.1, 0.5, 10.0, epsilon=0.2)),
    ("gamma-simpo", {}, gamma_po(simpo, 10.0, 4.0, 10.0)),
    ("gamma-simpo", {"queue": False, "tau": 0.3}, gamma_po(simpo, 10.0, 4.0, 0.3)),
    ("dpo-positive", {}, each(lambda w, r: -log_sigmoid(dpo(0.3, w, r) - 15 * max(0, -w.ratio)))),
    ("dpo-shift", {}, each(lambda w, r: -log_sigmoid(0.1 * w.ratio - 0.095 * r.ratio))),
    (
        "alpha-po",
        {},
        each(
            lambda w, r: (
                -log_sigmoid(2.5 * (math.exp(-r.mean / 4) - math.exp(-w.mean / 4)) / 0.25 - 1.0)
            )
        ),
    ),
    (
        "wpo",
        {},
        each(
            lambda w, r: (
                -log_sigmoid(dpo(0.1, w, r))
                * math.exp((w.logp - w.collision) / w.tokens + (r.logp - r.collision) / r.tokens)
            )
        ),
    ),
]


@pytest.mark.parametrize(
    ("name", "options", "formula"), ROWS, ids=[f"{name}-{options}" for name, options, _ in ROWS]
)
def test_the_losses_of_pairs_follow_the_table(name, options, formula):
    batch = random_batch(10, seed=7)
    every = sides(batch)
    wanted = formula(list(zip(every[:5], every[5:], strict=True)))
    result = compute(find(name).build(**options), batch)
    assert result.losses.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert result.loss.item() == pytest.approx(sum(wanted) / 5, rel=1e-9)


def test_dr_dpo_follows_its_formula():
    batch = random_batch(10, seed=7)
    every = sides(batch)
    odds = [sigmoid(dpo(0.1, w, r)) for w, r in zip(every[:5], every[5:], strict=True)]
    result = compute(find("dr-dpo").build(), batch)
    assert result.loss.item() == pytest.approx(-math.log(sum(odds) / 5), rel=1e-12)


@pytest.mark.parametrize("kl", [0.7, -0.4, None])
def test_kto_follows_the_table(kl):
    given = None if kl is None else torch.tensor(kl, dtype=torch.float64)
    batch = dataclasses.replace(random_batch(9, seed=7), kl=given)
    rewards = [0.1 * side.ratio for side in sides(batch)]
    z = max(0.0, sum(rewards) / 9 if kl is None else 0.1 * kl)
    wanted = [
        2.0 * (1 - sigmoid(r - z)) if good else 3.0 * (1 - sigmoid(z - r))
        for r, good in zip(rewards, batch.desirable.tolist(), strict=True)
    ]
    result = compute(find("kto").build(desirable_weight=2.0, undesirable_weight=3.0), batch)
    assert result.losses.tolist() == pytest.approx(wanted, rel=1e-9)
    assert result.loss.item() == pytest.approx(sum(wanted) / 9, rel=1e-9)


def test_dro_follows_the_table():
    batch = random_batch(9, seed=7)
    prompts = zip(batch.prompt.tolist(), batch.prompt_reference.tolist(), strict=True)
    wanted = [
        (side.score - 0.1 * side.ratio - 0.1 * (prompt - reference + 50.0)) ** 2
        for side, (prompt, reference) in zip(sides(batch), prompts, strict=True)
    ]
    result = compute(find("dro").build(), batch)
    assert result.losses.tolist() == pytest.approx(wanted, rel=1e-12)
    members = {group: [] for group in batch.groups.tolist()}
    for group, value in zip(batch.groups.tolist(), wanted, strict=True):
        members[group].append(value)
    means = [sum(values) / len(values) for values in members.values()]
    assert result.loss.item() == pytest.approx(sum(means) / len(means), rel=1e-12)


ALPHA_DPO = {
    "beta": 10.0,
    "gamma": 4.0,
    "alpha": 0.05,
    "length_normalized": True,
    "implicit_reference": "ratio",
    "margin_scale": "beta",
    "normalize": True,
    "stop_gradient": True,
    "statistics": "ema",
    "momentum": 0.9,
    "mean": None,
    "std": None,
}
GAMMA_PO = {
    "tau": 10.0,
    "solver": "mirror",
    "steps": 20,
    "queue": True,
    "queue_size": 2048,
    "sample_size": 256,
    "seed": 0,
}
CENTERED = {"centered": False, "label_smoothing": 0.0}
BETA_DPO = {
    "beta": 0.1,
    "gamma": 0.0,
    "alpha": 0.1,
    "momentum": 0.9,
    "level": "pair",
    "statistics": "ema",
}
ROBUST = {"epsilon": 0.1, "gamma": 0.0, "unbiased": False}
KTO = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
# Aliases, needs beyond `policy` and `lengths`, hyperparameters with their defaults.
TABLE: dict[str, tuple[tuple[str, ...], tuple[str, ...], dict]] = {
    "dpo": (("sigmoid",), ("reference",), {"beta": 0.1, "label_smoothing": 0.0}),
    "simpo": ((), (), {"beta": 2.5, "gamma": 1.0, "label_smoothing": 0.0}),
    "robust-dpo": (("rdpo",), ("reference",), {"beta": 0.1, **ROBUST}),
    "robust-simpo": (("rsimpo",), (), {"beta": 2.5, **ROBUST}),
    "ipo": ((), ("reference",), {"tau": 0.1, "length_normalized": False}),
    "cpo": ((), (), {"beta": 0.1, "nll_weight": 1.0, "nll": "token_mean"}),
    "orpo": ((), (), {"weight": 0.1}),
    "length-dpo": (("r-dpo",), ("reference",), {"beta": 0.1, "alpha": 0.05}),
    "slic-hf": ((), (), {"delta": 1.0, "nll_weight": 0.1}),
    "odpo": ((), ("reference", "rewards"), {"beta": 0.1, "alpha": 1.0, "offset": "log"}),
    "reward-distillation": (("rpo",), ("reference", "rewards"), {"beta": 0.1}),
    "cal-dpo": ((), ("reference",), {"beta": 0.1}),
    "tdpo1": ((), ("reference", "sequence_kl"), {"beta": 0.1}),
    "tdpo2": ((), ("reference", "sequence_kl"), {"beta": 0.1, "alpha": 0.5}),
    "kto": ((), ("desirable", "reference"), KTO),
    "beta-dpo": ((), ("reference",), BETA_DPO),
    "beta-simpo": ((), (), BETA_DPO),
    "alpha-dpo": ((), ("reference",), ALPHA_DPO),
    "gamma-dpo": ((), ("reference",), {"beta": 0.1, "gamma": 0.5, **GAMMA_PO, **CENTERED}),
    "gamma-simpo": ((), (), {"beta": 10.0, "gamma": 4.0, **GAMMA_PO}),
    "dro": (
        (),
        ("prompt", "prompt_reference", "reference", "rewards"),
        {"beta": 0.1, "log_z0": 50.0},
    ),
}
# What TRL calls its losses of pairs and points that the table names no other way.
TRL = (
    "hinge exo_pair nca_pair bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft"
    " sigmoid_norm kto apo_zero_unpaired sigmoid ipo"
)


@pytest.mark.parametrize("name", TABLE)
def test_names_needs_and_defaults_are_the_tables(name):
    aliases, needs, defaults = TABLE[name]
    info = available_losses()[name]
    assert (info.aliases, info.needs, info.defaults) == (aliases, needs, defaults)
    assert all(find(alias).name == name for alias in aliases)


@pytest.mark.parametrize("name", TRL.split())
def test_the_losses_of_trl_go_by_its_names(name):
    assert find(name).build() is not None


def test_no_formula_of_a_loss_has_left_this_file_or_the_one_against_trl():
    listed = set(TABLE) | {find(name).name for name in TRL.split()} | {name for name, *_ in ROWS}
    # Their batches and rewards have tests of their own.
    listed |= {"dr-dpo", "f-dpo"}
    assert listed <= available_losses().keys()
    # A loss without a row is still met by every test that goes over the registry.
    assert len(listed) == 40
    assert listed >= {setting.loss for setting in published_settings().values()}
