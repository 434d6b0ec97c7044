"""Links: from reward margins m and target margins γ of pairs to their losses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from fused_prefopt.checks import require_number
from fused_prefopt.losses.protocol import Link

# Where float32 holds the exponential and a multiple of it.
_LARGEST_EXPONENT = 60.0


@dataclass(frozen=True, kw_only=True)
class Logistic:
    """Bradley–Terry negative log-likelihood with a share of flipped labels, in nats.

    ``−(1−ε) log σ(m − γ) − ε log σ(γ − m)``

    Args:
        label_smoothing: 0 <= ε <= 0.5, probability that a label is flipped.

    Raises:
        ValueError: `label_smoothing` is out of range.

    Source: DPO (Rafailov et al. 2023), eq. 7; ε after cDPO (Mitchell 2023).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        require_number("label_smoothing", self.label_smoothing, low=0, high=0.5)

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) losses."""
        excess = reward_margins - target_margins
        if self.label_smoothing == 0:
            return -logsigmoid(excess)
        # log σ(x) = log σ(−x) + x: one log-sigmoid serves both terms.
        return self.label_smoothing * excess - logsigmoid(excess)


@dataclass(frozen=True, kw_only=True)
class Robust:
    """Log-likelihood under flipped labels, where a flipped pair must exceed the target too.

    ``−(1−ε) log σ(m − γ) − ε log σ(−m − γ)``, in nats; `Logistic` where γ is 0.

    Args:
        epsilon: 0 <= ε <= 0.5, probability that a label is flipped.

    Raises:
        ValueError: `epsilon` is out of range.

    Source: cDPO (Mitchell 2023) with a target margin.
    """

    epsilon: float = 0.1

    def __post_init__(self) -> None:
        require_number("epsilon", self.epsilon, low=0, high=0.5)

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) losses."""
        given = logsigmoid(reward_margins - target_margins)
        flipped = logsigmoid(-reward_margins - target_margins)
        return -(1 - self.epsilon) * given - self.epsilon * flipped


@dataclass(frozen=True, kw_only=True)
class UnbiasedRobust:
    """The loss whose mean over labels flipped with probability ε is that of the clean labels.

    ``[−(1−ε) log σ(m − γ) + ε log σ(−m − γ)] / (1 − 2ε)``, which may be negative.

    Args:
        epsilon: 0 <= ε < 0.5, probability that a label is flipped.

    Raises:
        ValueError: `epsilon` is out of range.

    Source: rDPO (Chowdhury et al. 2024).
    """

    epsilon: float = 0.1

    def __post_init__(self) -> None:
        require_number("epsilon", self.epsilon, low=0, high=0.5, below=True)

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) losses."""
        given = logsigmoid(reward_margins - target_margins)
        flipped = logsigmoid(-reward_margins - target_margins)
        return (self.epsilon * flipped - (1 - self.epsilon) * given) / (1 - 2 * self.epsilon)


def robust(*, epsilon: float, unbiased: bool) -> Robust | UnbiasedRobust:
    """A link for labels of which a share ε is flipped; `unbiased` chooses which."""
    return UnbiasedRobust(epsilon=epsilon) if unbiased else Robust(epsilon=epsilon)


@dataclass(frozen=True, kw_only=True)
class Hinge:
    """``max(0, δ − (m − γ))``, in units of reward.

    Args:
        delta: δ, by how much m must exceed γ, in units of reward.

    Raises:
        ValueError: `delta` is not a finite number.

    Source: SLiC-HF (Zhao et al. 2023).
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        require_number("delta", self.delta)

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) losses."""
        return relu(self.delta - (reward_margins - target_margins))


@dataclass(frozen=True, kw_only=True)
class Linear:
    """``γ − m``, not bounded below unless the rewards are.

    Source: SimPER (Xiao et al. 2025, arXiv:2502.00883).
    """

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) losses."""
        return target_margins - reward_margins


@dataclass(frozen=True, kw_only=True)
class Squared:
    """``(m − γ)²``.

    Source: IPO (Azar et al. 2023), eq. 17.
    """

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) losses."""
        return (reward_margins - target_margins).square()


@dataclass(frozen=True, kw_only=True)
class Exact:
    """``KL(q ‖ p)``, the policy's preference ``q = (σ(x), σ(−x))`` from ``p = (1−ε, ε)``, in nats.

    ``x = m − γ``.

    Args:
        label_smoothing: 0 < ε <= 0.5, probability that a label is flipped.

    Raises:
        ValueError: `label_smoothing` is out of range.

    Source: EXO (Ji et al. 2024, arXiv:2402.00856), eq. 16.
    """

    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        require_number("label_smoothing", self.label_smoothing, low=0, high=0.5, above=True)

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) losses."""
        excess = reward_margins - target_margins
        kept, flipped = logsigmoid(excess), logsigmoid(-excess)
        kept_part = kept.exp() * (kept - math.log1p(-self.label_smoothing))
        return kept_part + flipped.exp() * (flipped - math.log(self.label_smoothing))


