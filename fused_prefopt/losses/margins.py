"""Target margins of pairs: constant, from what comes with the data, or sums of others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_prefopt.checks import require_choice, require_number
from fused_prefopt.losses.protocol import Margin, halves, needed
from fused_prefopt.statistics import Statistic
from fused_prefopt.types import LogpBatch

_SMALLEST_DIFFERENCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class StatelessMargin:
    """A margin without a history: a subclass needs `needs` and a `__call__`."""

    def statistics(self) -> None:
        """None: it needs no history."""
        return None

    def observe(self, batch: LogpBatch, reward_margins: Tensor) -> Tensor:
        """(P,) the reward margins, detached."""
        return reward_margins.detach()


@dataclass(frozen=True, kw_only=True)
class ConstantMargin(StatelessMargin):
    """One target margin γ for all pairs; 0 is DPO's.

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
class LengthMargin(StatelessMargin):
    """R-DPO's ``α (|y_w| − |y_l|)``: a longer chosen completion must win by more.

    Args:
        alpha: α, reward per token.

    Raises:
        ValueError: `alpha` is not a finite number.

    Source: R-DPO (Park et al. 2024), as in γ-PO Table 6.
    """

    alpha: float
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require_number("alpha", self.alpha)

    def __call__(self, batch: LogpBatch, reward_margins: Tensor, summary: None = None) -> Tensor:
        """(P,) target margins."""
        chosen, rejected = halves(batch.lengths.to(reward_margins.dtype))
        return self.alpha * (chosen - rejected)


@dataclass(frozen=True, kw_only=True)
class ScoreMargin(StatelessMargin):
    """The difference of the completions' scores, ``s_w − s_l``.

    Source: reward distillation (Fisch et al. 2024).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rewards"})

    def __call__(self, batch: LogpBatch, reward_margins: Tensor, summary: None = None) -> Tensor:
        """(P,) target margins."""
        chosen, rejected = halves(needed(batch, "rewards"))
        return (chosen - rejected).to(reward_margins.dtype)


@dataclass(frozen=True, kw_only=True)
class OffsetMargin(StatelessMargin):
    """ODPO's ``α f(s_w − s_l)`` with the difference at least 1e-6.

    Args:
        alpha: α, strength of the offset.
        offset: f, "log" or "identity".

    Raises:
        ValueError: an option is out of range.

    Source: ODPO (Amini et al. 2024).
    """

    alpha: float = 1.0
    offset: str = "log"
    needs: ClassVar[frozenset[str]] = frozenset({"rewards"})

    def __post_init__(self) -> None:
        require_number("alpha", self.alpha)
        require_choice("offset", self.offset, ("log", "identity"))

    def __call__(self, batch: LogpBatch, reward_margins: Tensor, summary: None = None) -> Tensor:
        """(P,) target margins."""
        chosen, rejected = halves(needed(batch, "rewards").to(reward_margins.dtype))
        difference = (chosen - rejected).clamp(min=_SMALLEST_DIFFERENCE)
        return self.alpha * (difference.log() if self.offset == "log" else difference)


@dataclass(frozen=True, kw_only=True)
class DropMargin(StatelessMargin):
    """DPO-Positive's ``scale · max(0, L_ref,w − L_w)``: a chosen completion must not become rarer.

    Args:
        scale: >= 0, reward per nat of drop.

    Raises:
        ValueError: `scale` is out of range.

    Source: DPO-Positive (Pal et al. 2024, arXiv:2402.13228).
    """

    scale: float
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})

    def __post_init__(self) -> None:
        require_number("scale", self.scale, low=0)

    def __call__(self, batch: LogpBatch, reward_margins: Tensor, summary: None = None) -> Tensor:
        """(P,) target margins, differentiable."""
        chosen, _ = halves(needed(batch, "reference") - batch.policy)
        return self.scale * chosen.relu()


@dataclass(frozen=True, kw_only=True)
class SequenceKlMargin(StatelessMargin):
    """TDPO's ``scale (K_l − K_w)``, K the summed token-level KL of a completion.

    Args:
        scale: β for TDPO1, αβ for TDPO2.
        stop_chosen: K_w is a constant (TDPO2).

    Raises:
        ValueError: `scale` is not a finite number.

    Source: TDPO (Zeng et al. 2024).
    """

    scale: float
    stop_chosen: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"sequence_kl"})

    def __post_init__(self) -> None:
        require_number("scale", self.scale)

    def __call__(self, batch: LogpBatch, reward_margins: Tensor, summary: None = None) -> Tensor:
        """(P,) target margins, differentiable where `sequence_kl` is."""
        chosen, rejected = halves(needed(batch, "sequence_kl"))
        chosen = chosen.detach() if self.stop_chosen else chosen
        return (self.scale * (rejected - chosen)).to(reward_margins.dtype)


@dataclass(frozen=True, kw_only=True)
class SumMargin:
    """``γ_i + γ'_i``: two target margins, of which each sees the reward margins without the other.

    Args:
        own: γ.
        added: γ'.

    Raises:
        ValueError: both keep a statistic.

    Source: γ-PO, section 3.2, which puts its margin into losses that have one.
    """

    own: Margin
    added: Margin

    def __post_init__(self) -> None:
        if self.own.statistics() is not None and self.added.statistics() is not None:
            raise ValueError(
                f"margin: got {type(self.added).__name__} beside {type(self.own).__name__}, each of"
                " which keeps a statistic, wanted one of them; a loss without its own is dpo or"
                " simpo"
            )

    @property
    def needs(self) -> frozenset[str]:
        """Those of both."""
        return self.own.needs | self.added.needs

    def statistics(self) -> Statistic | None:
        """That of the one that keeps one, or None."""
        return self._keeper.statistics()

    def observe(self, batch: LogpBatch, reward_margins: Tensor) -> Tensor:
        """(P,) what that one observes, detached."""
        return self._keeper.observe(batch, reward_margins)

    def __call__(self, batch: LogpBatch, reward_margins: Tensor, summary: Any) -> Tensor:
        """(P,) target margins."""
        of_own, of_added = (
            part(batch, reward_margins, summary if part is self._keeper else None)
            for part in (self.own, self.added)
        )
        return of_own + of_added

    @cached_property
    def _keeper(self) -> Margin:
        return self.own if self.own.statistics() is not None else self.added
