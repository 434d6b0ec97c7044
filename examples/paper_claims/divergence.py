"""α-DPO, Figure 3: KL divergence from the reference over α, against SimPO's."""

from __future__ import annotations

from pathlib import Path

from paper_claims.experiment import Experiment, Finding
from paper_claims.intervals import above, below, interval, one_of, together
from paper_claims.label_noise import BASE, method
from paper_claims.pictures import curve, panels, save
from paper_claims.results import Results
from paper_claims.target_margin import BETA, GAMMA
from paper_claims.training import Training, training

# The range in which the paper tunes α (its appendix C.3).
ALPHAS = (0.01, 0.05, 0.1, 0.2)
SIMPO = method(BASE, 0.0)
_STABLE = 0.05


def alpha_dpo(alpha: float) -> Training:
    """α-DPO with SimPO's β and γ."""
    return training("alpha-dpo", beta=BETA, gamma=GAMMA, alpha=alpha)


def findings(results: Results) -> list[Finding]:
    """KL of chosen and of rejected completions, and accuracy."""
    found = []
    for side in ("chosen", "rejected"):
        changes = {a: interval(_changes(results, a, f"kl_{side}")) for a in ALPHAS}
        shown = "; ".join(f"α {a:g}: {change.show(1, 100)} %" for a, change in changes.items())
        limits = [below(change, _STABLE) for change in changes.values()]
        found.append(
            Finding(
                f"KL of {side} completions stays or falls as α grows",
                f"α-DPO, Figure 3{'a' if side == 'chosen' else 'b'}",
                f"against SimPO, {shown}",
                f"for every α the interval of the paired change is below +{100 * _STABLE:g} %",
                together(limits),
            )
        )
    gains = one_of([results.differences(alpha_dpo(a), SIMPO, "accuracy") for a in ALPHAS])
    shown = "; ".join(
        f"α {a:g}: {gain.show(1, 100)}" for a, gain in zip(ALPHAS, gains, strict=True)
    )
    verdicts = [above(gain) for gain in gains]
    found.append(
        Finding(
            "some α is better than SimPO",
            "α-DPO, Tables 1, 2 and Figure 5: every model gains",
            f"points of accuracy, {shown}",
            "for at least one α the interval of the paired difference, widened for the choice, is"
            " above 0; no when all are below 0",
            "yes" if "yes" in verdicts else "no" if set(verdicts) == {"no"} else "undecided",
        )
    )
    return found


def _changes(results: Results, alpha: float, metric: str) -> list[float]:
    """Relative to SimPO of the same seed."""
    base = results.values(SIMPO, metric)
    changed = results.differences(alpha_dpo(alpha), SIMPO, metric)
    return [change / value for change, value in zip(changed, base, strict=True)]


def draw(results: Results, path: Path) -> None:
    """KL on both sides and accuracy against α, each as its paired difference to SimPO's."""
    figure, axes = panels(3)
    titles = {
        "KL of chosen, relative to SimPO's": [_changes(results, a, "kl_chosen") for a in ALPHAS],
        "KL of rejected, relative to SimPO's": [
            _changes(results, a, "kl_rejected") for a in ALPHAS
        ],
        "accuracy minus SimPO's": [
            results.differences(alpha_dpo(a), SIMPO, "accuracy") for a in ALPHAS
        ],
    }
    for axis, (title, values) in zip(axes, titles.items(), strict=True):
        curve(axis, ALPHAS, values, "α-DPO")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(title)
        axis.set_xticks((0.0, 0.05, 0.1, 0.15, 0.2))
        axis.set_xlabel("α (0 is SimPO)")
    save(figure, path)


EXPERIMENT = Experiment(
    "divergence",
    "KL of α-DPO against SimPO",
    "The same β and γ, α over the range in which the paper tunes it; KL(policy ‖ reference) per"
    " token after the last step. The paper's figure follows it over the steps.",
    (SIMPO, *map(alpha_dpo, ALPHAS)),
    ("accuracy", "kl_chosen", "kl_rejected"),
    findings,
    draw,
)
