"""Scales: how sharply a pair is judged, by how its reward margin compares with the others'."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fused_prefopt.checks import require_choice, require_number
from fused_prefopt.statistics import ReferenceLevel, RewardLevel, RunningLevel

_BASELINES: dict[str, type[RunningLevel] | type[ReferenceLevel]] = {
    "ema": RunningLevel,
    "reference": ReferenceLevel,
}


@dataclass(frozen=True, kw_only=True)
class DynamicScale:
    """β-DPO's ``ρ = sg max(ρ₀, 1 + α(M − M₀))``: β becomes ρβ. Works with any reward.

    Args:
        alpha: α >= 0, strength; 0 is the fixed β.
        momentum: of M₀, the running mean of the reward margins.
        level: M is the pair's own margin ("pair") or the mean of the global batch ("batch").
        baseline: M₀ is the bias-corrected average with the current batch ("ema") or the γ-PO
            authors' average from zero of the batches before it ("reference").
        smallest: ρ₀ > 0. The authors bound ρβ: theirs is 1e-3/β.

    Raises:
        ValueError: an option is out of range.

    Source: β-DPO (Wu et al. 2024, arXiv:2407.08639), the scale at β₀ = β.
    """

    alpha: float = 0.1
    momentum: float = 0.9
    level: str = "pair"
    baseline: str = "ema"
    smallest: float = 1e-3

    def __post_init__(self) -> None:
        require_number("alpha", self.alpha, low=0)
        require_number("momentum", self.momentum, low=0, high=1, below=True)
        require_choice("level", self.level, ("pair", "batch"))
        require_choice("baseline", self.baseline, _BASELINES)
        require_number("smallest", self.smallest, low=0, above=True)

    def statistics(self) -> RunningLevel | ReferenceLevel:
        """The running mean of the reward margins."""
        return _BASELINES[self.baseline](self.momentum)

    def __call__(self, reward_margins: Tensor, summary: RewardLevel | None) -> Tensor:
        """(P,) ρ, detached."""
        if not isinstance(summary, RewardLevel):
            raise ValueError(
                f"summary: got {type(summary).__name__}, wanted the RewardLevel that"
                " `loss.statistics()` returns for `loss.observe(batch)`"
            )
        margins = reward_margins.detach()
        if self.level == "batch":
            margins = summary.batch.to(margins.dtype).expand_as(margins)
        excess = margins - summary.average.to(margins.dtype)
        return (1 + self.alpha * excess).clamp(min=self.smallest)
