"""γ-PO, Figure 5: the target margin γ_i against the reward gap."""

from __future__ import annotations

from pathlib import Path

import torch

from paper_claims.curves import fit_logistic, line_r_squared, spearman
from paper_claims.experiment import Experiment, Finding
from paper_claims.intervals import above, interval, together
from paper_claims.pictures import panels, save
from paper_claims.results import Results
from paper_claims.training import training

BETA, GAMMA, TAU = 5.0, 2.0, 10.0
METHOD = training("gamma-simpo", beta=BETA, gamma=GAMMA, tau=TAU)
# A pull towards equal margins as weak as γ₀: the curve shows its whole shape.
WEAK = training("gamma-simpo", beta=BETA, gamma=GAMMA, tau=GAMMA)
_SPEARMAN, _R_SQUARED = 0.95, 0.95


def findings(results: Results) -> list[Finding]:
    """Monotone, sigmoid-like, without extremes."""
    found = []
    for what, tau in ((METHOD, TAU), (WEAK, GAMMA)):
        gaps = results.values(what, "reward_margins")
        targets = results.values(what, "target_margins")
        pairs = list(zip(gaps, targets, strict=True))
        ranks = interval([spearman(*pair) for pair in pairs])
        logistic = [fit_logistic(*pair).r_squared for pair in pairs]
        line = [line_r_squared(*pair) for pair in pairs]
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


def draw(results: Results, path: Path) -> None:
    """The scatter of the first seed with its logistic curve."""
    figure, axes = panels(2)
    for axis, what, tau in zip(axes, (METHOD, WEAK), (TAU, GAMMA), strict=True):
        gaps = results.values(what, "reward_margins")[0]
        targets = results.values(what, "target_margins")[0]
        fitted = fit_logistic(gaps, targets)
        x = torch.linspace(min(gaps), max(gaps), 200, dtype=torch.float64)
        axis.scatter(gaps, targets, s=8, alpha=0.4, label="training pairs")
        axis.plot(x.tolist(), fitted(x).tolist(), color="C1", label="logistic fit")
        axis.axhline(GAMMA, color="black", linewidth=0.8, linestyle="--", label="γ₀")
        axis.set_title(f"τ = {tau:g}: R² = {fitted.r_squared:.3f}")
        axis.set_xlabel("reward gap r_w − r_l")
    axes[0].set_ylabel("target margin γ_i")
    save(figure, path)


EXPERIMENT = Experiment(
    "target-margin",
    "γ_i against the reward gap",
    "γ-SimPO; the pairs that the last quarter of the training steps saw, with the γ_i they got in"
    " their own batch's pool. Within one pool γ_i is a rising function of the gap by the paper's"
    " equation 9; what is asked here is its shape over the gaps that training gives, and whether it"
    " stays one curve while the pools change. Once with the papers' τ, once with τ = γ₀.",
    (METHOD, WEAK),
    ("accuracy", "kl_chosen"),
    findings,
    draw,
)
