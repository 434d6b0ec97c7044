"""The claims of DRO's paper: log Z₀ and β (Figure 2), likelihood displacement (Section 1)."""

from __future__ import annotations

from pathlib import Path

from scipy import stats

from paper_claims.findings import (
    Experiment,
    Finding,
    Interval,
    above,
    bars,
    below,
    curve,
    fixed,
    interval,
    panels,
    save,
    together,
)
from paper_claims.runs import Results
from paper_claims.trainings import Training, training

# The paper searches β from 0.05 and reports 0.1 with log Z₀ = 50.
BETAS = (0.02, 0.05, 0.1)
LOG_Z0S = (30.0, 50.0, 70.0)
_LITTLE = 0.2


def dro(beta: float, log_z0: float) -> Training:
    """DRO on the rated completions of the same pairs."""
    return training("dro", beta=beta, log_z0=log_z0)


def direct_reward_findings(results: Results) -> list[Finding]:
    """Mean, gap, and how they depend on both hyperparameters."""
    means = {beta: interval(_line(results, beta, "shift_mean")) for beta in BETAS}
    gaps = {beta: interval(_share(results, beta)) for beta in BETAS}
    wider = [
        interval(results.differences(dro(small, z), dro(large, z), "gap"))
        for small, large in zip(BETAS, BETAS[1:], strict=False)
        for z in LOG_Z0S
    ]
    slower = [
        interval(_slower(results, small, large))
        for small, large in zip(BETAS, BETAS[1:], strict=False)
    ]
    return [
        Finding(
            "larger log Z₀, smaller mean reward",
            "DRO, Figure 2a",
            f"mean Δ for each nat of log Z₀: {_show(means)}",
            "for every β the interval is below 0",
            together([below(found) for found in means.values()]),
        ),
        Finding(
            "log Z₀ has little effect on the gap",
            "DRO, Figure 2c",
            f"slope of the gap Δ_w − Δ_l over log Z₀, by the mean's: {_show(gaps)}",
            f"for every β the interval is within ±{_LITTLE}",
            together([_within(found) for found in gaps.values()]),
        ),
        Finding(
            "smaller β, larger gap",
            "DRO, Figure 2c and Section 4.5",
            f"step from one β to the next smaller one, {len(wider)} comparisons: gap larger by"
            f" {fixed(min(found.mean for found in wider), 1)} to"
            f" {fixed(max(found.mean for found in wider), 1)} nats",
            "for each comparison the interval of the paired difference is above 0",
            together([above(found) for found in wider]),
        ),
        Finding(
            "smaller β, slower fall of the chosen reward with log Z₀",
            "DRO, Figure 2b",
            "slope of β Δ_w over log Z₀, smaller β minus next larger: "
            + "; ".join(found.show() for found in slower),
            "for each step the interval is above 0",
            together([above(found) for found in slower]),
        ),
    ]


def _line(results: Results, beta: float, metric: str) -> list[float]:
    """Slope over log Z₀ for each seed."""
    columns = [results.values(dro(beta, z), metric) for z in LOG_Z0S]
    return [stats.linregress(LOG_Z0S, row).slope for row in zip(*columns, strict=True)]


def _share(results: Results, beta: float) -> list[float]:
    """Slope of the gap over that of the mean, per seed."""
    gaps, means = (_line(results, beta, metric) for metric in ("gap", "shift_mean"))
    return [gap / mean for gap, mean in zip(gaps, means, strict=True)]


def _slower(results: Results, small: float, large: float) -> list[float]:
    """Slope of the chosen reward βΔ_w at the small β minus that at the large one, per seed."""
    rewards = [
        [beta * each for each in _line(results, beta, "shift_chosen")] for beta in (small, large)
    ]
    return [one - other for one, other in zip(*rewards, strict=True)]


def _within(found: Interval) -> str:
    if -_LITTLE < found.low and found.high < _LITTLE:
        return "yes"
    return "no" if found.low > _LITTLE or found.high < -_LITTLE else "undecided"


def _show(found: dict[float, Interval]) -> str:
    return "; ".join(f"β {beta:g}: {each.show(2)}" for beta, each in found.items())


def draw_direct_reward(results: Results, path: Path) -> None:
    """The mean, the gap and the chosen reward, against log Z₀."""
    figure, axes = panels(3)
    titles = {
        "shift_mean": "mean of Δ_w and Δ_l, nats",
        "gap": "gap Δ_w − Δ_l, nats",
        "shift_chosen": "chosen reward βΔ_w",
    }
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        for place, beta in enumerate(BETAS):
            unit = beta if metric == "shift_chosen" else 1.0
            values = [[unit * x for x in results.values(dro(beta, z), metric)] for z in LOG_Z0S]
            curve(axis, [z + 0.5 * place for z in LOG_Z0S], values, f"β = {beta:g}")
        axis.set_title(title)
        axis.set_xlabel("log Z₀")
    save(figure, path)


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


def displacement_findings(results: Results) -> list[Finding]:
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


def draw_displacement(results: Results, path: Path) -> None:
    """Δ of both sides."""
    figure, axes = panels(2)
    for axis, side in zip(axes, ("chosen", "rejected"), strict=True):
        values = [results.values(what, f"shift_{side}") for what in TRAININGS]
        bars(axis, [str(what) for what in TRAININGS], values)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(f"Δ of {side} completions, nats")
    axes[1].set_yticklabels([])
    save(figure, path)


DIRECT_REWARD = Experiment(
    "direct-reward",
    "DRO's mean and gap",
    "DRO on both completions of each pair, the true one rated 1, the other 1 − severity;"
    " Δ = L − L_ref on held-out pairs. A rating s asks of prompt and completion together the"
    " log-ratio s/β − log Z₀, prompts being part of Z. The figure's units are not given; at that"
    " optimum its gap can depend on β only as a log-ratio (Δ_w − Δ_l), and its slope over log Z₀"
    " only as a reward (βΔ_w): each is measured so.",
    tuple(dro(beta, z) for beta in BETAS for z in LOG_Z0S),
    ("accuracy", "shift_chosen", "shift_rejected", "gap"),
    direct_reward_findings,
    draw_direct_reward,
)
DISPLACEMENT = Experiment(
    "displacement",
    "Likelihood displacement",
    "Δ = L − L_ref of held-out completions after DPO and after DRO on the same pairs. DRO's paper"
    " rates by a reward model without bounds and reports β = 0.1 with log Z₀ = 50; here no rating"
    " is above 1, which at that β asks every log-ratio down. Where the true continuation's target"
    " 1/β − log Z₀ is above 0, the claim can be tested.",
    TRAININGS,
    ("accuracy", "shift_chosen", "shift_rejected", "gap"),
    displacement_findings,
    draw_displacement,
)
EXPERIMENTS = (DIRECT_REWARD, DISPLACEMENT)
