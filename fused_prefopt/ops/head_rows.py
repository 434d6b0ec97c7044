"""The labelled rows of a batch before a head, in the pieces that tiles are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_prefopt.ops import dropped_mass
from fused_prefopt.ops.cutting import (
    GpuPass,
    TileCost,
    Tiles,
    WeightKind,
    about,
    aligned,
    first_rows,
    tile_shape,
)
from fused_prefopt.ops.engines import load_engine, processors, role_engine
from fused_prefopt.ops.head_math import HeadMath
from fused_prefopt.ops.plan import MIB, kept_bytes, statistics_bytes
from fused_prefopt.ops.torch_engine import TorchEngine, product
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

        # By name, as the compiler of torch 2.8 cannot slice a named tuple.
        others = (detach(value) for value in (self.bias, self.low_hidden, self.low_weight))
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
        kept_rows: k, the first rows, whose probabilities are kept for the backward.
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
    kept_rows: int
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
        own = targets[index]
        if shard.first:
            own -= shard.first
        return cls(tensors.first(vocab), index, own, shard, *rest)

    def build_engine(self, role: str) -> TorchEngine:
        """The plan's engine for a role, one of `engines.ROLES`; for tiles of this pass."""
        name = self.engine_of(role)
        if name not in self._engines:
            self._engines[name] = load_engine(name)(self.math, self.tiles, self.device)
        return self._engines[name]

    def engine_of(self, role: str) -> str:
        """Name of the engine for a role."""
        bent = self.math.softcap is not None
        return role_engine(self.engine, role, self.device, self.hidden_size, bent)

    @cached_property
    def _engines(self) -> dict[str, TorchEngine]:
        return {}

    @property
    def rows(self) -> int:
        return self.index.shape[0]

    @property
    def kept(self) -> int:
        """k, of the rows that there are."""
        return self.rows if self.path == "local" else min(self.kept_rows, self.rows)

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
    def tiles(self) -> Tiles:
        """How this pass is cut."""
        return tiles_of(self)

    @property
    def kept_width(self) -> int:
        """Vocabulary entries that share one of the forward's maxima of kept probabilities."""
        if not self.kept:
            return self.vocab
        forward = replace(self, backward=False) if self.backward else self
        return forward.build_engine("keep").part_width

    @property
    def kept_size(self) -> tuple[int, int]:
        """(k, V or a little more) of the kept probabilities."""
        return self.kept, self.vocab if self.device.type == "cpu" else aligned(self.vocab)

    @property
    def operand(self) -> torch.dtype:
        return self.math.operand(self.device)

    @property
    def keeps_gradients(self) -> bool:
        """Whether what is kept of all rows is their gradient, but for a factor of each row."""
        return self.in_place and load_engine(self.engine_of("kept")).keeps_gradients

    @property
    def in_place(self) -> bool:
        """Whether the kept probabilities of all rows become their gradient where they are."""
        engine = load_engine(self.engine_of("kept"))
        return self.kept == self.rows > 0 and engine.in_place(self.math, self.device)

    def row_slices(self, *, kept_apart: bool = False) -> list[slice]:
        """Rows of each tile; with `kept_apart` no tile has both kept rows and others."""
        if not kept_apart or self.kept in (0, self.rows):
            return list(_slices(0, self.rows, self.tiles.rows))
        parts = (0, self.kept), (self.kept, self.rows)
        return [rows for part in parts for rows in _slices(*part, self.tiles.rows)]

    @property
    def makes_slabs(self) -> bool:
        """Whether slabs of the weight are made, not views of it."""
        weight = self.tensors.weight
        return self.rank > 0 or weight.dtype != self.operand or weight.stride(1) != 1

    def slabs(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """(vocabulary slice, weight slab in the operand dtype, bias slab or None)."""
        bias = self.tensors.bias
        for slab in _slices(0, self.vocab, self.tiles.vocab):
            weight = self.weight_rows(slab).to(self.operand)
            yield slab, weight, None if bias is None else self.rounded(bias[slab])

    def pieces(
        self, slices: Sequence[slice]
    ) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
        """Row slice, and what `slabs` gives, of every tile of these rows.

        Rows that are gathered slice by slice are the outer loop, unless slabs cost more to make.
        """
        if self.tiles.gathered or self.makes_slabs:
            for slab in self.slabs():
                for rows in slices:
                    yield rows, *slab
        else:
            for rows in slices:
                for slab in self.slabs():
                    yield rows, *slab

    def parts(self, size: int) -> list[slice]:
        """Columns of a slab of `size` entries that are multiplied at a time."""
        return list(_slices(0, size, self.tiles.products))

    def slab_buffer(self) -> Tensor:
        """(c, v) in the operand dtype, for the slab that a gradient's product reads."""
        rows, vocab = min(self.rows, self.tiles.rows), self.tiles.vocab
        width = vocab if self.device.type == "cpu" else aligned(vocab)
        return torch.empty(rows, width, dtype=self.operand, device=self.device)

    def add_product(
        self, slab: Tensor, weight: Tensor, sums: Tensor, *, accumulate: bool
    ) -> Tensor:
        """``sums = [sums +] slab @ weight``, (c, v) @ (v, D + r), in parts of whole waves."""
        rows, size = sums.shape
        first = first_rows(rows, size, slab.shape[1], processors(self.device))
        product(slab[:first], weight, sums[:first], accumulate=accumulate)
        if first < rows:
            product(slab[first:], weight, sums[first:], accumulate=accumulate)
        return sums

    def weight_rows(self, rows: slice | Tensor) -> Tensor:
        """(v, D + r) rows of the weight and of the low-rank term's, rounded."""
        low = self.tensors.low_weight
        weight = self.rounded(self.tensors.weight[rows])
        return weight if low is None else torch.cat((weight, self.rounded(low[rows])), 1)

    def hidden_rows(self, factor: Tensor | None = None) -> HiddenRows:
        """Labelled rows of `hidden` in the operand dtype, slice by slice; times a factor (n,)."""
        return HiddenRows(self, factor)

    def new(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=self.math.accumulator, device=self.device)

    def rounded(self, value: Tensor) -> Tensor:
        """Round to the dtype the matmul computes in, as autocast does."""
        return value.to(self.math.dtype)


class HiddenRows:
    """Gathers the labelled rows slice by slice, or all at once where that leaves room for tiles.

    A slice stays until the next is asked for, so whoever uses it should not hold it.
    """

    def __init__(self, head: HeadRows, factor: Tensor | None = None) -> None:
        self._head, self._factor, self._all = head, factor, None
        self._last: tuple[slice, Tensor] | None = None
        if head.tiles.gathered:
            self._all = self._gather(slice(None))

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        if self._all is not None:
            return self._all[rows]
        if isinstance(rows, Tensor):
            return self._gather(rows)
        if self._last is None or self._last[0] != rows:
            self._last = None  # before the next one comes
            self._last = rows, self._gather(rows)
        return self._last[1]

    def _gather(self, rows: slice | Tensor) -> Tensor:
        head, index = self._head, self._head.index[rows]
        hidden, low = head.rounded(head.tensors.hidden[index]), head.tensors.low_hidden
        if low is not None:
            hidden = torch.cat((hidden, head.rounded(low[index])), 1)
        if self._factor is not None:
            hidden.mul_(self._factor[rows].unsqueeze(1))
        return hidden.to(head.operand)


def tiles_of(head: HeadRows) -> Tiles:
    """How a pass over a head is cut, within its workspace."""
    vocab, hidden_size = head.vocab, head.hidden_size
    math, gpu = head.math, head.engine != "torch"
    rows = about(head.rows) if gpu else head.rows
    named = tuple((head.engine_of(role), role) for role in _roles(head))
    cost = known_cost(named, math, WeightKind.of(head.tensors.weight))
    if head.backward and head.in_place:
        cost = replace(cost, slab=0)
    if head.rank:
        # A slab of both weights, and its gradient before it is parted.
        cost = replace(cost, weight=cost.weight + head.operand.itemsize + math.accumulator.itemsize)
    if gpu and head.backward and head.tensors.bias is not None:
        # Sums over the rows, a number for every 16 of them.
        cost = replace(cost, slab=cost.slab + math.accumulator.itemsize / 16)
    copied = 0
    if head.drop_mass:
        narrow = min(cost.preferred.vocab, dropped_mass.PART)
        cost = replace(cost, preferred=replace(cost.preferred, vocab=narrow))
        # The rows that need a part are copied from all of them, and so are their sums.
        copied = head.operand.itemsize + math.accumulator.itemsize
        if head.kept:
            cost = replace(cost, logit=cost.logit + math.kept.itemsize)
    budget = head.workspace - kept_bytes(head.kept, vocab, math.kept.itemsize)
    if gpu:
        budget -= min(statistics_bytes(rows), budget // 2)
        budget -= 4 * head.kept * -(-vocab // 128)
    if not gpu or head.drop_mass:
        gathered = rows * hidden_size * cost.hidden
        once = 3 * gathered <= 2 * budget
        if once:
            budget, cost = budget - gathered, replace(cost, hidden=0)
        cost = replace(cost, hidden=cost.hidden + copied)
        whole = replace(cost, logit=cost.logit + cost.slab)
        shape = tile_shape(rows, vocab, hidden_size, budget, whole)
        return Tiles(shape.rows, shape.vocab, shape.vocab, shape.rows, once)
    # What was kept is multiplied no more.
    multiplied = rows - head.kept if head.backward else rows
    budget = budget // MIB * MIB if budget > MIB else budget
    cuts = head.path in ("evaluate", "stash") and not head.makes_slabs
    given = (rows, multiplied, vocab, hidden_size, budget, cost, processors(head.device), cuts)
    return GpuPass(*given).tiles()


def cost_of(named: tuple[tuple[str, str], ...], math: HeadMath, weight: WeightKind) -> TileCost:
    """What the buffers of a tile take at most.

    Args:
        named: engines, and the roles that they have in the pass.
        math: the head's scalars.
        weight: of the head.
    """
    costs = [load_engine(name).cost(math, weight, role) for name, role in named]
    return replace(
        costs[0],
        logit=max(each.logit for each in costs),
        weight=max(each.weight for each in costs),
        slab=max(each.slab for each in costs),
        smallest=max(each.smallest for each in costs),
    )


known_cost = lru_cache(maxsize=1024)(cost_of)


def _roles(head: HeadRows) -> list[str]:
    """What a pass asks of its engines."""
    if head.entropy:
        return ["entropy" if head.backward else "details"]
    if head.path in ("evaluate", "stash"):
        return ["fold" if head.path == "evaluate" else "weigh"]
    kept, others = ("kept", "rebuild") if head.backward else ("keep", "fold")
    # Without a row there is still a pass.
    return [kept] * (head.kept > 0) + [others] * (head.kept < head.rows or not head.rows)


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))
