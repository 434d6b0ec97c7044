"""A head whose rows are spread over ranks: tensor parallelism over the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from fused_prefopt.checks import require
from fused_prefopt.ops.tile import RowStatistics
from fused_prefopt.types import LMHead, LowRank

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

    def merge(self, statistics: RowStatistics) -> RowStatistics:
        """Statistics of whole rows from those of every rank's part, the same bits everywhere."""
        if not self.group:
            return statistics
        own = torch.stack((statistics.maximum, statistics.sum, statistics.target))
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=self._resolve())
        maxima, sums, targets = torch.stack(parts, 1)
        maximum = maxima.amax(0)
        # A target is 0 on every rank but the one that holds its row.
        return RowStatistics(maximum, (sums * (maxima - maximum).exp()).sum(0), targets.sum(0))

    def add(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.group:
            dist.all_reduce(values, group=self._resolve())
        return values

    def require_same(self, targets: Tensor) -> None:
        """`require` that all ranks ask for the same targets (M,)."""
        if not self.group or torch.compiler.is_compiling():
            return
        places = torch.arange(1, targets.shape[0] + 1, device=targets.device)
        own = torch.stack((places.sum(), (targets * places).sum()))
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=self._resolve())
        require((torch.stack(parts) == own).all(), lambda: _DIFFERENT)

    def _resolve(self) -> dist.ProcessGroup:
        return dist.distributed_c10d._resolve_process_group(self.group)  # type: ignore[arg-type]


WHOLE = VocabShard()


def local_part(head: LMHead) -> tuple[LMHead, VocabShard]:
    """This rank's rows of a head, and where they stand; any other head as it is.

    Gradients of the rows come back as shards like them.

    Raises:
        ValueError: the head is sharded in another way than over its rows on one mesh dimension, or
            a rank would hold nothing but padding.
    """
    if not _is_distributed(head.weight):
        return head, WHOLE
    from torch.distributed.tensor import DTensor, Replicate, Shard

    weight = head.weight
    assert isinstance(weight, DTensor)
    mesh, placements = weight.device_mesh, weight.placements
    sharded = [dim for dim, place in enumerate(placements) if not isinstance(place, Replicate)]
    if not sharded:
        return _local(head), WHOLE
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


def _is_distributed(value: Tensor) -> bool:
    # Without importing what a single process never needs.
    return hasattr(value, "placements") and hasattr(value, "device_mesh")


def _others(head: LMHead) -> list[tuple[str, Tensor]]:
    found = [] if head.bias is None else [("bias", head.bias)]
    return found + [("b", term.b) for term in head.low_rank]


def _local(head: LMHead, vocab: int | None = None) -> LMHead:
    """The head with local tensors, of which the first `vocab` rows are real."""
    weight = _to_local(head.weight)
    bias = None if head.bias is None else _to_local(head.bias)
    terms = tuple(
        LowRank(_to_local(term.a), _to_local(term.b), term.scaling, term.dropout)
        for term in head.low_rank
    )
    valid = head.valid_vocab if vocab is None else min(vocab, weight.shape[0])
    return replace(head, weight=weight, bias=bias, valid_vocab=valid, low_rank=terms)


def _to_local(value: Tensor) -> Tensor:
    local: Tensor = value.to_local() if _is_distributed(value) else value  # type: ignore[attr-defined]
    return local
