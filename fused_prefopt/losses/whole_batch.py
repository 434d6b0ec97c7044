"""The pairs of all ranks as one batch, for losses that are more than a mean over pairs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fused_prefopt.distributed import gather_over_ranks, rank, world_size
from fused_prefopt.losses.groups import places
from fused_prefopt.losses.metrics import NONFINITE, nonfinite
from fused_prefopt.losses.protocol import halves
from fused_prefopt.types import LogpBatch, LossOutput

_NUMBERED = ("groups", "completions")
# `kl` is one number, each rank's own.
_FIELDS = tuple(item.name for item in dataclasses.fields(LogpBatch) if item.name != "kl")


@dataclass(frozen=True)
class WholeBatch:
    """The pairs of all ranks, of which this rank's own alone carry a gradient.

    Attributes:
        batch: all pairs in rank order, chosen halves first.
        start: index of this rank's first pair.
        pairs: how many are this rank's.
        world: number of ranks.
    """

    batch: LogpBatch
    start: int
    pairs: int
    world: int

    def own(self, result: LossOutput) -> LossOutput:
        """This rank's part of the loss of `batch`.

        Args:
            result: of all pairs.

        Returns:
            The same loss and metrics; losses (and the number that is not finite), rewards and
            target margins of this rank's pairs.
            The gradient of the loss is this rank's part times the number of ranks, so that the
            mean over ranks, which data parallelism takes, is the gradient of the whole.
        """
        constant, sequences = result.loss.detach(), (2, self.batch.size // 2)
        losses, metrics = self._pairs(result.losses), result.metrics
        rewards, target_margins = result.rewards, result.target_margins
        if NONFINITE in metrics:
            metrics = metrics | {NONFINITE: nonfinite(losses)}
        if rewards is not None:
            rewards = self._pairs(rewards.reshape(sequences)).flatten()
        if target_margins is not None:
            target_margins = self._pairs(target_margins)
        return dataclasses.replace(
            result,
            loss=result.loss + (self.world - 1) * (result.loss - constant),
            losses=losses,
            rewards=rewards,
            target_margins=target_margins,
            metrics=metrics,
        )

    def _pairs(self, values: Tensor) -> Tensor:
        return values[..., self.start : self.start + self.pairs]


def whole_batch(batch: LogpBatch, group: dist.ProcessGroup | None = None) -> WholeBatch:
    """Exchange a batch of pairs with the other ranks, which must all make the call.

    Args:
        batch: this rank's pairs, chosen half first; there may be none.
        group: the ranks that take part; None means all of them.

    Raises:
        ValueError: the number of sequences is odd, or ranks give different fields.
    """
    pairs = halves(batch.policy)[0].shape[0]
    numbers = 2 * len(_FIELDS)
    own = torch.stack([_column(batch, name, group) for name in _FIELDS]).reshape(numbers, pairs)
    given = ", ".join(name for name in _FIELDS if name in batch.given)
    gathered, start = gather_over_ranks(own.t().flatten(), group, contents=f"pairs with {given}")
    every, start = gathered.shape[0] // numbers, start // numbers
    # One row a pair → one a field, chosen first.
    columns = gathered.reshape(every, numbers).t().reshape(len(_FIELDS), 2 * every)
    fields = {
        name: column.to(torch.int64 if name in _NUMBERED else getattr(batch, name).dtype)
        for name, column in zip(_FIELDS, columns, strict=True)
        if name in batch.given
    }
    # These carry gradients.
    for name in {"policy", "sequence_kl", "prompt", "gold"} & fields.keys():
        first, second = (
            torch.cat([half[:start], mine, half[start + pairs :]])
            for half, mine in zip(halves(fields[name]), halves(getattr(batch, name)), strict=True)
        )
        fields[name] = torch.cat([first, second])
    joined = LogpBatch(**fields, kl=batch.kl)
    return WholeBatch(joined, start, pairs, world_size(group))


def _column(batch: LogpBatch, name: str, group: dist.ProcessGroup | None) -> Tensor:
    """(S,) float64, which holds every dtype's values exactly; NaN for a field not given."""
    value: Tensor | None = getattr(batch, name)
    if value is None:
        return batch.policy.new_full(batch.policy.shape, torch.nan, dtype=torch.float64)
    if name in _NUMBERED:
        # Each rank numbers its own lists and completions, with what numbers it likes.
        value = places(value) * world_size(group) + rank(group)
    return value.detach().to(torch.float64)
