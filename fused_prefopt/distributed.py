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


def require_other_pairs(
    group: dist.ProcessGroup | None, sharing: dist.ProcessGroup | None, name: str, loss: str
) -> None:
    """Raise ValueError where a loss over a group's ranks would see a pair several times.

    Args:
        group: ranks whose batches are to be one; None means all of them.
        sharing: ranks that have this rank's pairs, this one among them; None is this one alone.
        name: what they share, for the message.
        loss: its name, for the message.
    """
    if sharing is None:
        return
    members = range(world_size()) if group is None else dist.get_process_group_ranks(group)
    both = len(set(members) & set(dist.get_process_group_ranks(sharing)))
    if both > 1:
        raise ValueError(
            f"process_group: got {both} ranks of this rank's {name} in it (None is all ranks) for"
            f" {loss}, which would see each pair {both} times; wanted the ranks whose pairs differ:"
            " the mesh's data dimension, of one rank where there is none"
        )


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


def sum_with_gradient(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum of `values` over the ranks, differentiable any number of times.

    The backward sums the upstream gradients of all ranks, as each rank's total is made of every
    rank's values: where all ranks go on to one loss ℓ, each has the gradient of ``Σ_ranks ℓ`` by
    its own values. One all-reduce forward, and one backward in which every rank must take part.
    Compiled, the graph breaks here.

    Args:
        values: any shape, equal on all ranks, floating; left unchanged.
        group: the ranks that take part; None means all of them.

    Returns:
        A tensor of the same shape and dtype, the same bits on every rank.
    """
    if world_size(group) == 1:
        return values
    total = _SumOverRanks.apply
    if torch.compiler.is_compiling():
        # Disabled by a decorator, importing this would import Triton.
        total = torch.compiler.disable(total)
    found: Tensor = total(values, group)
    return found


def gather_with_gradient(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Concatenation of the ranks' tensors, differentiable as `sum_with_gradient`.

    Args:
        values: (n, …), of one shape on all ranks.
        group: the ranks that take part; None means all of them.

    Returns:
        (n · ranks, …) in rank order.
    """
    places = values.new_zeros((world_size(group), *values.shape))
    own = torch.arange(places.shape[0], device=values.device) == rank(group)
    own = own.view(-1, *[1] * values.dim())
    # Zeros are added to each: by the one sum that is differentiable.
    return sum_with_gradient(values.where(own, places), group).flatten(0, 1)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        return sum_over_ranks(values.contiguous(), group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_with_gradient(grad, ctx.group), None


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
