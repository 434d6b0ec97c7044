"""The claims of γ-PO's paper: γ_i against the reward gap (Figure 5), wrong labels (Table 4)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import stats

from paper_claims.findings import (
    Experiment,
    Finding,
    above,
    below,
    curve,
    fit_logistic,
    interval,
    panels,
    save,
    together,
)
from paper_claims.runs import Results
from paper_claims.trainings import FLIP_RATES, Training, training

BETA, GAMMA, TAU = 5.0, 2.0, 10.0
GAMMA_SIMPO = training("gamma-simpo", beta=BETA, gamma=GAMMA, tau=TAU)
# A pull towards equal margins as weak as γ₀: the curve shows its whole shape.
WEAK_GAMMA_SIMPO = training("gamma-simpo", beta=BETA, gamma=GAMMA, tau=GAMMA)
_SPEARMAN, _R_SQUARED = 0.95, 0.95


def target_margin_findings(results: Results) -> list[Finding]:
    """Monotone, sigmoid-like, without extremes."""
    found = []
    for what, tau in ((GAMMA_SIMPO, TAU), (WEAK_GAMMA_SIMPO, GAMMA)):
        gaps = results.values(what, "reward_margins")
        targets = results.values(what, "target_margins")
        pairs = list(zip(gaps, targets, strict=True))
        ranks = interval([stats.spearmanr(*pair).statistic for pair in pairs])
        logistic = [fit_logistic(*pair).r_squared for pair in pairs]
        line = [stats.linregress(*pair).rvalue ** 2 for pair in pairs]
        explained = interval(logistic)
        gained = interval([a - b for a, b in zip(logistic, line, strict=True)])
        low, high = min(map(min, targets)) / GAMMA, max(map(max, targets)) / GAMMA
        found += [
            Finding(
                f"γ_i rises with the reward gap (τ = {tau:g})",
                "γ-PO, Figure 5",
                f"Spearman {ranks.show()}",
                f"interval above {_SPEARMAN}",
                above(ranks, _SPEARMAN),
            ),
            Finding(
                f"and does so like a sigmoid (τ = {tau:g})",
                "γ-PO, Figure 5",
                f"R² of a logistic curve {explained.show()}, more than a line's by {gained.show()}",
                f"R² above {_R_SQUARED} and above a line's",
                together([above(explained, _R_SQUARED), above(gained)]),
            ),
            Finding(
                f"γ_i takes no extreme values (τ = {tau:g})",
                "γ-PO, Section 4.3",
                f"all γ_i between {low:.3f} γ₀ and {high:.3f} γ₀",
                "all between 0 and 2 γ₀",
                "yes" if 0 <= low and high <= 2 else "no",
            ),
        ]
    return found


def draw_target_margin(results: Results, path: Path) -> None:
    """The scatter of the first seed with its logistic curve."""
    figure, axes = panels(2)
    for axis, what, tau in zip(axes, (GAMMA_SIMPO, WEAK_GAMMA_SIMPO), (TAU, GAMMA), strict=True):
        gaps = results.values(what, "reward_margins")[0]
        targets = results.values(what, "target_margins")[0]
        fitted = fit_logistic(gaps, targets)
        x = np.linspace(min(gaps), max(gaps), 200)
        axis.scatter(gaps, targets, s=8, alpha=0.4, label="training pairs")
        axis.plot(x, fitted(x), color="C1", label="logistic fit")
        axis.axhline(GAMMA, color="black", linewidth=0.8, linestyle="--", label="γ₀")
        axis.set_title(f"τ = {tau:g}: R² = {fitted.r_squared:.3f}")
        axis.set_xlabel("reward gap r_w − r_l")
    axes[0].set_ylabel("target margin γ_i")
    save(figure, path)


BASE = "SimPO"
OURS = "γ-SimPO"
# Name → averages of Table 4 at 10 % and 20 %.
PAPER = {
    BASE: (24.9, 23.1),
    "robust SimPO": (25.9, 24.1),
    "β-SimPO": (25.5, 24.4),
    OURS: (26.3, 24.7),
}


def method(name: str, flip_rate: float) -> Training:
    """One of `PAPER`'s methods; none of them knows the share of wrong labels."""
    loss, more = {
        BASE: ("simpo", {}),
        "robust SimPO": ("robust-simpo", {"epsilon": 0.1}),
        "β-SimPO": ("beta-simpo", {"alpha": 0.1}),
        OURS: ("gamma-simpo", {"tau": TAU}),
    }[name]
    return training(loss, flip_rate, beta=BETA, gamma=GAMMA, **more)


