"""The labelled rows of a batch before a head, in the pieces that tiles are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_prefopt.ops import dropped_mass
from fused_prefopt.ops.engines import load_engine
from fused_prefopt.ops.head_math import HeadMath
from fused_prefopt.ops.plan import TileShape, aligned, kept_bytes, tile_shape
from fused_prefopt.ops.torch_engine import TorchEngine
from fused_prefopt.ops.vocab_shard import VocabShard


class HeadTensors(NamedTuple):
    """What the products ``hidden @ weight.T + low_hidden @ low_weight.T + bias`` are made of.

    Attributes:
        hidden: (M, D) all rows.
        weight: (V, D).
        bias: (V,) or None.
        low_hidden: (M, r) all rows, after the down projection of a low-rank term, or None.
        low_weight: (V, r) its up projection, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    low_hidden: Tensor | None = None
    low_weight: Tensor | None = None

    def detached(self) -> HeadTensors:
        """The same without gradients."""

        def detach(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.detach()

        others = (detach(value) for value in self[2:])
        return HeadTensors(self.hidden.detach(), self.weight.detach(), *others)

    def first(self, vocab: int) -> HeadTensors:
        """The same with the first `vocab` rows of the vocabulary."""
        bias = None if self.bias is None else self.bias[:vocab]
        low_weight = None if self.low_weight is None else self.low_weight[:vocab]
        return self._replace(weight=self.weight[:vocab], bias=bias, low_weight=low_weight)


@dataclass(frozen=True)
class HeadRows:
    """Everything one pass over the head needs.

    Attributes:
        tensors: of the head, padded vocabulary rows cut off.
        index: (n,) the labelled rows.
        targets: (n,) their target tokens, counted from the shard's first row.
        shard: which rows of the head these are.
        math: the head's scalars.
        path, engine, workspace: of the plan.
        backward: whether the pass is a backward.
        drop_mass: probability that a row's gradient may leave out.
        entropy: whether the rows' entropies are wanted, or their gradient.
    """

    tensors: HeadTensors
    index: Tensor
    targets: Tensor
    shard: VocabShard
    math: HeadMath
    path: str
    engine: str
    workspace: int
    backward: bool
    drop_mass: float = 0.0
    entropy: bool = False

    @classmethod
    def of(
        cls,
        tensors: HeadTensors,
        targets: Tensor,
        index: Tensor,
        vocab: int,
        shard: VocabShard,
        *rest: Any,
    ) -> HeadRows:
        """The rows at `index` (n,) of targets (M,), before the first `vocab` rows of the head.

        Args:
            *rest: the attributes from `math` on.
        """
        return cls(tensors.first(vocab), index, targets[index] - shard.first, shard, *rest)

    def build_engine(self) -> TorchEngine:
        """The plan's engine, for tiles of this shape."""
        return load_engine(self.engine)(self.math, self.shape, self.device)

    @property
    def rows(self) -> int:
        return self.index.shape[0]

    @property
    def vocab(self) -> int:
        return self.tensors.weight.shape[0]

    @property
    def rank(self) -> int:
        """r of the low-rank term, 0 without one."""
        low = self.tensors.low_weight
        return 0 if low is None else low.shape[1]

    @property
    def hidden_size(self) -> int:
        """D + r, what the products are summed over."""
        return self.tensors.weight.shape[1] + self.rank

    @property
    def device(self) -> torch.device:
        return self.tensors.hidden.device

    @cached_property
    def tiling(self) -> tuple[TileShape, bool]:
        """Shape of the tiles, and whether the hidden rows are gathered once for all of them."""
        vocab, hidden_size = self.vocab, self.hidden_size
        engine = load_engine(self.engine)
        path = "details" if self.entropy else self.path
        cost = engine.cost(self.math, self.tensors.weight, path, self.backward)
        if self.rank:
            # A slab of both weights, and its gradient before it is parted.
            both = self.operand.itemsize + self.math.accumulator.itemsize
            cost = replace(cost, weight=cost.weight + both)
        copied = 0
        if self.drop_mass:
            narrow = min(cost.preferred.vocab, dropped_mass.PART)
            cost = replace(cost, preferred=replace(cost.preferred, vocab=narrow))
            # The rows that need a part are copied from all of them, and so are their sums.
            copied = self.operand.itemsize + self.math.accumulator.itemsize
            if self.path == "local":
                cost = replace(cost, logit=cost.logit + self.math.kept.itemsize)
        budget = self.workspace
        if self.path == "local":
            budget -= kept_bytes(self.rows, vocab, self.math.kept.itemsize)
        elif self.device.type != "cpu" and self.path != "evaluate":
            # The fp32 sums of d hidden are part of what a GPU user's `workspace_mb` stands for.
            budget -= min(self.rows * hidden_size * self.math.accumulator.itemsize, budget // 2)
        gathered = self.rows * hidden_size * cost.hidden
        once = 3 * gathered <= 2 * budget
        if once:
            budget, cost = budget - gathered, replace(cost, hidden=0)
        cost = replace(cost, hidden=cost.hidden + copied)
        return tile_shape(self.rows, vocab, hidden_size, budget, cost), once

    @property
    def shape(self) -> TileShape:
        return self.tiling[0]

    @property
    def kept_size(self) -> tuple[int, int]:
        """(n, V or a little more) of what `local` keeps."""
        return self.rows, self.vocab if self.device.type == "cpu" else aligned(self.vocab)

    @property
    def operand(self) -> torch.dtype:
        return self.math.operand(self.device)

    def row_slices(self) -> list[slice]:
        return list(_slices(self.rows, self.shape.rows))

    def slabs(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """(vocabulary slice, weight slab in the operand dtype, bias slab or None)."""
        bias = self.tensors.bias
        for slab in _slices(self.vocab, self.shape.vocab):
            weight = self.weight_rows(slab).to(self.operand)
            yield slab, weight, None if bias is None else self.rounded(bias[slab])

    def weight_rows(self, rows: slice | Tensor) -> Tensor:
        """(v, D + r) rows of the weight and of the low-rank term's, rounded."""
        low = self.tensors.low_weight
        weight = self.rounded(self.tensors.weight[rows])
        return weight if low is None else torch.cat((weight, self.rounded(low[rows])), 1)

    def hidden_rows(self) -> HiddenRows:
        """Labelled rows of `hidden` in the operand dtype, slice by slice."""
        return HiddenRows(self)

    def new(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=self.math.accumulator, device=self.device)

    def rounded(self, value: Tensor) -> Tensor:
        """Round to the dtype the matmul computes in, as autocast does."""
        return value.to(self.math.dtype)


class HiddenRows:
    """Gathers the labelled rows slice by slice, or all at once where that leaves room for tiles."""

    def __init__(self, head: HeadRows) -> None:
        self._head, self._all = head, None
        if head.tiling[1]:
            self._all = self._gather(slice(None))

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return self._gather(rows) if self._all is None else self._all[rows]

    def _gather(self, rows: slice | Tensor) -> Tensor:
        head, index = self._head, self._head.index[rows]
        hidden, low = head.rounded(head.tensors.hidden[index]), head.tensors.low_hidden
        if low is not None:
            hidden = torch.cat((hidden, head.rounded(low[index])), 1)
        return hidden.to(head.operand)


def _slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
