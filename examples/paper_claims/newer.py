"""The claims of SimPER, RePO and FocalPO, under wrong labels, beside what they compare with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from paper_claims import alpha_dpo, dro, gamma_po
from paper_claims.findings import Experiment, Finding, above, curve, interval, panels, save
from paper_claims.runs import Results
from paper_claims.trainings import FLIP_RATES, Training, training

# Name → the training with correct labels; the others have the same hyperparameters.
_CLEAN = {
    gamma_po.BASE: alpha_dpo.SIMPO,
    "DPO": dro.DPO,
    "α-DPO": alpha_dpo.METHOD,
    gamma_po.OURS: gamma_po.GAMMA_SIMPO,
    "SimPER": training("simper"),
    # SimPO's target margin in nats per token.
    "RePO": training("repo", gamma=gamma_po.GAMMA / gamma_po.BETA),
    "FocalPO": training("focal-po", beta=dict(dro.DPO.hyperparameters)["beta"], focus=0.05),
}
OLDER, NEWER = list(_CLEAN)[:4], list(_CLEAN)[4:]


@dataclass(frozen=True)
class Comparison:
    """A paper's claim that its loss is above another one."""

    newer: str
    older: str
    paper: str


COMPARISONS = (
    Comparison("SimPER", "SimPO", "SimPER, abstract: up to 5.7 points on AlpacaEval 2"),
    Comparison("SimPER", "DPO", "SimPER, abstract: consistently above existing approaches"),
    Comparison("RePO", "SimPO", "RePO (first version), abstract: above it on AlpacaEval 2"),
    Comparison("RePO", "DPO", "RePO (first version), abstract: above it on AlpacaEval 2"),
    Comparison("FocalPO", "DPO", "FocalPO, abstract: above it on AlpacaEval 2"),
)


def method(name: str, flip_rate: float) -> Training:
    """One of the losses; none of them knows the share of wrong labels."""
    return replace(_CLEAN[name], flip_rate=flip_rate)


def findings(results: Results) -> list[Finding]:
    """Every comparison, at every share of wrong labels."""
    found = []
    for rate in FLIP_RATES:
        labels = f"{100 * rate:g} % wrong labels" if rate else "correct labels"
        for each in COMPARISONS:
            gain = interval(_gains(results, each.newer, each.older, rate))
            found.append(
                Finding(
                    f"{each.newer} is above {each.older} with {labels}",
                    each.paper,
                    f"{gain.show(1, 100)} points of accuracy",
                    "interval of the paired difference above 0",
                    above(gain),
                )
            )
    return found


def _gains(results: Results, newer: str, older: str, rate: float) -> list[float]:
    return results.differences(method(newer, rate), method(older, rate), "accuracy")


def draw(results: Results, path: Path) -> None:
    """Accuracy of all against the share of wrong labels, and what the newer gain on each older."""
    figure, axes = panels(1 + len(OLDER))
    for place, name in enumerate(_CLEAN):
        values = [results.values(method(name, rate), "accuracy") for rate in FLIP_RATES]
        curve(axes[0], _shifted(place), values, name, linestyle="--" if name in OLDER else "-")
    axes[0].set_title("accuracy")
    for axis, older in zip(axes[1:], OLDER, strict=True):
        for place, newer in enumerate(NEWER):
            gains = [_gains(results, newer, older, rate) for rate in FLIP_RATES]
            curve(axis, _shifted(place), gains, newer, color=f"C{len(OLDER) + place}")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(f"minus {older}'s, paired")
    low, high = zip(*(axis.get_ylim() for axis in axes[1:]), strict=True)
    for axis in axes:
        axis.set_xlabel("wrong labels in training, %")
        if axis is not axes[0]:
            axis.set_ylim(min(low), max(high))
    save(figure, path)


def _shifted(place: int) -> list[float]:
    """The shares in percent, a little beside one another."""
    return [100 * rate + 0.3 * place for rate in FLIP_RATES]


NEW_LOSSES = Experiment(
    "new-losses",
    "New losses under wrong labels",
    "Three losses of 2025 on the pairs of the study above. SimPER and RePO, because their papers"
    " claim to be above SimPO and DPO with fewer hyperparameters, and SimPER's loss cannot leave"
    " [−1, 1], so that no wrong pair costs much. FocalPO, because it gives less weight to pairs"
    " that the policy ranks against their label, as it does most wrong ones. Of the other losses"
    " of that time here, Omni-DPO and MADPO need scores, ε-DPO needs the reference's logits at"
    " every step, and χPO, BDPO and BPO promise something else first: less over-optimisation,"
    " chosen log-probs that stay, more diverse samples. SimPER has no hyperparameters; RePO has"
    " SimPO's target margin γ/β, in nats per token; FocalPO has DPO's β and its paper's γ, here"
    " `focus`. The papers' claims are about their data as they are; each is asked here with 0, 10"
    " and 20 % wrong labels. How the three stand to α-DPO and γ-SimPO, the picture shows.",
    tuple(method(name, rate) for rate in FLIP_RATES for name in _CLEAN),
    ("accuracy", "kl_chosen"),
    findings,
    draw,
)
EXPERIMENTS = (NEW_LOSSES,)
