"""Implicit rewards of a sequence: β times a log-probability, a log-ratio, or a curve of one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_prefopt.checks import require_number
from fused_prefopt.losses.protocol import Reward, halves, needed, per_token
from fused_prefopt.types import LogpBatch

# Certain completions and empty ones have infinite log-odds: 69 nats, in every dtype.
_NEAREST_TO_CERTAIN = -1e-30
# Where float32 still holds the exponential, and the gradient with it.
_LARGEST_EXPONENT = 80.0
_NEARLY_ZERO = 1e-6


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """A reward with a positive factor β."""

    beta: float
    needs: ClassVar[frozenset[str]] = frozenset()
    per_token: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_number("beta", self.beta, low=0, above=True)


@dataclass(frozen=True, kw_only=True)
class LogRatio(Scaled):
    """DPO's reward: ``r = β (L − L_ref)``.

    Args:
        beta: β > 0, reward per nat.

    Raises:
        ValueError: `beta` is out of range.

    Source: DPO (Rafailov et al. 2023), eq. 5 without log Z, which a pair cancels.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"reference"})

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(S,) rewards."""
        return self.beta * (batch.policy - needed(batch, "reference"))


@dataclass(frozen=True, kw_only=True)
class MeanLogp(Scaled):
    """SimPO's reward: ``r = β L / |y|``, 0 for an empty completion.

    Args:
        beta: β > 0, reward per nat per token.

    Raises:
        ValueError: `beta` is out of range.

    Source: SimPO (Meng et al. 2024), eq. 4.
    """

    per_token: ClassVar[bool] = True

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(S,) rewards."""
        return self.beta * per_token(batch.policy, batch)


