"""The claims of α-DPO's paper: KL over α (Figure 3), what each part is worth (Tables 2, 5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paper_claims.findings import (
    Experiment,
    Finding,
    above,
    bars,
    below,
    curve,
    interval,
    one_of,
    panels,
    save,
    together,
)
from paper_claims.gamma_po import BASE, BETA, GAMMA, method
from paper_claims.runs import Results
from paper_claims.trainings import Training, training

# The range in which the paper tunes α (its appendix C.3).
ALPHAS = (0.01, 0.05, 0.1, 0.2)
SIMPO = method(BASE, 0.0)
_STABLE = 0.05


def alpha_dpo(alpha: float) -> Training:
    """α-DPO with SimPO's β and γ."""
    return training("alpha-dpo", beta=BETA, gamma=GAMMA, alpha=alpha)


def divergence_findings(results: Results) -> list[Finding]:
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


def draw_divergence(results: Results, path: Path) -> None:
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


def ablation_findings(results: Results) -> list[Finding]:
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


def draw_ablation(results: Results, path: Path) -> None:
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


DIVERGENCE = Experiment(
    "divergence",
    "KL of α-DPO against SimPO",
    "The same β and γ, α over the range in which the paper tunes it; KL(policy ‖ reference) per"
    " token after the last step. The paper's figure follows it over the steps.",
    (SIMPO, *map(alpha_dpo, ALPHAS)),
    ("accuracy", "kl_chosen", "kl_rejected"),
    divergence_findings,
    draw_divergence,
)
ABLATION = Experiment(
    "ablation",
    "Parts of α-DPO",
    f"α = {ALPHA}; one part of the method changed at a time. Without length normalisation β is"
    f" divided by {_LENGTH}, about the completions' length, and the margins' spread αβ kept.",
    (METHOD, *(what for what, _ in VARIANTS.values()), SUMS, SIMPO_SUMS),
    ("accuracy", "kl_chosen", "gap"),
    ablation_findings,
    draw_ablation,
)
EXPERIMENTS = (DIVERGENCE, ABLATION)
