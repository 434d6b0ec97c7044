"""Target margins: what a pair's reward margin is asked to exceed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_prefopt.checks import require_choice, require_count, require_number
from fused_prefopt.losses.gaps import Gap, SequenceKlGap
from fused_prefopt.losses.solver import EXACT_RATIO, exact_margins, mirror_margins
from fused_prefopt.statistics import (
    BatchMoments,
    DatasetMoments,
    MarginPool,
    MarginQueue,
    Moments,
    ReferenceMoments,
    RunningMoments,
    Statistic,
)
from fused_prefopt.types import LogpBatch


@dataclass(frozen=True, kw_only=True)
class StatelessMargin:
    """What margins without a history share."""

    def statistics(self) -> None:
        """None: it needs no history."""
        return None

    def observe(self, batch: LogpBatch, reward_margins: Tensor) -> Tensor:
        """(P,) the reward margins, detached."""
        return reward_margins.detach()


@dataclass(frozen=True, kw_only=True)
class ConstantMargin(StatelessMargin):
    """The same target margin γ for every pair; 0 is DPO's.

    Args:
        gamma: γ, in units of reward.

    Raises:
        ValueError: `gamma` is not a finite number.

    Source: SimPO (Meng et al. 2024), eq. 5.
    """

    gamma: float = 0.0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require_number("gamma", self.gamma)

    def __call__(self, batch: LogpBatch, reward_margins: Tensor, summary: None = None) -> Tensor:
        """(P,) γ for every pair."""
        return torch.full_like(reward_margins, self.gamma)


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Where the mean and standard deviation of α-DPO's z-score come from.

    Args:
        statistics: "ema", "batch", "dataset" or "reference".
        momentum: weight of the past, for "ema" and "reference".
        mean: μ, for "dataset" alone.
        std: σ > 0, for "dataset" alone.

    Raises:
        ValueError: an option is out of range, missing, or has no effect.

    Source: α-DPO, eq. 11.
    """

    statistics: str = "ema"
    momentum: float = 0.9
    mean: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        require_choice("statistics", self.statistics, ("ema", "batch", "dataset", "reference"))
        require_number("momentum", self.momentum, low=0, high=1, below=True)
        given = self.mean is not None or self.std is not None
        if given and self.statistics != "dataset":
            raise ValueError(
                f"mean, std: got {self.mean}, {self.std}, wanted None unless statistics='dataset'"
            )
        if self.statistics == "dataset":
            if self.mean is None or self.std is None:
                raise ValueError("statistics: 'dataset' needs `mean` and `std` of the gap")
            require_number("mean", self.mean)
            require_number("std", self.std, low=0, above=True)

    def build(self) -> Statistic:
        """A fresh statistic."""
        if self.mean is not None and self.std is not None:
            return DatasetMoments(self.mean, self.std)
        if self.statistics == "batch":
            return BatchMoments()
        kinds = {"ema": RunningMoments, "reference": ReferenceMoments}
        return kinds[self.statistics](self.momentum)


@dataclass(frozen=True, kw_only=True)
class AdaptiveMargin:
    """α-DPO's margin: it follows the gap between policy and reference.

    ``sg[γ + α s z]`` with ``z = (gap − μ)/σ``, or ``z = gap`` without normalisation.

    Args:
        gap: the pair's gap, per token or summed.
        gamma: γ, in units of reward.
        alpha: α, strength of the adaptation.
        scale: s, in units of reward.
        normalisation: of the gap, or None.
        stop_gradient: the margin is a constant of the step; False lets the gap's gradient pass
            (μ and σ stay constants).

    Raises:
        ValueError: a number is not finite.

    Source: α-DPO, eq. 9–12.
    """

    gap: Gap | SequenceKlGap
    gamma: float
    alpha: float
    scale: float = 1.0
    normalisation: Normalisation | None = Normalisation()
    stop_gradient: bool = True

    def __post_init__(self) -> None:
        require_number("gamma", self.gamma)
        require_number("alpha", self.alpha)
        require_number("scale", self.scale)

    @property
    def needs(self) -> frozenset[str]:
        """The gap's."""
        return self.gap.needs

    def statistics(self) -> Statistic | None:
        """Moments of the gap, or None without normalisation."""
        return None if self.normalisation is None else self.normalisation.build()

    def observe(self, batch: LogpBatch, reward_margins: Tensor) -> Tensor:
        """(P,) the gaps, detached."""
        return self.gap(batch).detach()

    def __call__(self, batch: LogpBatch, reward_margins: Tensor, summary: Moments | None) -> Tensor:
        """(P,) target margins."""
        z = self.gap(batch)
        if self.normalisation is not None:
            z = _summary(summary, Moments).standardise(z)
        margins = self.gamma + self.alpha * self.scale * z
        return margins.detach() if self.stop_gradient else margins