def label_noise_findings(results: Results) -> list[Finding]:
    """What noise costs, each method against SimPO, and γ-SimPO against the best of the others."""
    cost = interval(results.differences(method(BASE, 0.2), method(BASE, 0.0), "accuracy"))
    found = [
        Finding(
            "wrong labels cost SimPO accuracy",
            "γ-PO, Figure 4",
            f"{cost.show(1, 100)} points with 20 % wrong labels",
            "interval of the paired difference below 0",
            below(cost),
        )
    ]
    for column, rate in enumerate(FLIP_RATES[1:]):
        for name in list(PAPER)[1:]:
            gain = interval(results.differences(method(name, rate), method(BASE, rate), "accuracy"))
            found.append(
                Finding(
                    f"{name} is above {BASE} with {100 * rate:g} % wrong labels",
                    f"γ-PO, Table 4: average {PAPER[name][column]} against {PAPER[BASE][column]}",
                    f"{gain.show(1, 100)} points of accuracy",
                    "interval of the paired difference above 0",
                    above(gain),
                )
            )
        found.append(_first(results, rate))
    return found


def _first(results: Results, rate: float) -> Finding:
    means = {name: interval(results.values(method(name, rate), "accuracy")).mean for name in PAPER}
    rival = max((name for name in PAPER if name != OURS), key=means.__getitem__)
    lead = interval(results.differences(method(OURS, rate), method(rival, rate), "accuracy"))
    return Finding(
        f"{OURS} is the best of the four with {100 * rate:g} % wrong labels",
        "γ-PO, Table 4: rank 1",
        f"{lead.show(1, 100)} points against {rival}, the best other",
        "interval of the paired difference to the best other above 0",
        above(lead),
    )


def draw_label_noise(results: Results, path: Path) -> None:
    """Accuracy against the share of wrong labels, and its difference to SimPO's."""
    figure, (left, right) = panels(2)
    for place, name in enumerate(PAPER):
        shifted = [100 * rate + 0.3 * place for rate in FLIP_RATES]
        points = [method(name, rate) for rate in FLIP_RATES]
        curve(left, shifted, [results.values(what, "accuracy") for what in points], name)
        if name != BASE:
            gains = [
                results.differences(what, method(BASE, rate), "accuracy")
                for what, rate in zip(points, FLIP_RATES, strict=True)
            ]
            curve(right, shifted, gains, name, color=f"C{place}")
    left.set_ylabel("accuracy on clean held-out pairs")
    right.set_ylabel(f"difference to {BASE}, paired over seeds")
    right.axhline(0, color="black", linewidth=0.8)
    for axis in (left, right):
        axis.set_xlabel("wrong labels in training, %")
    save(figure, path)


TARGET_MARGIN = Experiment(
    "target-margin",
    "γ_i against the reward gap",
    "γ-SimPO; the pairs that the last quarter of the training steps saw, with the γ_i they got in"
    " their own batch's pool. Within one pool γ_i is a rising function of the gap by the paper's"
    " equation 9; what is asked here is its shape over the gaps that training gives, and whether it"
    " stays one curve while the pools change. Once with the papers' τ, once with τ = γ₀.",
    (GAMMA_SIMPO, WEAK_GAMMA_SIMPO),
    ("accuracy", "kl_chosen"),
    target_margin_findings,
    draw_target_margin,
)
LABEL_NOISE = Experiment(
    "label-noise",
    "Wrong labels",
    "Training pairs with 0, 10 and 20 % exchanged labels, judged on clean held-out pairs."
    " Hyperparameters are the same at every share.",
    tuple(method(name, rate) for rate in FLIP_RATES for name in PAPER),
    ("accuracy", "kl_chosen"),
    label_noise_findings,
    draw_label_noise,
)
EXPERIMENTS = (TARGET_MARGIN, LABEL_NOISE)
