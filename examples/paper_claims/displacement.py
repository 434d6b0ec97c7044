"""DRO, Section 1: likelihood displacement. DPO lowers what it should raise, DRO does not."""

from __future__ import annotations

from pathlib import Path

from paper_claims.direct_reward import BETAS, LOG_Z0S, dro
from paper_claims.experiment import Experiment, Finding
from paper_claims.intervals import above, below, interval
from paper_claims.pictures import bars, panels, save
from paper_claims.results import Results
from paper_claims.training import Training, training


def dpo(beta: float) -> Training:
    """DPO on the same pairs."""
    return training("dpo", beta=beta)


DPO, WEAK_DPO = dpo(0.1), dpo(BETAS[0])
# The true continuation's target, 1/β − log Z₀, is 20 nats above the reference, 40 and 60 below.
DRO = dro(BETAS[0], LOG_Z0S[0])
PUBLISHED_DRO = dro(0.1, 50.0)
LOW_DRO = dro(BETAS[-1], LOG_Z0S[-1])
TRAININGS = (DPO, WEAK_DPO, DRO, PUBLISHED_DRO, LOW_DRO)
_NAT = 1.0


def findings(results: Results) -> list[Finding]:
    """Chosen log-probs after DPO and after DRO."""
    found = []
    for what in (DPO, WEAK_DPO):
        fell = interval(results.values(what, "shift_chosen"))
        found.append(
            Finding(
                f"DPO lowers the chosen log-probs: {what}",
                "DRO, Section 1",
                f"Δ_w = {fell.show(1)} nats",
                "interval below 0",
                below(fell),
            )
        )
    for what in (DRO, PUBLISHED_DRO):
        stayed = interval(results.values(what, "shift_chosen"))
        found.append(
            Finding(
                f"DRO does not lower them: {what}",
                "DRO, Sections 1 and 3",
                f"Δ_w = {stayed.show(1)} nats",
                f"interval above −{_NAT:g}",
                above(stayed, -_NAT),
            )
        )
    better = interval(results.differences(DRO, WEAK_DPO, "shift_chosen"))
    lower = interval(results.differences(LOW_DRO, DPO, "shift_chosen"))
    return [
        *found,
        Finding(
            f"DRO keeps them above DPO's with the same β: {DRO}",
            "DRO, Figure 2b",
            f"Δ_w minus DPO's: {better.show(1)} nats",
            "interval of the paired difference above 0",
            above(better),
        ),
        Finding(
            f"with log Z₀ large enough they fall below DPO's: {LOW_DRO}",
            "DRO, Section 4.5 and Figure 2b",
            f"Δ_w minus DPO's: {lower.show(1)} nats",
            "interval of the paired difference below 0",
            below(lower),
        ),
    ]


def draw(results: Results, path: Path) -> None:
    """Δ of both sides."""
    figure, axes = panels(2)
    for axis, side in zip(axes, ("chosen", "rejected"), strict=True):
        values = [results.values(what, f"shift_{side}") for what in TRAININGS]
        bars(axis, [str(what) for what in TRAININGS], values)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(f"Δ of {side} completions, nats")
    axes[1].set_yticklabels([])
    save(figure, path)


EXPERIMENT = Experiment(
    "displacement",
    "Likelihood displacement",
    "Δ = L − L_ref of held-out completions after DPO and after DRO on the same pairs. DRO's paper"
    " rates by a reward model without bounds and reports β = 0.1 with log Z₀ = 50; here no rating"
    " is above 1, which at that β asks every log-ratio down. Where the true continuation's target"
    " 1/β − log Z₀ is above 0, the claim can be tested.",
    TRAININGS,
    ("accuracy", "shift_chosen", "shift_rejected", "gap"),
    findings,
    draw,
)
