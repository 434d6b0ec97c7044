"""Weightings: how much a pair counts, by its likelihood, its scores or what is learnt of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_prefopt.checks import require_number
from fused_prefopt.losses.protocol import Weighting, halves, needed, per_token
from fused_prefopt.types import LogpBatch


@dataclass(frozen=True, kw_only=True)
class OnPolicyWeights:
    """WPO's ``w = exp(L̄_w − C̄_w) · exp(L̄_l − C̄_l)``: pairs the policy might write count more.

    C is `collision`, the sum over tokens of ``log Σ_v π_θ(v)²``, which makes a token sampled from
    the policy count 1; without it C = 0 and all weights are likelihoods.

    Source: WPO (Zhou et al. 2024, arXiv:2406.11827), eq. 2, with sampled alignment.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    wants: ClassVar[frozenset[str]] = frozenset({"collision"})

    @torch.no_grad()
    def __call__(self, batch: LogpBatch) -> Tensor:
        """(P,) weights, detached."""
        logps = batch.policy if batch.collision is None else batch.policy - batch.collision
        chosen, rejected = halves(per_token(logps, batch))
        return (chosen + rejected).exp()


def score_margins(batch: LogpBatch) -> Tensor:
    """(P,) ``s_w − s_l``, s the `rewards`, in the dtype of the log-probs."""
    chosen, rejected = halves(needed(batch, "rewards").to(batch.policy.dtype))
    return chosen - rejected


@dataclass(frozen=True, kw_only=True)
class QualityWeights:
    """``σ(η (s_w − s_l))``: pairs that their scores tell apart count more.

    Args:
        eta: η >= 0, per unit of score; 0 is ½ for every pair.

    Raises:
        ValueError: `eta` is out of range.

    Source: Omni-DPO (Peng et al. 2025, arXiv:2506.10054), eq. 5.
    """

    eta: float
    needs: ClassVar[frozenset[str]] = frozenset({"rewards"})
    wants: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require_number("eta", self.eta, low=0)

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(P,) weights, of no gradient."""
        return torch.sigmoid(self.eta * score_margins(batch))


@dataclass(frozen=True, kw_only=True)
class PerformanceWeights:
    """``(1 − σ(β (L̄_w − L̄_l) − τ))^γ``: pairs that the policy tells apart count less.

    A gradient flows through the weights, as through those of a focal loss.

    Args:
        beta: β > 0, per nat per token.
        tau_ref: τ, where a pair counts ``2^−γ``, in units of reward.
        focus: γ >= 0; 0 is 1 for every pair.

    Raises:
        ValueError: a number is out of range.

    Source: Omni-DPO (Peng et al. 2025, arXiv:2506.10054), eq. 10.
    """

    beta: float
    tau_ref: float
    focus: float
    needs: ClassVar[frozenset[str]] = frozenset()
    wants: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require_number("beta", self.beta, low=0, above=True)
        require_number("tau_ref", self.tau_ref)
        require_number("focus", self.focus, low=0)

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(P,) weights, differentiable."""
        chosen, rejected = halves(per_token(batch.policy, batch))
        # In the exponent a power of nearly nothing keeps its gradient.
        untold = logsigmoid(self.tau_ref - self.beta * (chosen - rejected))
        return (self.focus * untold).exp()


@dataclass(frozen=True, kw_only=True)
class ScoreMarginWeights:
    """MADPO's ``σ(c h) / σ(h)`` of ``h = s_w − s_l``, 1 for ``h <= −τ``: unsure pairs count more.

    ``c = c₀ + (c₁ − c₀) / (1 + κ e^(λ(|h| − τ)))``, ``κ = (c₁ − 1)/(1 − c₀)``: c₁ for scores that
    hardly differ, 1 where they differ by τ, c₀ far beyond. Where ``|h| < τ`` is the log-odds of the
    preference, the reward margin that is best for the weighted logistic loss is ``c h``.

    Args:
        largest: c₁ > 1.
        smallest: 0 <= c₀ < 1.
        slope: λ > 0, per unit of score.
        tau: τ >= 0, in units of score.

    Raises:
        ValueError: a number is out of range.

    Source: MADPO (Rho 2025, arXiv:2510.05342), as its author's code has it.
    """

    largest: float
    smallest: float
    slope: float
    tau: float
    needs: ClassVar[frozenset[str]] = frozenset({"rewards"})
    wants: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require_number("largest", self.largest, low=1, above=True)
        require_number("smallest", self.smallest, low=0, high=1, below=True)
        require_number("slope", self.slope, low=0, above=True)
        require_number("tau", self.tau, low=0)

    @torch.no_grad()
    def __call__(self, batch: LogpBatch) -> Tensor:
        """(P,) weights, detached."""
        margins = score_margins(batch)
        odds = math.log((self.largest - 1) / (1 - self.smallest))
        near = torch.sigmoid(self.slope * (self.tau - margins.abs()) - odds)
        amplified = (self.smallest + (self.largest - self.smallest) * near) * margins
        # As logarithms: σ(h) is 0 long before the ratio is.
        ratio = (logsigmoid(amplified) - logsigmoid(margins)).exp()
        return torch.where(margins <= -self.tau, 1.0, ratio)


@dataclass(frozen=True)
class Product:
    """The product of several weightings.

    Args:
        weightings: at least one.
    """

    weightings: tuple[Weighting, ...]

    @property
    def needs(self) -> frozenset[str]:
        """Union of the weightings' needs."""
        return frozenset[str]().union(*(each.needs for each in self.weightings))

    @property
    def wants(self) -> frozenset[str]:
        """Union of the weightings' wants."""
        return frozenset[str]().union(*(each.wants for each in self.weightings))

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(P,) weights."""
        return reduce(torch.mul, (each(batch) for each in self.weightings))
