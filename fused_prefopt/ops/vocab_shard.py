"""A head whose rows are spread over ranks: tensor parallelism over the vocabulary.

What the ranks exchange, each rank its own numbers to all others, n labelled rows in a call:

- forward, one all-gather of 12 bytes a row (maximum, Σ exp(logit − maximum), target logit); with
  entropies or `token_statistics` 28 bytes (four numbers more), in `sequence_kl` 28 (two heads'
  three numbers and one of both), with a perturbation 52. Twice that in float64.
- before it, one all-gather of 40 bytes in all: whether the ranks have the same batch, and rows of
  one head between them. `sequence_kl` adds one of 8 bytes: whether both heads are spread alike; so
  does ``path="local"``: whether it fits every rank's workspace.
- backward, one sum of n · (D + r) · 4 bytes, the gradient of hidden (and of low-rank terms'
  projections); in a few parts, which start while the last gradients of the weight are formed. With
  `drop_mass` two of 4 bytes a row besides. The gradients of the head's rows stay on their rank.

A compiled call of a spread head runs as it would without the compiler, which may move ops that do
not depend on each other, and in another way on a rank with other rows: their collectives would meet
in the wrong order. With ``fullgraph=True`` the compiler refuses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from fused_prefopt.checks import is_on_host, require
from fused_prefopt.ops.tile import Details, KlStatistics, MixtureStatistics, RowStatistics
from fused_prefopt.types import LMHead, LowRank

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# A sum over ranks is parted into so many at most, each of as many bytes at least: smaller ones take
# as long as their start does.
_MOST_PARTS = 4
_LEAST_BYTES = 4 << 20

_DIFFERENT = (
    "labels: they differ between the ranks that share the head's rows. Tensor-parallel ranks take"
    " the same batch; a weight that FSDP has sharded must be gathered first (see"
    " `models.causal_lm.head_running`)"
)


@dataclass(frozen=True)
class VocabShard:
    """Rows of a head that this rank holds.

    Attributes:
        group: name of the process group that shares the head; empty for a whole head.
        first: vocabulary index of this rank's first row.
    """

    group: str = ""
    first: int = 0

    @property
    def size(self) -> int:
        """Ranks that share the head."""
        return dist.get_world_size(self._resolve()) if self.group else 1

    def merge(
        self, statistics: RowStatistics, details: Details | None = None
    ) -> tuple[RowStatistics, Details | None]:
        """Statistics of whole rows from those of every rank's part, the same bits everywhere.

        `best` of the details, which each rank counts from its first row, counts from the whole
        head's, and is the first of several that are as large.
        """
        if not self.group:
            return statistics, details
        own = (statistics.maximum, statistics.sum, statistics.target)
        if details is None:
            maxima, *others = self._every(*own)
            return _merged(maxima, *others)[0], None
        more = (details.weighted, details.squares, details.logit_sum)
        # Its bits, which a gather leaves alone: no float holds every index.
        best = _as_integers(details.best + self.first, details.weighted.dtype)
        maxima, sums, targets, weighted, squares, logit_sums, bests = self._every(*own, *more, best)
        merged, factors = _merged(maxima, sums, targets)
        # Σ (z − own maximum) e^… becomes Σ (z − maximum) e^….
        weighted = (weighted + sums * (maxima - merged.maximum)) * factors
        integers = bests.view(_integers(bests.dtype))
        largest = maxima == merged.maximum
        first = integers.where(largest, torch.iinfo(integers.dtype).max).amin(0)
        return merged, Details(
            weighted.sum(0),
            (squares * factors.square()).sum(0),
            logit_sums.sum(0),
            first.to(details.best.dtype),
        )

    def merge_kl(self, statistics: KlStatistics) -> KlStatistics:
        """The same of a policy's logits beside a reference's, whose rows the ranks hold alike."""
        if not self.group:
            return statistics
        mixtures = statistics.mixtures
        parts = [statistics.policy, statistics.reference]
        if mixtures is not None:
            parts += [mixtures.extrapolated, mixtures.interpolated]
        numbers = [each for part in parts for each in (part.maximum, part.sum, part.target)]
        weighted, *every = self._every(statistics.weighted, *numbers)
        found = [_merged(*every[place : place + 3]) for place in range(0, len(every), 3)]
        (policy, _), (reference, factors), *two = found
        both = None
        if mixtures is not None:
            both = MixtureStatistics(mixtures.perturbation, *(each for each, _ in two))
        return KlStatistics(policy, reference, (weighted * factors).sum(0), both)

    def add(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.group:
            dist.all_reduce(values, group=self._resolve())
        return values

    def sum_rows(self, values: Tensor) -> RowSums:
        """Sum over the ranks of rows (n, D), in place, that become ready one after another."""
        return RowSums(values, self._resolve() if self.group else None)

    def whole_vocab(self, head: LMHead, rows: int, targets: Tensor) -> int | Tensor:
        """Rows of the whole head that are no padding; 0-d of a head that is spread over ranks.

        Args:
            head: as it was given.
            rows: of it that this rank holds, with padding.
            targets: (M,) of the call.

        Raises:
            ValueError: the ranks differ in their targets or in `valid_vocab`; they hold a row
                twice or not at all; or one of them holds nothing but padding. On every rank, but on
                CUDA, where it is a device-side assert.
        """
        if not self.group:
            return head.vocab
        places = torch.arange(1, targets.shape[0] + 1, device=targets.device)
        valid = -1 if head.valid_vocab is None else head.valid_vocab
        numbers = [places.new_full((), each) for each in (self.first, rows, valid)]
        own = torch.stack((places.sum(), (targets * places).sum(), *numbers))
        every = self._gathered(own)
        require((every[:, :2] == own[:2]).all(), lambda: _DIFFERENT)
        require(
            (every[:, 4] == valid).all(),
            lambda: f"valid_vocab: got {_listed(every[:, 4])} on the ranks, wanted one number",
        )
        firsts, order = every[:, 2].sort()
        stops = firsts + every[order, 3]
        whole = stops[-1]
        fits = (firsts[0] == 0) & (firsts[1:] == stops[:-1]).all()

        def held() -> str:
            if not is_on_host(every):
                return "the ranks' rows"
            return ", ".join(f"[{first}, {first + size})" for first, size in every[:, 2:4].tolist())

        require(
            fits,
            lambda: (
                f"first_row: got {held()} of the ranks, which overlap or leave a gap; wanted every"
                " row of the vocabulary once"
            ),
        )
        if valid < 0:
            return whole
        require(
            whole >= valid,
            lambda: f"valid_vocab: got {valid}, wanted at most as many as {held()} of the ranks",
        )
        require(
            firsts[-1] < valid,
            lambda: (
                f"weight: {valid} rows leave a rank without any but padding: got {held()}; wanted"
                " rows below `valid_vocab` on every rank"
            ),
        )
        return whole.new_full((), valid)

    def require_alike(self, other: VocabShard, rows: int, others: int, like: Tensor) -> None:
        """`require` that all ranks hold the same rows of a policy's head and of its reference's.

        Args:
            other: of the reference's head.
            rows: of the policy's that this rank holds, without padding.
            others: of the reference's.
            like: on the device of the heads.

        Raises:
            ValueError: only one of the heads is spread over ranks, or over the ranks of another
                group, or some rank holds other rows of it.
        """
        # Another group, such as another mesh's, may be of the same ranks.
        if self.group != other.group and self._ranks() != other._ranks():
            raise ValueError(
                f"ref_head: got one that is {other._kind()}, wanted it to be {self._kind()} as"
                " `head` is"
            )
        if not self.group:
            return
        self.require_everywhere(
            (self.first, rows) == (other.first, others),
            like,
            lambda: (
                f"ref_head: got rows [{other.first}, {other.first + others}) on this rank beside"
                f" [{self.first}, {self.first + rows}) of `head`, wanted every rank to hold the"
                " same rows of both"
            ),
        )

    def require_everywhere(self, fits: bool, like: Tensor, message: Callable[[], str]) -> None:
        """`require` of each rank what this one knows of itself: 8 bytes to each of the others.

        Args:
            fits: whether it is so on this rank.
            like: on the device of the head.
            message: as in `require`.
        """
        own = torch.full((1,), int(fits), dtype=torch.int64, device=like.device)
        require(self._gathered(own).all(), message)

    def _every(self, *own: Tensor) -> tuple[Tensor, ...]:
        """(ranks, n) of every rank's numbers (n,)."""
        return self._gathered(torch.stack(own)).unbind(1)

    def _gathered(self, own: Tensor) -> Tensor:
        """(ranks, …) of every rank's tensor, in the group's order; all of one shape."""
        every = own.new_empty(self.size, *own.shape)
        dist.all_gather(list(every.unbind()), own, group=self._resolve())
        return every

    def _ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._resolve()) if self.group else []

    def _kind(self) -> str:
        return f"spread over ranks {self._ranks()}" if self.group else "whole"

    def _resolve(self) -> dist.ProcessGroup:
        return dist.distributed_c10d._resolve_process_group(self.group)  # type: ignore[arg-type]


