"""Ranks of a process group: their number, sums and gathers; the identity in a single process."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


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


def gather_over_ranks(
    values: Tensor, group: dist.ProcessGroup | None = None, *, contents: str = "values"
) -> tuple[Tensor, int]:
    """Concatenation of the ranks' vectors, which may differ in length or be empty.

    On CUDA with several ranks this waits once for the lengths: the result's shape depends on them.

    Args:
        values: (n_local,) this rank's values.
        group: the ranks that take part; None means all of them.
        contents: what they are, in words: what one rank gives must mean to all what it means to it.

    Returns:
        (n,) the values in rank order, and the index at which this rank's values start.

    Raises:
        ValueError: ranks give other contents or another dtype; on all of them.
    """
    world = world_size(group)
    if world == 1:
        return values, 0
    described = f"{contents} in {values.dtype}"
    header = values.shape[0], zlib.crc32(described.encode())
    # Filled on the device: a copy from the host would wait for it.
    own = torch.stack([values.new_full((), each, dtype=torch.int64) for each in header])
    headers = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(headers, own, group=group)
    lengths, kinds = torch.stack(headers).t().tolist()
    if len(set(kinds)) > 1:
        every = gather_objects(described, group)
        raise ValueError(f"ranks: got {_by_rank(every)}, needs the same on all of them")

    padded = values.new_zeros(max(lengths))
    padded[: values.shape[0]] = values
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded, group=group)
    parts = [part[:size] for part, size in zip(gathered, lengths, strict=True)]
    return torch.cat(parts), sum(lengths[: dist.get_rank(group)])


def gather_objects(own: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """One object of every rank, in rank order; every rank must make the call.

    Args:
        own: this rank's, which pickle takes: ranks need not agree on shapes or names.
        group: the ranks that take part; None means all of them.
    """
    if world_size(group) == 1:
        return [own]
    every: list[Any] = [None] * world_size(group)
    dist.all_gather_object(every, own, group=group)
    return every


def gather_outcomes(compute: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """What `compute` returns on every rank, in rank order; where it raises on one, all raise.

    Without it the others would wait for the one that has gone.

    Args:
        compute: what is different on each rank, and does not call the others meanwhile.
        group: the ranks that take part; None means all of them.

    Raises:
        Exception: this rank's own, as it is; else the first other rank's, of the same type where
            that is ValueError, else RuntimeError.
    """
    found, error = None, None
    try:
        found = compute()
    except Exception as raised:
        error = raised
    # As texts: not every exception goes through pickle.
    told = None if error is None else (isinstance(error, ValueError), _told(error))
    every: list[Any] = gather_objects((found, told), group)
    if error is not None:
        raise error
    for number, (_, other) in enumerate(every):
        if other is not None:
            kind = ValueError if other[0] else RuntimeError
            raise kind(f"rank {number}: {other[1]}")
    return [each for each, _ in every]


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _by_rank(every: list[str]) -> str:
    return ", ".join(f"{each} on rank {number}" for number, each in enumerate(every))


def host_group(group: dist.ProcessGroup | None = None) -> dist.ProcessGroup | None:
    """A group of the same ranks whose collectives take tensors on the CPU, without a device's wait.

    Every rank of the group must make the call. Sockets tell at once of a rank that has died.

    Args:
        group: the ranks; None means all of them.

    Returns:
        The group itself where it takes such tensors.
    """
    if "gloo" in str(dist.get_backend_config(group)):
        return group
    ranks = None if group is None else dist.get_process_group_ranks(group)
    # Groups of some ranks: the others make no such call.
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=ranks is not None)
