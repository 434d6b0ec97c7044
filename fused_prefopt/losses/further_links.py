"""Links beyond the Bradley–Terry ones: EXO's divergence, DiscoPOP's blend, and none at all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_prefopt.checks import require_number


def exact(reward_margins: Tensor, target_margins: Tensor, *, label_smoothing: float) -> Tensor:
    """``KL(q ‖ p)``, the policy's preference ``q = (σ(x), σ(−x))`` from ``p = (1−ε, ε)``.

    Args:
        reward_margins: (P,) m, of ``x = m − γ``.
        target_margins: (P,) γ.
        label_smoothing: ε.

    Returns:
        (P,) losses in nats.

    Source: EXO (Ji et al. 2024, arXiv:2402.00856), eq. 16.
    """
    excess = reward_margins - target_margins
    kept, flipped = logsigmoid(excess), logsigmoid(-excess)
    kept_part = kept.exp() * (kept - math.log1p(-label_smoothing))
    return kept_part + flipped.exp() * (flipped - math.log(label_smoothing))


@dataclass(frozen=True, kw_only=True)
class Exact:
    """The `exact` link with its hyperparameter.

    Args:
        label_smoothing: 0 < ε <= 0.5, probability that a label is flipped.

    Raises:
        ValueError: `label_smoothing` is out of range.
    """

    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        require_number("label_smoothing", self.label_smoothing, low=0, high=0.5, above=True)

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) losses."""
        return exact(reward_margins, target_margins, label_smoothing=self.label_smoothing)


def blended(reward_margins: Tensor, target_margins: Tensor, *, temperature: float) -> Tensor:
    """``−(1−s) log σ(x) + s e^−x`` with ``s = σ(x/T)``: exponential where the pair is right.

    Args:
        reward_margins: (P,) m, of ``x = m − γ``.
        target_margins: (P,) γ.
        temperature: T.

    Returns:
        (P,) losses.

    Source: DiscoPOP (Lu et al. 2024, arXiv:2406.08414), eq. 5.
    """
    excess = reward_margins - target_margins
    share = excess / temperature
    # s·e^−x as one exponential: apart they are 0·∞ for a pair that is far off.
    exponential = (logsigmoid(share) - excess).exp()
    return exponential - torch.sigmoid(-share) * logsigmoid(excess)


@dataclass(frozen=True, kw_only=True)
class Blended:
    """The `blended` link with its hyperparameter.

    Args:
        temperature: 0 < T <= 1; larger ones make the loss explode for pairs that are far off.

    Raises:
        ValueError: `temperature` is out of range.
    """

    temperature: float = 0.05

    def __post_init__(self) -> None:
        require_number("temperature", self.temperature, low=0, high=1, above=True)

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) losses."""
        return blended(reward_margins, target_margins, temperature=self.temperature)


@dataclass(frozen=True, kw_only=True)
class Indifferent:
    """No preference: 0 for every pair, where only the regularisers are to train."""

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) zeros; NaN for a pair without finite margins."""
        return 0 * (reward_margins - target_margins)
