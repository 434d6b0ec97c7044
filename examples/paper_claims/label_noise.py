"""γ-PO, Table 4 and Figure 4: methods on data with flipped labels."""

from __future__ import annotations

from pathlib import Path

from paper_claims.experiment import Experiment, Finding
from paper_claims.intervals import above, below, interval
from paper_claims.pictures import curve, panels, save
from paper_claims.results import Results
from paper_claims.target_margin import BETA, GAMMA, TAU
from paper_claims.task import FLIP_RATES
from paper_claims.training import Training, training

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


def findings(results: Results) -> list[Finding]:
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


def draw(results: Results, path: Path) -> None:
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


EXPERIMENT = Experiment(
    "label-noise",
    "Wrong labels",
    "Training pairs with 0, 10 and 20 % exchanged labels, judged on clean held-out pairs."
    " Hyperparameters are the same at every share.",
    tuple(method(name, rate) for rate in FLIP_RATES for name in PAPER),
    ("accuracy", "kl_chosen"),
    findings,
    draw,
)