@dataclass(frozen=True, kw_only=True)
class DynamicMargin:
    """γ-PO's margin: a budget of mean γ₀, shared over pairs by their reward margins.

    Confident pairs are asked for more, ambiguous ones for less; always detached. Works with any
    reward.

    Args:
        gamma: γ₀ >= 0, the mean target margin, in units of reward.
        tau: τ > 0, pull towards equal margins.
        solver: "mirror", the paper's descent, or "exact", the minimum it descends to, for
            ``γ₀/τ <= 10``.
        steps: mirror-descent updates.
        queue: fill the pool with past margins (Algorithm 2) or use the batch alone (Algorithm 1).
        queue_size: past margins remembered.
        sample_size: the pool is filled up to this size.
        seed: of the sampling.
        centered: the target margins are γ_i − γ₀, of mean 0: the authors' code of γ-DPO.

    Raises:
        ValueError: an option is out of range.

    Source: γ-PO, eq. 9–10 and 22–25, Algorithms 1 and 2.
    """

    gamma: float
    tau: float = 10.0
    solver: str = "mirror"
    steps: int = 20
    queue: bool = True
    queue_size: int = 2048
    sample_size: int = 256
    seed: int = 0
    centered: bool = False
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require_number("gamma", self.gamma, low=0)
        require_number("tau", self.tau, low=0, above=True)
        require_choice("solver", self.solver, ("mirror", "exact"))
        if self.solver == "exact" and self.gamma > EXACT_RATIO * self.tau:
            raise ValueError(
                f"tau: got {self.tau} with gamma {self.gamma}, wanted at least"
                f" gamma / {EXACT_RATIO:g} for the exact solver"
            )
        require_count("steps", self.steps, low=1)
        require_count("queue_size", self.queue_size, low=1)
        require_count("sample_size", self.sample_size, low=1)
        require_count("seed", self.seed)

    def statistics(self) -> MarginQueue:
        """The queue of past margins; of size 0 with ``queue=False``."""
        return MarginQueue(self.queue_size if self.queue else 0, self.sample_size, self.seed)

    def observe(self, batch: LogpBatch, reward_margins: Tensor) -> Tensor:
        """(P,) the reward margins, detached."""
        return reward_margins.detach()

    def solve(self, margins: Tensor) -> Tensor:
        """(n,) float64 γ_i, of mean γ₀, of a pool of (n,) reward margins."""
        if self.solver == "exact":
            return exact_margins(margins, gamma=self.gamma, tau=self.tau)
        return mirror_margins(margins, gamma=self.gamma, tau=self.tau, steps=self.steps)

    def __call__(
        self, batch: LogpBatch, reward_margins: Tensor, summary: MarginPool | None
    ) -> Tensor:
        """(P,) target margins."""
        pool = _summary(summary, MarginPool)
        target_margins = pool.local(self.solve(pool.margins), reward_margins.shape[0])
        if self.centered:
            target_margins = target_margins - self.gamma
        return target_margins.to(reward_margins.dtype)


def _summary(summary: Any, kind: type[Any]) -> Any:
    if not isinstance(summary, kind):
        raise ValueError(
            f"summary: got {type(summary).__name__}, wanted the {kind.__name__} that"
            " `loss.statistics()` returns for `loss.observe(batch)`"
        )
    return summary