@dataclass(frozen=True, kw_only=True)
class Focal:
    """``−σ(x)^κ log σ(x)``, in nats: pairs that the policy ranks wrongly count less.

    ``x = m − γ``. The loss rises with x where ``log σ(x) < −1/κ``: such a pair is given up, and
    from κ = 1/log 2 on even one at x = 0.

    Args:
        focus: κ >= 0, the paper's γ; 0 is `Logistic`.

    Raises:
        ValueError: `focus` is out of range.

    Source: FocalPO (Liu et al. 2025, arXiv:2501.06645).
    """

    focus: float = 0.05

    def __post_init__(self) -> None:
        require_number("focus", self.focus, low=0)

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) losses."""
        log_probs = logsigmoid(reward_margins - target_margins)
        return -(self.focus * log_probs).exp() * log_probs


@dataclass(frozen=True, kw_only=True)
class Blended:
    """``−(1−s) log σ(x) + s e^−x`` with ``s = σ(x/T)``: exponential where the pair is right.

    ``x = m − γ``.

    Args:
        temperature: 0 < T <= 1; larger ones make the loss explode for pairs that are far off.

    Raises:
        ValueError: `temperature` is out of range.

    Source: DiscoPOP (Lu et al. 2024, arXiv:2406.08414), eq. 5.
    """

    temperature: float = 0.05

    def __post_init__(self) -> None:
        require_number("temperature", self.temperature, low=0, high=1, above=True)

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) losses."""
        excess = reward_margins - target_margins
        share = excess / self.temperature
        # s·e^−x as one exponential: apart they are 0·∞ for a pair that is far off.
        exponential = (logsigmoid(share) - excess).exp()
        return exponential - torch.sigmoid(-share) * logsigmoid(excess)


def _exponential(values: Tensor) -> Tensor:
    """``e^x``, from `_LARGEST_EXPONENT` on its tangent, which keeps a gradient and is finite."""
    bounded = values.clamp(max=_LARGEST_EXPONENT)
    return bounded.exp() * (1 + (values - bounded))


@dataclass(frozen=True, kw_only=True)
class BasuPower:
    """Bregman divergence of preference odds: ``R^(λ+1) / (s(λ+1)) − R^−λ / (sλ)``, ``R = e^(γ−m)``.

    ``(R + log R) / s`` for λ = 0. The slope is ``−(R^(λ+1) + R^−λ) / s``: large λ trains on pairs
    far from m = γ, on either side, and s = 4 makes it the logistic link's at m = γ. With
    ``s = 1/(λ+1)`` it is the unscaled divergence: KLIEP for λ = 0, LSIF for λ = 1. Values may be
    negative. Where R is out of its bounds, a pair does not train.

    Args:
        power: λ > −1.
        scale: s > 0.
        smallest_ratio: R >= this number, which is >= 0; it stops pairs won by ``m − γ = −log R``.
        largest_ratio: R <= this number, or None.

    Raises:
        ValueError: a number is out of range.

    Source: BPO (Kim et al. 2025, arXiv:2505.19601), eq. 10, Table 2; the bounds from C.2.
    """

    power: float = -0.5
    scale: float = 4.0
    smallest_ratio: float = 0.01
    largest_ratio: float | None = None

    def __post_init__(self) -> None:
        require_number("power", self.power, low=-1, above=True)
        require_number("scale", self.scale, low=0, above=True)
        require_number("smallest_ratio", self.smallest_ratio, low=0)
        if self.largest_ratio is not None:
            low = self.smallest_ratio
            require_number("largest_ratio", self.largest_ratio, low=low, above=True)

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) losses."""
        low = math.log(self.smallest_ratio) if self.smallest_ratio > 0 else -math.inf
        high = math.inf if self.largest_ratio is None else math.log(self.largest_ratio)
        log_ratios = (target_margins - reward_margins).clamp(min=low, max=high)
        power = self.power
        raised = _exponential((power + 1) * log_ratios) / (power + 1)
        lowered = _exponential(-power * log_ratios) / power if power else -log_ratios
        return (raised - lowered) / self.scale


@dataclass(frozen=True, kw_only=True)
class Indifferent:
    """No preference: 0 for every pair, where only the regularisers are to train."""

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) zeros; NaN for a pair without finite margins."""
        return 0 * (reward_margins - target_margins)


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """A link times a constant.

    Args:
        weight: λ >= 0.
        link: what is weighted.

    Raises:
        ValueError: `weight` is out of range.
    """

    weight: float
    link: Link = Logistic()

    def __post_init__(self) -> None:
        require_number("weight", self.weight, low=0)

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) losses."""
        return self.weight * self.link(reward_margins, target_margins)


@dataclass(frozen=True, kw_only=True)
class Clipped:
    """A link of the reward margin clipped to ±c: a pair beyond it has no gradient.

    Args:
        limit: c > 0, in units of reward.
        link: of the clipped margin.

    Raises:
        ValueError: `limit` is out of range.

    Source: χPO (Huang et al. 2024, arXiv:2407.13399), Algorithm 1, c its 2R_max.
    """

    limit: float
    link: Link = Logistic()

    def __post_init__(self) -> None:
        require_number("limit", self.limit, low=0, above=True)

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) losses."""
        return self.link(reward_margins.clamp(-self.limit, self.limit), target_margins)
