"""Rewards that are curves of a log-probability or log-ratio: what f-divergences and AlphaPO use.

Exponents stop at 80, where float32 still holds the exponential, and the gradient with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_prefopt.checks import require_number
from fused_prefopt.losses.needs import needed, per_token
from fused_prefopt.losses.rewards import Scaled
from fused_prefopt.types import LogpBatch

_LARGEST_EXPONENT = 80.0
_NEARLY_ZERO = 1e-6


def power(values: Tensor, exponent: float) -> Tensor:
    """``(exp(a·x) − 1)/a``, of limit x as a → 0: slope 1 at 0, curved upwards for a > 0.

    Args:
        values: x, any shape.
        exponent: a.

    Returns:
        The same shape.
    """
    if abs(exponent) < _NEARLY_ZERO:
        return values
    return (exponent * values).clamp(max=_LARGEST_EXPONENT).expm1() / exponent


@dataclass(frozen=True, kw_only=True)
class _RatioCurve(Scaled):
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})

    def curve(self, log_ratios: Tensor) -> Tensor:
        """(S,) f'(e^Δ) of (S,) Δ."""
        raise NotImplementedError

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(S,) rewards."""
        return self.beta * self.curve(batch.policy - needed(batch, "reference"))


@dataclass(frozen=True, kw_only=True)
class ForwardKlRatio(_RatioCurve):
    """``r = β (1 − e^−Δ)``: f'(t) = 1 − 1/t, the forward KL's.

    Args:
        beta: β > 0.

    Raises:
        ValueError: `beta` is out of range.

    Source: f-DPO (Wang et al. 2023, arXiv:2309.16240), Table 1.
    """

    def curve(self, log_ratios: Tensor) -> Tensor:
        """(S,) f'(e^Δ) of (S,) Δ."""
        return power(log_ratios, -1.0)


@dataclass(frozen=True, kw_only=True)
class JensenShannonRatio(_RatioCurve):
    """``r = β (log 2 + log σ(Δ))``: f'(t) = log(2t/(t+1)), the Jensen–Shannon divergence's.

    Args:
        beta: β > 0.

    Raises:
        ValueError: `beta` is out of range.

    Source: f-DPO (Wang et al. 2023, arXiv:2309.16240), Table 1.
    """

    def curve(self, log_ratios: Tensor) -> Tensor:
        """(S,) f'(e^Δ) of (S,) Δ."""
        return math.log(2) + logsigmoid(log_ratios)


@dataclass(frozen=True, kw_only=True)
class AlphaRatio(_RatioCurve):
    """``r = β (e^((α−1)Δ) − 1)/(α−1)``, the α-divergence's; α → 1 is DPO's.

    Args:
        beta: β > 0.
        alpha: α.

    Raises:
        ValueError: a number is out of range.

    Source: f-DPO (Wang et al. 2023, arXiv:2309.16240), Table 1, as TRL parametrises it.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("alpha", self.alpha)

    def curve(self, log_ratios: Tensor) -> Tensor:
        """(S,) f'(e^Δ) of (S,) Δ."""
        return power(log_ratios, self.alpha - 1.0)


@dataclass(frozen=True, kw_only=True)
class MeanPower(Scaled):
    """AlphaPO's reward: ``r = β (1 − p̄^−α)/α`` with ``log p̄ = L̄``; α → 0 is SimPO's.

    Args:
        beta: β > 0, reward per nat per token where p̄ = 1.
        alpha: α; positive values bend the reward down for improbable completions.

    Raises:
        ValueError: a number is out of range.

    Source: AlphaPO (Gupta et al. 2025, arXiv:2501.03884).
    """

    alpha: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("alpha", self.alpha)

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(S,) rewards."""
        return self.beta * power(per_token(batch.policy, batch), -self.alpha)