WHOLE = VocabShard()


class RowSums:
    """Sum over ranks of rows that become ready one after another, in place.

    In parts that depend on the shape alone: the ranks cut their tiles differently. Each starts as
    soon as its rows are ready and runs beside what is computed next, where the backend can.

    Args:
        values: (n, D) contiguous; rows that have been called ready stay as they are.
        group: whose ranks add theirs, or None for no sum.
    """

    def __init__(self, values: Tensor, group: dist.ProcessGroup | None) -> None:
        self._values, self._group, self._started = values, group, 0
        self._works: list[dist.Work] = []
        rows = values.shape[0]
        least = -(-_LEAST_BYTES // max(1, values.shape[1] * values.itemsize))
        self._step = max(least, -(-rows // _MOST_PARTS))

    def ready(self, stop: int) -> None:
        """Start the parts that end at or before row `stop`: the rows before it are final."""
        rows = self._values.shape[0]
        while self._group is not None and self._started < rows:
            end = min(rows, self._started + self._step)
            if end > stop:
                return
            part = self._values[self._started : end]
            work = dist.all_reduce(part, group=self._group, async_op=True)
            if work is not None:  # of a backend that has done it by now
                self._works.append(work)
            self._started = end

    def wait(self) -> None:
        """Return once all rows are summed (on CUDA: once the stream will wait for that)."""
        self.ready(self._values.shape[0])
        for work in self._works:
            work.wait()
        self._works.clear()


def sharing_ranks(head: LMHead) -> dist.ProcessGroup | None:
    """The group whose ranks hold the rows of a head between them; None of a whole one."""
    if head.group is not None or not _is_distributed(head.weight):
        return head.group
    from torch.distributed.tensor import DTensor

    assert isinstance(head.weight, DTensor)
    sharded = _sharded(head.weight)
    return head.weight.device_mesh.get_group(sharded[0]) if sharded else None


def local_part(head: LMHead) -> tuple[LMHead, VocabShard]:
    """This rank's rows of a head, and where they stand; any other head as it is.

    Gradients of the rows come back as shards like them.

    Raises:
        ValueError: the head is sharded in another way than over its rows on one mesh dimension, or
            a rank would hold nothing but padding.
    """
    if head.group is not None:
        assert head.first_row is not None
        left = None if head.valid_vocab is None else head.valid_vocab - head.first_row
        return _local(head, left), VocabShard(head.group.group_name, head.first_row)
    if not _is_distributed(head.weight):
        return head, WHOLE
    from torch.distributed.tensor import DTensor, Shard

    weight = head.weight
    assert isinstance(weight, DTensor)
    mesh, placements, sharded = weight.device_mesh, weight.placements, _sharded(weight)
    if not sharded:
        return _local(head, head.valid_vocab), WHOLE
    if len(sharded) > 1 or placements[sharded[0]] != Shard(0):
        raise ValueError(
            f"weight: got placements {placements}, wanted Shard(0) on one mesh dimension"
        )
    for name, value in _others(head):
        if not isinstance(value, DTensor) or value.placements != placements:
            raise ValueError(f"{name}: wanted a DTensor with the weight's placements {placements}")
    group, rank = mesh.get_group(sharded[0]), mesh.get_local_rank(sharded[0])
    # As torch.chunk cuts: every part but the last ones has this many rows.
    rows = -(-weight.shape[0] // mesh.size(sharded[0]))
    if (mesh.size(sharded[0]) - 1) * rows >= head.vocab:
        raise ValueError(f"weight: {head.vocab} rows leave a rank of {mesh} without any")
    first = rank * rows
    return _local(head, head.vocab - first), VocabShard(group.group_name, first)


def same_rows(name: str, hidden: Tensor) -> Tensor:
    """This rank's hidden states, of a `DTensor` too, which layers of tensor parallelism pass on.

    Args:
        name: of the argument, for the message.
        hidden: (..., D), the same on every rank.

    Raises:
        ValueError: it is a `DTensor` of which ranks hold parts.
    """
    if not _is_distributed(hidden):
        return hidden
    if any(not place.is_replicate() for place in hidden.placements):  # type: ignore[attr-defined]
        raise ValueError(
            f"{name}: got placements {hidden.placements}, wanted Replicate(): every rank takes all"  # type: ignore[attr-defined]
            " rows"
        )
    return _to_local(hidden)


def _is_distributed(value: Tensor) -> bool:
    # Without importing what a single process never needs.
    return hasattr(value, "placements") and hasattr(value, "device_mesh")


def _sharded(weight: DTensor) -> list[int]:
    """Dimensions of the mesh along which its ranks do not hold the same."""
    from torch.distributed.tensor import Replicate

    places = enumerate(weight.placements)
    return [dim for dim, place in places if not isinstance(place, Replicate)]


def _others(head: LMHead) -> list[tuple[str, Tensor]]:
    found = [] if head.bias is None else [("bias", head.bias)]
    return found + [("b", term.b) for term in head.low_rank]


def _local(head: LMHead, vocab: int | None) -> LMHead:
    """The head with local tensors, of which the first `vocab` rows are real, or all."""
    weight = _to_local(head.weight)
    bias = None if head.bias is None else _to_local(head.bias)
    terms = tuple(
        LowRank(_to_local(term.a), _to_local(term.b), term.scaling, term.dropout)
        for term in head.low_rank
    )
    # Padding alone is refused by all ranks together, in `whole_vocab`.
    valid = None if vocab is None else max(1, min(vocab, weight.shape[0]))
    return replace(
        head,
        weight=weight,
        bias=bias,
        valid_vocab=valid,
        low_rank=terms,
        group=None,
        first_row=None,
    )


def _to_local(value: Tensor) -> Tensor:
    local: Tensor = value.to_local() if _is_distributed(value) else value  # type: ignore[attr-defined]
    return local


def _merged(maxima: Tensor, sums: Tensor, targets: Tensor) -> tuple[RowStatistics, Tensor]:
    """Statistics of whole rows from the ranks' (ranks, n), and the factors on the ranks' sums."""
    maximum = maxima.amax(0)
    factors = (maxima - maximum).exp()
    # A target is 0 on every rank but the one that holds its row.
    return RowStatistics(maximum, (sums * factors).sum(0), targets.sum(0)), factors


def _integers(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32


def _as_integers(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers whose bits are those of numbers of a floating dtype."""
    return values.to(_integers(dtype)).view(dtype)


def _listed(values: Tensor) -> str:
    if not is_on_host(values):
        return "several"
    return ", ".join("None" if each < 0 else str(each) for each in values.tolist())
