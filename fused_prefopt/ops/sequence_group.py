"""Sequences whose tokens are spread over ranks (context or sequence parallelism): their sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fused_prefopt.checks import is_on_host, require, require_integer, require_shape
from fused_prefopt.distributed import (
    gather_over_ranks,
    sum_over_ranks,
    sum_with_gradient,
    world_size,
)

# Numbers of the one collective that every call makes: where sequences are more, the ranks must have
# agreed on how many before they exchange the rest.
_AT_ONCE = 512
# The first of them, by which the ranks find out that they disagree.
_HEADER = 2
# What is summed; with weights of tokens it is another call, one number higher.
LOGPS, KL, COLLISIONS, TAILS = 0, 2, 4, 6


def require_group(group: dist.ProcessGroup | None, *, shift: bool) -> None:
    """Check a `sequence_group`, which is None for whole sequences.

    Raises:
        TypeError: it is no process group.
        ValueError: this rank is not in it, or labels of a shard are still to be shifted.
    """
    if group is None:
        return
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"sequence_group: got a {type(group).__name__}, wanted a torch.distributed.ProcessGroup"
            " (of a device mesh `mesh.get_group(dimension)`)"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("sequence_group: got one without this rank, wanted one that it is in")
    if shift:
        raise ValueError(
            "shift: got True with a sequence_group, wanted False: the label that a shard's last"
            " token predicts lies on another rank, so labels are shifted before the split (see"
            " `data.shard_of`)"
        )


def over_group(rows: Sequence[Tensor], group: dist.ProcessGroup | None, call: int) -> list[Tensor]:
    """Sums over a group of what its ranks found of their tokens of the same sequences.

    One all-reduce of 4 KB forward and one backward, where all numbers are at most 510, else two
    each; added in float64, and rounded to the dtype of each.

    Args:
        rows: k tensors (S,), floating or counts, some of them differentiable.
        group: the ranks; None for whole sequences, which are returned as they are.
        call: what is summed, below 8.

    Returns:
        k tensors (S,), the same bits on every rank.

    Raises:
        ValueError: ranks disagree on k, S or `call`, or one has raised within `telling` (a
            device-side assert on CUDA).
    """
    if group is None:
        return list(rows)
    sequences, ranks = rows[0].shape[0], world_size(group)
    values = torch.stack([row.double() for row in rows]).flatten()
    own = (sequences % 2**16 * 16 + len(rows)) * 8 + call
    # Filled on the device: a copy from the host would wait for it.
    header = [values.new_full((1,), number) for number in (own, own**2)]
    start = values[: _AT_ONCE - _HEADER]
    # Of one size on every rank, whatever they disagree on: other sizes end in a hang.
    padding = values.new_zeros(_AT_ONCE - _HEADER - start.shape[0])
    first = sum_with_gradient(torch.cat((*header, start, padding)), group)
    total, squares = first[:_HEADER].detach()
    # Σ_r (n_r − n)², 0 where all are n; exact in float64.

    def message() -> str:
        if is_on_host(total) and total.isnan():
            return "sequence_group: got an error on another of its ranks, which says what is wrong"
        return (
            f"sequence_group: got {sequences} sequences on this rank and another number, or another"
            " call, on a rank that shares them; needs the same call on the same sequences, in the"
            " same order, on each of its ranks"
        )

    require(squares - 2 * own * total + ranks * own**2 == 0, message)
    found = first[_HEADER : _HEADER + values.shape[0]]
    if values.shape[0] > found.shape[0]:
        rest = sum_with_gradient(values[_AT_ONCE - _HEADER :], group)
        found = torch.cat((found, rest))
    parts = found.view(len(rows), sequences)
    # What was a constant stays one.
    return [
        (part if row.requires_grad else part.detach()).to(row.dtype)
        for part, row in zip(parts, rows, strict=True)
    ]


def telling(
    group: dist.ProcessGroup | None, device: torch.device
) -> AbstractContextManager[object]:
    """Context of what a rank computes before `over_group`: where it raises, the others raise there.

    Without it they would wait for this one. It costs nothing until then.

    Args:
        group: the ranks; None for whole sequences.
        device: of the rows.
    """
    # A compiler's own exceptions are for itself.
    alone = group is None or torch.compiler.is_compiling()
    return nullcontext() if alone else _Telling(group, device)


@dataclass(frozen=True)
class _Telling(AbstractContextManager[None]):
    group: dist.ProcessGroup | None
    device: torch.device

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, Exception):
            return
        # A dead device, or a group that is gone, tells nobody: the error itself is what matters.
        with suppress(RuntimeError):
            none = torch.full((_AT_ONCE,), math.nan, dtype=torch.float64, device=self.device)
            # Read back: a process that ends takes along what only waits on its device.
            sum_over_ranks(none, self.group).tolist()


def numbers_in_sequences(
    labelled: Tensor, ids: Tensor, position_ids: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Which of its sequence's labelled tokens each of this rank's is, whatever rank has which.

    One gather of the labelled tokens' places, 8 bytes each; on CUDA it waits once for their number.

    Args:
        labelled: (M,) bool, rows of this rank that carry a label.
        ids: (M,) int64, their sequences.
        position_ids: (M,) integer, their tokens' places in the whole sequences, each there once.
        group: the ranks that share the sequences.

    Returns:
        (n,) int64 indices of this rank's labelled rows, and (n,) int64 numbers, from 0 in each
        sequence.

    Raises:
        ValueError: two tokens of a sequence have one place.
    """
    index = labelled.nonzero().squeeze(1)
    # Places are below 2³¹: this is one number that sorts by sequence, then by place.
    own = (ids[index] << 31) + position_ids.long()[index]
    every = gather_over_ranks(own, group)[0].sort().values
    require(
        (every[1:] != every[:-1]).all(),
        lambda: (
            "position_ids: got two labelled tokens of a sequence at one place, wanted the places in"
            " the whole sequence on each rank of the sequence_group"
        ),
    )
    sequences = every >> 31
    starts = torch.searchsorted(sequences, ids[index])
    return index, torch.searchsorted(every, own) - starts


def require_positions(position_ids: Tensor | None, labels: Tensor) -> Tensor:
    """The places of a shard's tokens in their sequences, (M,).

    Raises:
        ValueError: there are none, or not one for each label.
    """
    if position_ids is None:
        raise ValueError(
            "position_ids: got None with a sequence_group, wanted the place of each token in its"
            " whole sequence: which tokens are beyond the partner's length depends on all of them"
        )
    require_integer("position_ids", position_ids)
    require_shape("position_ids", position_ids, labels.shape)
    return position_ids.reshape(-1)