@dataclass(frozen=True, kw_only=True)
class SumLogp(Scaled):
    """The summed log-prob as reward: ``r = β L``.

    Args:
        beta: β > 0, reward per nat.

    Raises:
        ValueError: `beta` is out of range.

    Source: α-DPO without length normalisation (eq. 9); CPO (Xu et al. 2024).
    """

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(S,) rewards."""
        return self.beta * batch.policy


@dataclass(frozen=True, kw_only=True)
class MeanLogRatio(Scaled):
    """The log-ratio per token as reward: ``r = β (L − L_ref) / |y|``.

    Args:
        beta: β > 0, reward per nat per token.

    Raises:
        ValueError: `beta` is out of range.

    Source: IPO as TRL reads it, with average log-probs.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"reference"})
    per_token: ClassVar[bool] = True

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(S,) rewards."""
        return self.beta * per_token(batch.policy - needed(batch, "reference"), batch)


def log_ratio(*, beta: float, length_normalized: bool) -> LogRatio | MeanLogRatio:
    """The log-ratio as reward, per token if `length_normalized`."""
    return MeanLogRatio(beta=beta) if length_normalized else LogRatio(beta=beta)


@dataclass(frozen=True, kw_only=True)
class MeanProbability:
    """SimPER's reward: the inverse perplexity ``r = e^L̄``, 1 for an empty completion.

    Source: SimPER (Xiao et al. 2025, arXiv:2502.00883).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    beta: ClassVar[float] = 1.0
    per_token: ClassVar[bool] = True

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(S,) rewards."""
        return per_token(batch.policy, batch).exp()


@dataclass(frozen=True, kw_only=True)
class LogOdds:
    """ORPO's reward: the log-odds of the mean token, ``L̄ − log(1 − e^L̄)``, finite as L̄ → 0.

    Source: ORPO (Hong et al. 2024), eq. 4.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    beta: ClassVar[float] = 1.0
    per_token: ClassVar[bool] = True

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(S,) rewards."""
        means = per_token(batch.policy, batch)
        means = means.clamp(max=_NEAREST_TO_CERTAIN)
        # log(1 − e^x): each form is exact where the other cancels.
        near_zero = means > -0.693
        close = torch.where(near_zero, means, -1.0)
        far = torch.where(near_zero, -1.0, means)
        log1mexp = torch.where(near_zero, (-close.expm1()).log(), (-far.exp()).log1p())
        return means - log1mexp


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
class ChiSquaredRatio(_RatioCurve):
    """``r = β (exp clip(αΔ) + κΔ)``: f'(t) = t + log t, of the χ² and the KL divergence, α = κ = 1.

    Args:
        beta: β > 0.
        power: α > 0, of the ratio.
        kl_weight: κ > 0, of the log-ratio.
        smallest, largest: αΔ is clipped to this range in the exponent; a completion beyond it has
            the gradient of κΔ alone. `largest` is at most 80, where float32 ends.

    Raises:
        ValueError: a number is out of range.

    Source: χPO (Huang et al. 2024, arXiv:2407.13399), Algorithm 1, and φ̃ of its experiments, where
    κ is γ.
    """

    power: float = 1.0
    kl_weight: float = 1.0
    smallest: float = -88.0
    largest: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("power", self.power, low=0, above=True)
        require_number("kl_weight", self.kl_weight, low=0, above=True)
        require_number("largest", self.largest, high=_LARGEST_EXPONENT)
        require_number("smallest", self.smallest, high=self.largest, below=True)

    def curve(self, log_ratios: Tensor) -> Tensor:
        """(S,) f'(e^Δ) of (S,) Δ."""
        exponents = (self.power * log_ratios).clamp(self.smallest, self.largest)
        return exponents.exp() + self.kl_weight * log_ratios


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
    per_token: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("alpha", self.alpha)

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(S,) rewards."""
        return self.beta * power(per_token(batch.policy, batch), -self.alpha)


@dataclass(frozen=True, kw_only=True)
class RejectedShare:
    """Another reward, of which the rejected completions keep a share: ``r_w`` and ``λ r_l``.

    Args:
        reward: what is shared.
        share: 0 < λ <= 1; below 1 the rejected half weighs less, and the chosen falls less.

    Raises:
        ValueError: `share` is out of range.

    Source: DPO-Shift (Yang et al. 2025, arXiv:2502.07599), f(λ) the share.
    """

    reward: Reward
    share: float

    def __post_init__(self) -> None:
        require_number("share", self.share, low=0, high=1, above=True)

    @property
    def needs(self) -> frozenset[str]:
        """The shared reward's."""
        return self.reward.needs

    @property
    def beta(self) -> float:
        """The shared reward's."""
        return self.reward.beta

    @property
    def per_token(self) -> bool:
        """The shared reward's."""
        return self.reward.per_token

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(S,) rewards."""
        chosen, rejected = halves(self.reward(batch))
        return torch.cat([chosen, self.share * rejected])


@dataclass(frozen=True, kw_only=True)
class BoundedRatio(Scaled):
    """BDPO's reward: ``r_w = β Δ_w``, ``r_l = β log(λ e^Δ_l + 1 − λ)``, at least ``β log(1 − λ)``.

    The rejected completion's ratio is that of a mixture of policy and reference, which cannot fall
    without end.

    Args:
        beta: β > 0, reward per nat.
        mixture: 0 < λ <= 1, the policy's part; 1 is DPO's reward.

    Raises:
        ValueError: a number is out of range.

    Source: BDPO (Cho et al. 2025, arXiv:2506.12725), §4.
    """

    mixture: float = 0.5
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("mixture", self.mixture, low=0, high=1, above=True)

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(S,) rewards."""
        chosen, rejected = halves(batch.policy - needed(batch, "reference"))
        if self.mixture < 1:
            floor = math.log1p(-self.mixture)
            # log(e^a + e^b) = b − log σ(b − a), for any a.
            rejected = floor - logsigmoid(floor - math.log(self.mixture) - rejected)
        return self.beta * torch.cat([chosen, rejected])


@dataclass(frozen=True, kw_only=True)
class PerToken:
    """Another reward, divided by the completion's length: ``r / |y|``.

    Args:
        reward: of the whole completion.

    Source: IPO and sigmoid_norm under an f-divergence, as TRL reads them.
    """

    reward: Reward
    per_token: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        """The divided reward's."""
        return self.reward.needs

    @property
    def beta(self) -> float:
        """The divided reward's."""
        return self.reward.beta

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(S,) rewards."""
        return per_token(self.reward(batch), batch)
