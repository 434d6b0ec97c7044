"""Interfaces between the parts of a loss, and the fields of a batch that they need."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from fused_prefopt.statistics import Statistic
from fused_prefopt.types import LogpBatch, LossOutput, divisors

WHAT_IT_IS = {
    "reference": "(S,) summed log-probs of the completions under the reference model",
    "rewards": "(S,) scores of the completions from a reward model, rule or annotator",
    "desirable": "(S,) bool, whether each completion is a desired one",
    "kl": "a scalar estimate of KL(policy || reference)",
    "prompt": "(S,) summed log-probs of the prompts, first token excluded, under the policy",
    "prompt_reference": "(S,) the prompts' summed log-probs under the reference model",
    "prompt_lengths": "(S,) integers, tokens of the prompts, first ones excluded",
    "groups": "(S,) integers, equal for the completions of one prompt",
    "completions": "(S,) integers, equal where two pairs have one completion; made of `groups`",
    "sequence_kl": "(S,) sums over tokens of KL(reference || policy)",
    "extrapolated": "(S,) summed log-probs under softmax((1+ε) z − ε z_ref), z the logits",
    "interpolated": "(S,) summed log-probs under softmax((1−ε) z + ε z_ref), z the logits",
    "collision": "(S,) sums over tokens of log Σ π(v)²; `PreferenceLoss` computes it if need be",
    "weights": "(S,) numbers >= 0, how much each pair or completion counts",
    "gold": "(S,) summed log-probs of a third, best completion of each prompt, a row's `gold_ids`",
    "gold_lengths": "(S,) integers, tokens of those completions",
}

# Those that are made of both models' logits, so of the reference at every step.
OF_BOTH_HEADS = frozenset({"sequence_kl", "extrapolated", "interpolated"})


def check_needs(name: str, needs: Iterable[str], given: Collection[str]) -> None:
    """Raise ValueError, naming the loss and the field, unless all of `needs` are `given`.

    Args:
        name: who needs them, for the message.
        needs: `LogpBatch` fields.
        given: the fields that are not None, such as `LogpBatch.given`.

    Raises:
        ValueError: a field is missing.
    """
    for field in sorted(needs):
        if field not in given:
            raise ValueError(f"{name} needs `{field}`: {WHAT_IT_IS[field]}")


def needed(batch: LogpBatch, field: str) -> Tensor:
    """The named field of `batch`; ValueError if the batch comes without it."""
    check_needs("this loss", (field,), batch.given)
    value: Tensor = getattr(batch, field)
    return value


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen and rejected half of a pairwise field.

    Args:
        values: (S,), chosen first.

    Returns:
        Two views, (S/2,) each.

    Raises:
        ValueError: S is odd.
    """
    size = values.shape[0]
    if size % 2:
        raise ValueError(
            f"policy: got {size} sequences, wanted an even number: chosen first, then rejected"
        )
    return values[: size // 2], values[size // 2 :]


def per_token(values: Tensor, batch: LogpBatch) -> Tensor:
    """``values / lengths``, (S,): an empty completion, of sum 0, has mean 0."""
    return values / divisors(batch.lengths)


Summary = TypeVar("Summary")


def expect(summary: Any, kind: type[Summary], otherwise: str = "") -> Summary:
    """The summary of a statistic, which must be of its kind.

    Args:
        summary: what a loss was called with.
        kind: what its statistic returns.
        otherwise: what would do in its place, for the message.

    Raises:
        ValueError: it is something else, or missing.
    """
    if not isinstance(summary, kind):
        raise ValueError(
            f"summary: got {type(summary).__name__}, wanted the {kind.__name__} that"
            f" `loss.statistics()` returns for `loss.observe(batch)`{otherwise}"
        )
    return summary


class Reward(Protocol):
    """Implicit reward of every sequence."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the `LogpBatch` fields used beyond `policy` and `lengths`."""

    @property
    def beta(self) -> float:
        """Factor β: reward per nat, or per nat per token; 1 for a reward without one."""

    @property
    def per_token(self) -> bool:
        """Whether it is one of the mean token instead of the whole completion."""

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(S,) rewards, differentiable with respect to `batch.policy`."""


@runtime_checkable
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


@dataclass(frozen=True)
class JudgedPairs:
    """Pairs as a ranking sees them.

    Attributes:
        batch: chosen half first.
        rewards: (S,) of its sequences.
        link: from the margins of a pair to its loss.
        reward_margins, target_margins: (P,) m and γ, scaled.
    """

    batch: LogpBatch
    rewards: Tensor
    link: Link
    reward_margins: Tensor
    target_margins: Tensor


class Ranking(Protocol):
    """Losses of whole lists, of which the pairs are all ordered pairs of their completions."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the `LogpBatch` fields used beyond `policy` and `lengths`."""

    @property
    def takes_margins(self) -> bool:
        """Whether it judges pairs, so that target margins, links and scales have a place in it."""

    @property
    def takes_sides(self) -> bool:
        """Whether a completion's reward may depend on which of a pair it is."""

    def __call__(self, pairs: JudgedPairs) -> Tensor:
        """(P,) for each pair the loss of its list, or parts whose mean over the list's pairs it is.

        Without `completions` in the batch each pair is a list of its own.
        """


class Scale(Protocol):
    """Factor on a pair's reward and target margin: how sharply the pair is judged."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the `LogpBatch` fields used beyond `policy` and `lengths`."""

    def statistics(self) -> Statistic:
        """A fresh statistic of the observed values."""

    def observe(self, batch: LogpBatch, reward_margins: Tensor) -> Tensor:
        """(P,) detached values that the statistic sees."""

    def __call__(self, batch: LogpBatch, reward_margins: Tensor, summary: Any) -> Tensor:
        """(P,) detached positive factors; `summary` is what the statistic returned."""


class Weighting(Protocol):
    """Factor on a pair's loss, before the regularisers: how much the pair counts."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the `LogpBatch` fields used beyond `policy` and `lengths`."""

    @property
    def wants(self) -> frozenset[str]:
        """Names of the `LogpBatch` fields used where they are given."""

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(P,) factors, detached unless the method trains through them."""


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

    def observe(self, batch: LogpBatch) -> Tensor | Sequence[Any] | None:
        """Detached values that the statistic sees, or None where there is no statistic."""

    def __call__(self, batch: LogpBatch, summary: Any = None) -> LossOutput:
        """The loss; `summary` is what the statistic returned for this batch."""
