"""Form of a composed loss as numbers: no Triton here, so that callers can name it freely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from math import exp

LARGEST = 4096  # pairs, sequences or pooled margins that one program takes
LARGEST_GROUPED = 2048  # sequences with groups: those are compared all with all
# Numbers that a kernel leaves to be logged; `losses.metrics` has their names.
PAIR_NUMBERS, POINT_NUMBERS = 11, 8


class Margin(IntEnum):
    """Where the target margins come from."""

    CONSTANT = 0
    ADAPTIVE = 1
    DYNAMIC = 2


class Moments(IntEnum):
    """Where the mean and standard deviation of an adaptive margin's gap come from."""

    NONE = 0  # the gap is not standardised
    GIVEN = 1
    BATCH = 2
    CORRECTED = 3  # averages of E[x] and E[x²] over their weight
    UNCORRECTED = 4  # averages of the mean and the unbiased standard deviation


class Link(IntEnum):
    """Family of the loss; its two numbers are a and b, with x = m − γ and y = −m − γ."""

    LOGISTIC = 0  # −log σ(x)
    SMOOTHED = 1  # a x − log σ(x)
    TWO_SIDED = 2  # −a log σ(x) − b log σ(y)
    HINGE = 3  # max(0, a − x)
    SQUARED = 4  # x²


@dataclass(frozen=True)
class PairForm:
    """A composed pairwise loss.

    A reward is β v and a gap v_w − v_l, where v = policy·L + reference·L_ref, over |y| where it is
    per token.

    Attributes:
        reward_reference: coefficient of L_ref in the reward; that of L is 1.
        reward_per_token: the reward is per token.
        margin: kind of target margin.
        gap_policy, gap_reference: coefficients in the gap, each −1, 0 or 1.
        gap_per_token: the gap is per token.
        gap_kl: the gap is K_l − K_w instead.
        moments: how the gap is standardised.
        passes_gradient: the gap's gradient reaches the policy.
        update: the state is updated (training).
        link: family of the loss.
        draws: past margins to draw from the queue.
        start: index of this rank's first pair in a given pool.
        steps: mirror-descent updates.
        beta: β.
        gamma: γ, or γ₀ of a dynamic margin.
        alpha: α s of an adaptive margin.
        momentum: weight of the past.
        tau: τ of a dynamic margin.
        link_a, link_b: the link's numbers.
    """

    reward_reference: int = 0
    reward_per_token: int = 0
    margin: int = Margin.CONSTANT
    gap_policy: int = 0
    gap_reference: int = 0
    gap_per_token: int = 0
    gap_kl: int = 0
    moments: int = Moments.NONE
    passes_gradient: int = 0
    update: int = 0
    link: int = Link.LOGISTIC
    draws: int = 0
    start: int = 0
    steps: int = 0
    beta: float = 1.0
    gamma: float = 0.0
    alpha: float = 0.0
    momentum: float = 0.0
    tau: float = 1.0
    link_a: float = 0.0
    link_b: float = 0.0

    def packed(self) -> tuple[list[int], list[float]]:
        """The integers and the real numbers, in the order of the fields: an op takes such lists."""
        values = [(item.type, getattr(self, item.name)) for item in fields(self)]
        integers = [int(value) for kind, value in values if kind == "int"]
        return integers, [float(value) for kind, value in values if kind == "float"]

    @classmethod
    def unpacked(cls, integers: Sequence[int], numbers: Sequence[float]) -> PairForm:
        """The inverse of `packed`."""
        return cls(*integers, *numbers)


def mirror_rate(tau: float) -> float:
    """η of the mirror descent."""
    return min(0.5 / tau, 1.0)


def contracts(gamma: float, tau: float) -> bool:
    """Whether every update of the mirror descent shrinks errors, so that float32 can follow it.

    In ``t = log(n p)`` an update's slope lies in ``[1 − ητ − η γ₀ γ_i / 4, 1 − ητ]``, and γ_i is at
    most ``γ₀ exp(γ₀/τ)``. All published settings of γ-PO pass.
    """
    rate = mirror_rate(tau)
    return gamma <= 50 * tau and rate * gamma**2 * exp(gamma / tau) / 4 <= 2 - rate * tau
