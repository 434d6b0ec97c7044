"""Numbers of what a loss is a mean over: pairs, lists, completions, or groups of these."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor

from fused_prefopt.distributed import sum_over_ranks, world_size
from fused_prefopt.losses.groups import places
from fused_prefopt.losses.protocol import Loss
from fused_prefopt.losses.weighted_sum import WeightedSum
from fused_prefopt.types import LogpBatch


def counts_groups(loss: Loss, given: Collection[str]) -> bool:
    """Whether a batch's loss is a mean over its groups (lists of a loss on pairs), not its rows.

    Args:
        loss: which loss, not `is_mixed`.
        given: the names of the batch's `LogpBatch` fields; a batch of groups has `groups`.
    """
    return "groups" in given and (loss.pairwise or "groups" in loss.wants)


def is_mixed(loss: Loss) -> bool:
    """Whether it is a sum of means over groups and of means over single completions."""
    terms = [term.loss for term in loss.terms] if isinstance(loss, WeightedSum) else [loss]
    return not loss.pairwise and len({"groups" in term.wants for term in terms}) > 1


def share_of_rank(loss: Loss, batch: LogpBatch, group: dist.ProcessGroup | None = None) -> Tensor:
    """0-d float64 ``n W / Σ n`` of a rank with n of what a loss is a mean over, of W ranks.

    Every rank must make the call; no device is waited for.

    Args:
        loss: no coupled one, not `is_mixed`.
        batch: this rank's pairs, lists or completions; there may be none.
        group: the ranks that take part; None means all of them.
    """
    size = batch.size // 2 if loss.pairwise else batch.size
    own = batch.policy.new_full((), size, dtype=torch.float64)
    if batch.size and counts_groups(loss, batch.given) and batch.groups is not None:
        own = places(batch.groups).max().to(torch.float64) + 1
    return own * world_size(group) / sum_over_ranks(own, group).clamp(min=1)
