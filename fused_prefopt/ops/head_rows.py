"""The labelled rows of a batch before a head, in the pieces that tiles are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fused_prefopt.ops.engines import load_engine
from fused_prefopt.ops.head_math import HeadMath
from fused_prefopt.ops.plan import TileShape, aligned, kept_bytes, tile_shape
from fused_prefopt.ops.torch_engine import TorchEngine


@dataclass(frozen=True)
class HeadRows:
    """Everything one pass over the head needs.

    Attributes:
        hidden: (M, D) all rows.
        weight: (V, D), padded vocabulary rows cut off.
        bias: (V,) or None.
        index: (n,) the labelled rows.
        targets: (n,) their target tokens.
        math: the head's scalars.
        path, engine, workspace: of the plan.
        backward: whether the pass is a backward.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    index: Tensor
    targets: Tensor
    math: HeadMath
    path: str
    engine: str
    workspace: int
    backward: bool

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        index: Tensor,
        vocab: int,
        *rest: Any,
    ) -> HeadRows:
        """The rows at `index` (n,) of targets (M,), before the first `vocab` rows of the head.

        Args:
            *rest: the attributes from `math` on.
        """
        bias = None if bias is None else bias[:vocab]
        return cls(hidden, weight[:vocab], bias, index, targets[index], *rest)

    def build_engine(self) -> TorchEngine:
        """The plan's engine, for tiles of this shape."""
        return load_engine(self.engine)(self.math, self.shape, self.hidden.device)

    @property
    def rows(self) -> int:
        return self.index.shape[0]

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @cached_property
    def tiling(self) -> tuple[TileShape, bool]:
        """Shape of the tiles, and whether the hidden rows are gathered once for all of them."""
        vocab, hidden_size = self.weight.shape
        engine = load_engine(self.engine)
        cost = engine.cost(self.math, self.weight, self.path, self.backward)
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
        return tile_shape(self.rows, vocab, hidden_size, budget, cost), once

    @property
    def shape(self) -> TileShape:
        return self.tiling[0]

    @property
    def kept_size(self) -> tuple[int, int]:
        """(n, V or a little more) of what `local` keeps."""
        vocab = self.weight.shape[0]
        return self.rows, vocab if self.device.type == "cpu" else aligned(vocab)

    @property
    def operand(self) -> torch.dtype:
        return self.math.operand(self.device)

    def row_slices(self) -> list[slice]:
        return list(_slices(self.rows, self.shape.rows))

    def slabs(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """(vocabulary slice, weight slab in the operand dtype, bias slab or None)."""
        for slab in _slices(self.weight.shape[0], self.shape.vocab):
            weight = self.rounded(self.weight[slab]).to(self.operand)
            yield slab, weight, None if self.bias is None else self.rounded(self.bias[slab])

    def hidden_rows(self) -> _HiddenRows:
        """Labelled rows of `hidden` in the operand dtype, slice by slice."""
        return _HiddenRows(self)

    def new(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=self.math.accumulator, device=self.device)

    def rounded(self, value: Tensor) -> Tensor:
        """Round to the dtype the matmul computes in, as autocast does."""
        return value.to(self.math.dtype)


class _HiddenRows:
    """Gathers the labelled rows slice by slice, or all at once where that leaves room for tiles."""

    def __init__(self, head: HeadRows) -> None:
        self._head, self._all = head, None
        if head.tiling[1]:
            self._all = self._gather(slice(None))

    def __getitem__(self, rows: slice) -> Tensor:
        return self._gather(rows) if self._all is None else self._all[rows]

    def _gather(self, rows: slice) -> Tensor:
        head = self._head
        return head.rounded(head.hidden[head.index[rows]]).to(head.operand)


def _slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
