"""α-DPO, Tables 2 and 5: what each part of the method is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paper_claims.divergence import SIMPO, alpha_dpo
from paper_claims.experiment import Experiment, Finding
from paper_claims.intervals import above, below, interval
from paper_claims.pictures import bars, panels, save
from paper_claims.results import Results
from paper_claims.target_margin import BETA, GAMMA
from paper_claims.training import Training, training

ALPHA = 0.1
# Sums are about this many times means: the completions' usual length in tokens.
_LENGTH = 32
METHOD = alpha_dpo(ALPHA)


def variant(**changed: Any) -> Training:
    """α-DPO with some options changed."""
    return training("alpha-dpo", **{"beta": BETA, "gamma": GAMMA, "alpha": ALPHA, **changed})


# Name → training, and Table 2's length-controlled win rates on Llama-3-Instruct v0.2, where the
# method itself has 58.7, and on Mistral-Instruct, where it has 32.3.
VARIANTS = {
    "without α (SimPO)": (SIMPO, "55.6, 30.2"),
    "without normalisation": (variant(normalize=False), "56.5, 32.1"),
    "without stop-gradient": (variant(stop_gradient=False), "2.7, 27.2"),
    "without γ": (variant(gamma=0.0), "51.2, 31.9"),
    "reference U·π^α": (variant(implicit_reference="policy"), "57.2, 31.6"),
    "reference U·π_ref^α": (variant(implicit_reference="reference"), "56.3, 28.6"),
    "reference U·π_ref^−α": (variant(implicit_reference="inverse_reference"), "56.3, 32.2"),
}
# A z-score has no unit: its weight stays what it is with means, αβ.
_SUMS = {"length_normalized": False, "beta": BETA / _LENGTH, "margin_scale": "unit"}
SUMS = variant(**_SUMS, alpha=ALPHA * BETA)
SIMPO_SUMS = variant(**_SUMS, alpha=0.0)


def findings(results: Results) -> list[Finding]:
    """Each variant against the method, and both without length normalisation."""
    found = []
    for name, (what, paper) in VARIANTS.items():
        loss = interval(results.differences(what, METHOD, "accuracy"))
        found.append(
            Finding(
                f"{name}: worse than α-DPO",
                f"α-DPO, Table 2: {paper} against 58.7, 32.3",
                f"{loss.show(1, 100)} points of accuracy",
                "interval of the paired difference below 0",
                below(loss),
            )
        )
    gain = interval(results.differences(SUMS, SIMPO_SUMS, "accuracy"))
    found.append(
        Finding(
            "without length normalisation α-DPO is above SimPO",
            "α-DPO, Table 5: 44.4, 32.0, 51.1, 72.7 against 42.4, 30.5, 49.2, 71.2",
            f"{gain.show(1, 100)} points of accuracy",
            "interval of the paired difference above 0",
            above(gain),
        )
    )
    return found


def draw(results: Results, path: Path) -> None:
    """Accuracy differences to the method."""
    figure, (left, right) = panels(2)
    names = list(VARIANTS)
    trainings = [VARIANTS[name][0] for name in names]
    for axis, metric, label in (
        (left, "accuracy", "accuracy minus α-DPO's"),
        (right, "kl_chosen", "KL of chosen minus α-DPO's, nats per token"),
    ):
        bars(axis, names, [results.differences(what, METHOD, metric) for what in trainings])
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(label)
    right.set_yticklabels([])
    save(figure, path)


EXPERIMENT = Experiment(
    "ablation",
    "Parts of α-DPO",
    f"α = {ALPHA}; one part of the method changed at a time. Without length normalisation β is"
    f" divided by {_LENGTH}, about the completions' length, and the margins' spread αβ kept.",
    (METHOD, *(what for what, _ in VARIANTS.values()), SUMS, SIMPO_SUMS),
    ("accuracy", "kl_chosen", "gap"),
    findings,
    draw,
)
