"""What the parts of a loss promise each other."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from fused_prefopt.statistics import Statistic
from fused_prefopt.types import LogpBatch, LossOutput


class Reward(Protocol):
    """Implicit reward of every sequence."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the `LogpBatch` fields used beyond `policy` and `lengths`."""

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(S,) rewards, differentiable with respect to `batch.policy`."""


class Margin(Protocol):
    """Target margin of every pair."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the `LogpBatch` fields used beyond `policy` and `lengths`."""

    def statistics(self) -> Statistic | None:
        """A fresh statistic of the observed values, or None where the margin needs none."""

    def observe(self, batch: LogpBatch, reward_margins: Tensor) -> Tensor:
        """(P,) detached values that the statistic sees."""

    def __call__(self, batch: LogpBatch, reward_margins: Tensor, summary: Any) -> Tensor:
        """(P,) target margins; `summary` is what the statistic returned for this batch."""


class Link(Protocol):
    """Maps reward margins and target margins to losses."""

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) losses of the pairs; robust links need the two margins apart."""


class Scale(Protocol):
    """How sharply each pair is judged: a factor on its reward and target margin."""

    def statistics(self) -> Statistic:
        """A fresh statistic of the reward margins."""

    def __call__(self, reward_margins: Tensor, summary: Any) -> Tensor:
        """(P,) detached positive factors; `summary` is what the statistic returned."""


class Weighting(Protocol):
    """How much each pair counts: a factor on its loss, before the regularisers."""

    @property
    def wants(self) -> frozenset[str]:
        """Names of the `LogpBatch` fields used where they are given."""

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(P,) detached factors."""


class Regulariser(Protocol):
    """A term added to every pair's loss."""

    @property
    def coupled(self) -> bool:
        """Whether a pair's term depends on the other pairs."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the `LogpBatch` fields used beyond `policy` and `lengths`."""

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(P,) terms."""


class Loss(Protocol):
    """A pure function of per-sequence log-probs, with the recipe of its statistic."""

    @property
    def reward(self) -> Reward:
        """The implicit reward that the loss trains."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the `LogpBatch` fields used beyond `policy` and `lengths`."""

    @property
    def wants(self) -> frozenset[str]:
        """Names of the `LogpBatch` fields used where they are given."""

    @property
    def pairwise(self) -> bool:
        """Whether the batch is pairs, chosen half first."""

    @property
    def coupled(self) -> bool:
        """Whether it is more than a mean over pairs: several ranks must then see one batch."""

    def statistics(self) -> Statistic | None:
        """A fresh statistic for this loss, or None where it needs none."""

    def observe(self, batch: LogpBatch) -> Tensor | None:
        """Detached values that the statistic sees, or None where there is no statistic."""

    def __call__(self, batch: LogpBatch, summary: Any = None) -> LossOutput:
        """The loss; `summary` is what the statistic returned for this batch."""
