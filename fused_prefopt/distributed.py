"""Ranks of a process group: their number, sums and gathers; the identity in a single process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks of a group, None means all of them; 1 without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's number in a group, None means all of them; 0 without torch.distributed."""
    return dist.get_rank(group) if world_size(group) > 1 else 0


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum of `values` over the ranks, the same bits on each of them.

    Args:
        values: any shape, equal on all ranks; left unchanged.
        group: the ranks that take part; None means all of them.

    Returns:
        A tensor of the same shape.
    """
    if world_size(group) == 1:
        return values
    total = values.clone()
    dist.all_reduce(total, group=group)
    return total


def gather_over_ranks(values: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, int]:
    """Concatenation of the ranks' vectors, which may differ in length or be empty.

    On CUDA with several ranks this waits once for the lengths: the result's shape depends on them.

    Args:
        values: (n_local,) this rank's values.
        group: the ranks that take part; None means all of them.

    Returns:
        (n,) the values in rank order, and the index at which this rank's values start.
    """
    world = world_size(group)
    if world == 1:
        return values, 0
    length = values.new_full((1,), values.shape[0], dtype=torch.int64)
    gathered_lengths = [torch.empty_like(length) for _ in range(world)]
    dist.all_gather(gathered_lengths, length, group=group)
    lengths: list[int] = torch.cat(gathered_lengths).tolist()

    padded = values.new_zeros(max(lengths))
    padded[: values.shape[0]] = values
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded, group=group)
    parts = [part[:size] for part, size in zip(gathered, lengths, strict=True)]
    return torch.cat(parts), sum(lengths[: dist.get_rank(group)])


def gather_objects(own: Any) -> list[Any]:
    """One object of every rank, in rank order; every rank must make the call.

    Args:
        own: this rank's, which pickle takes: ranks need not agree on shapes or names.
    """
    if world_size() == 1:
        return [own]
    every: list[Any] = [None] * world_size()
    dist.all_gather_object(every, own)
    return every


def wait_for_all_ranks() -> None:
    """Return once every rank has made the call."""
    if world_size() > 1:
        dist.barrier()
