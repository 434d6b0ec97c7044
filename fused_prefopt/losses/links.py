"""Links: from reward margins and target margins to losses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from fused_prefopt.checks import require_number
from fused_prefopt.losses.protocol import Link


def logistic(
    reward_margins: Tensor, target_margins: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Bradley–Terry negative log-likelihood with a share of flipped labels.

    ``−(1−ε) log σ(m − γ) − ε log σ(γ − m)``

    Args:
        reward_margins: (P,) m.
        target_margins: (P,) γ.
        label_smoothing: ε.

    Returns:
        (P,) losses in nats.

    Source: DPO (Rafailov et al. 2023), eq. 7; ε after cDPO (Mitchell 2023).
    """
    excess = reward_margins - target_margins
    if label_smoothing == 0:
        return -logsigmoid(excess)
    # log σ(x) = log σ(−x) + x: one log-sigmoid serves both terms.
    return label_smoothing * excess - logsigmoid(excess)


@dataclass(frozen=True, kw_only=True)
class Logistic:
    """The `logistic` link with its hyperparameter.

    Args:
        label_smoothing: 0 <= ε <= 0.5, probability that a label is flipped.

    Raises:
        ValueError: `label_smoothing` is out of range.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        require_number("label_smoothing", self.label_smoothing, low=0, high=0.5)

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) losses."""
        return logistic(reward_margins, target_margins, label_smoothing=self.label_smoothing)


def robust(reward_margins: Tensor, target_margins: Tensor, *, epsilon: float) -> Tensor:
    """Log-likelihood under flipped labels, where a flipped pair must exceed the target too.

    ``−(1−ε) log σ(m − γ) − ε log σ(−m − γ)``

    Args:
        reward_margins: (P,) m.
        target_margins: (P,) γ.
        epsilon: ε.

    Returns:
        (P,) losses in nats.

    Source: cDPO (Mitchell 2023) with a target margin; `logistic` where γ is 0.
    """
    given = logsigmoid(reward_margins - target_margins)
    flipped = logsigmoid(-reward_margins - target_margins)
    return -(1 - epsilon) * given - epsilon * flipped


def unbiased_robust(reward_margins: Tensor, target_margins: Tensor, *, epsilon: float) -> Tensor:
    """The loss whose mean over labels flipped with probability ε is that of the clean labels.

    ``[−(1−ε) log σ(m − γ) + ε log σ(−m − γ)] / (1 − 2ε)``

    Args:
        reward_margins: (P,) m.
        target_margins: (P,) γ.
        epsilon: ε.

    Returns:
        (P,) losses, which may be negative.

    Source: rDPO (Chowdhury et al. 2024).
    """
    given = logsigmoid(reward_margins - target_margins)
    flipped = logsigmoid(-reward_margins - target_margins)
    return (epsilon * flipped - (1 - epsilon) * given) / (1 - 2 * epsilon)


def hinge(reward_margins: Tensor, target_margins: Tensor, *, delta: float = 1.0) -> Tensor:
    """``max(0, δ − (m − γ))``, in units of reward.

    Args:
        reward_margins: (P,) m.
        target_margins: (P,) γ.
        delta: δ.

    Returns:
        (P,) losses.

    Source: SLiC-HF (Zhao et al. 2023).
    """
    return relu(delta - (reward_margins - target_margins))


def squared(reward_margins: Tensor, target_margins: Tensor) -> Tensor:
    """``(m − γ)²``.

    Args:
        reward_margins: (P,) m.
        target_margins: (P,) γ.

    Returns:
        (P,) losses.

    Source: IPO (Azar et al. 2023), eq. 17.
    """
    return (reward_margins - target_margins).square()


@dataclass(frozen=True, kw_only=True)
class Robust:
    """The `robust` link with its hyperparameter.

    Args:
        epsilon: 0 <= ε <= 0.5, probability that a label is flipped.

    Raises:
        ValueError: `epsilon` is out of range.
    """

    epsilon: float = 0.1

    def __post_init__(self) -> None:
        require_number("epsilon", self.epsilon, low=0, high=0.5)

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) losses."""
        return robust(reward_margins, target_margins, epsilon=self.epsilon)


@dataclass(frozen=True, kw_only=True)
class UnbiasedRobust:
    """The `unbiased_robust` link with its hyperparameter.

    Args:
        epsilon: 0 <= ε < 0.5, probability that a label is flipped.

    Raises:
        ValueError: `epsilon` is out of range.
    """

    epsilon: float = 0.1

    def __post_init__(self) -> None:
        require_number("epsilon", self.epsilon, low=0, high=0.5, below=True)

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) losses."""
        return unbiased_robust(reward_margins, target_margins, epsilon=self.epsilon)


@dataclass(frozen=True, kw_only=True)
class Hinge:
    """The `hinge` link with its hyperparameter.

    Args:
        delta: δ, by how much m must exceed γ, in units of reward.

    Raises:
        ValueError: `delta` is not a finite number.
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        require_number("delta", self.delta)

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) losses."""
        return hinge(reward_margins, target_margins, delta=self.delta)


@dataclass(frozen=True, kw_only=True)
class Squared:
    """The `squared` link."""

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) losses."""
        return squared(reward_margins, target_margins)


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
