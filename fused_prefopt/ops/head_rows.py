"""Labelled rows of a batch before a head: the options of a pass, and the pieces of its tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fused_prefopt.ops.cutting import Tiles, WeightKind, aligned, first_rows
from fused_prefopt.ops.engines import load_engine, processors, role_engine
from fused_prefopt.ops.plan import PassSize, cut, known_cost
from fused_prefopt.ops.precision import HeadMath
from fused_prefopt.ops.torch_engine import TorchEngine, product
from fused_prefopt.ops.vocab_shard import VocabShard

# Lists of integers (a compiler's symbols among them), of numbers, and one text: see `Spec.packed`.
Packed = tuple[list[int], list[float], str]
# Counts of a `Spec`, in the order in which they are packed; and the scalars of each head.
_SIZES = ("num_sequences", "num_labels", "ignore_index", "vocab", "workspace", "kept_rows", "first")
_SCALARS = len(fields(HeadMath)) - 1  # all but the dtype


@dataclass(frozen=True)
class Spec:
    """Options of the registered ops: all that they take beside tensors.

    Attributes:
        num_sequences: S.
        num_labels: labelled rows, or -1: counting them costs CUDA a host sync.
        ignore_index: the target of rows without a label.
        vocab: rows of the weight that are no padding.
        workspace, kept_rows: of the plan; of the first k rows the probabilities are kept.
        first: vocabulary index of this rank's first row.
        entropy: the rows' entropies are wanted; on `evaluate` and `recompute` only.
        drop_mass: probability that the gradient of a row may leave out; 0 but for `local` and
            `recompute`.
        path: of the plan.
        engine: of `engines.choose_engine`; it may be `auto`.
        group: the process group whose ranks share the head's rows; empty for a whole head.
        math: the head's scalars and the dtype that matmuls compute in.
        reference: those of the second head of `sequence_kl`, or None.
        perturbation: ε of the mixtures of both heads' logits; 0 for none.
    """

    num_sequences: int
    num_labels: int
    ignore_index: int
    vocab: int
    workspace: int
    math: HeadMath
    path: str
    engine: str
    kept_rows: int = 0
    first: int = 0
    entropy: bool = False
    drop_mass: float = 0.0
    group: str = ""
    reference: HeadMath | None = None
    perturbation: float = 0.0

    def packed(self) -> Packed:
        """The form in which the options go through a registered op."""
        sizes = [getattr(self, name) for name in _SIZES] + [int(self.entropy)]
        scalars = [self.drop_mass, self.perturbation, *self.math.scalars]
        if self.reference is not None:
            scalars += self.reference.scalars
        dtype = str(self.math.dtype).removeprefix("torch.")
        return sizes, scalars, "|".join((self.path, self.engine, dtype, self.group))

    @classmethod
    def unpacked(cls, sizes: Sequence[int], scalars: Sequence[float], names: str) -> Spec:
        """The reverse of `packed`."""
        *counts, entropy = sizes
        drop_mass, perturbation, *of_heads = scalars
        path, engine, name, group = names.split("|", 3)
        dtype: torch.dtype = getattr(torch, name)
        head, other = of_heads[:_SCALARS], of_heads[_SCALARS:]
        return cls(
            **dict(zip(_SIZES, counts, strict=True)),
            math=HeadMath.from_scalars(head, dtype),
            path=path,
            engine=engine,
            entropy=bool(entropy),
            drop_mass=drop_mass,
            group=group,
            reference=HeadMath.from_scalars(other, dtype) if other else None,
            perturbation=perturbation,
        )

    @property
    def shard(self) -> VocabShard:
        return VocabShard(self.group, self.first)


class HeadTensors(NamedTuple):
    """Tensors of the products ``hidden @ weight.T + low_hidden @ low_weight.T + bias``.

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

    @property
    def rank(self) -> int:
        """r of the low-rank term, 0 without one."""
        return 0 if self.low_weight is None else self.low_weight.shape[1]

    @property
    def hidden_size(self) -> int:
        """D + r, what the products are summed over."""
        return self.weight.shape[1] + self.rank

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
        spec: the options.
        backward: whether the pass is a backward.
        given: how it is cut where another head is cut beside it, or None.
    """

    tensors: HeadTensors
    index: Tensor
    targets: Tensor
    spec: Spec
    backward: bool = False
    given: Tiles | None = None

    @classmethod
    def of(
        cls,
        tensors: HeadTensors,
        targets: Tensor,
        index: Tensor,
        spec: Spec,
        *,
        backward: bool = False,
        given: Tiles | None = None,
    ) -> HeadRows:
        """The rows at `index` (n,) of targets (M,), before the first rows of the head."""
        own = targets[index]
        if spec.first:
            own -= spec.first
        return cls(tensors.first(spec.vocab), index, own, spec, backward, given)

    @property
    def math(self) -> HeadMath:
        return self.spec.math

    @property
    def path(self) -> str:
        return self.spec.path

    @property
    def engine(self) -> str:
        return self.spec.engine

    @cached_property
    def shard(self) -> VocabShard:
        """Place of these rows of the head in the vocabulary."""
        return self.spec.shard

    def build_engine(self, role: str) -> TorchEngine:
        """The plan's engine for a role, one of `engines.ROLES`; for tiles of this pass."""
        name = self.engine_of(role)
        if name not in self._engines:
            self._engines[name] = load_engine(name)(self.math, self.tiles, self.device)
        return self._engines[name]

    def engine_of(self, role: str) -> str:
        """Name of the engine for a role."""
        return role_engine(self.engine, role, self.device, self.hidden_size, self.math.bent)

    @cached_property
    def _engines(self) -> dict[str, TorchEngine]:
        return {}

    @property
    def rows(self) -> int:
        return self.index.shape[0]

    @property
    def kept(self) -> int:
        """k, of the rows that there are."""
        return self.rows if self.path == "local" else min(self.spec.kept_rows, self.rows)

    @property
    def vocab(self) -> int:
        return self.tensors.weight.shape[0]

    @property
    def rank(self) -> int:
        return self.tensors.rank

    @property
    def hidden_size(self) -> int:
        return self.tensors.hidden_size

    @property
    def device(self) -> torch.device:
        return self.tensors.hidden.device

    @cached_property
    def tiles(self) -> Tiles:
        """Cut of this pass."""
        return tiles_of(self) if self.given is None else self.given

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
        """Whether what is kept of all rows is their gradient, but for a factor of each row.

        Never on a spread head: each rank's factors refer to the largest logits of its own rows, so
        its sums would be in another unit, and where they are far below another's, without a bound.
        """
        return (
            not self.shard.group
            and self.in_place
            and load_engine(self.engine_of("kept")).keeps_gradients
        )

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
    """Cut of a pass over one head, within its workspace."""
    gpu, weight = head.engine != "torch", head.tensors.weight
    named = tuple((head.engine_of(role), role) for role in _roles(head))
    return cut(
        PassSize(
            head.rows,
            head.vocab,
            head.hidden_size,
            head.spec.workspace,
            known_cost(named, head.math, WeightKind.of(weight)),
            head.math,
            head.device,
            backward=head.backward,
            low_rank=head.rank > 0,
            gpu=gpu,
            bias=head.tensors.bias is not None,
            kept=head.kept,
            in_place=head.backward and head.in_place,
            drops=head.spec.drop_mass > 0,
            cuts_rows=head.path in ("evaluate", "stash") and not head.makes_slabs,
        )
    )


def _roles(head: HeadRows) -> list[str]:
    """Roles that a pass asks of its engines."""
    if head.spec.entropy:
        return ["entropy" if head.backward else "details"]
    if head.path in ("evaluate", "stash"):
        return ["fold" if head.path == "evaluate" else "weigh"]
    kept, others = ("kept", "rebuild") if head.backward else ("keep", "fold")
    # Without a row there is still a pass.
    return [kept] * (head.kept > 0) + [others] * (head.kept < head.rows or not head.rows)


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))
