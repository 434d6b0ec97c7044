"""The labelled rows of a batch before two heads, in the tiles that both are cut into."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from fused_prefopt.ops.cutting import Tiles, WeightKind, tile_shape
from fused_prefopt.ops.head_math import HeadMath
from fused_prefopt.ops.head_rows import HeadRows, HeadTensors, HiddenRows
from fused_prefopt.ops.kl_engine import TorchKlEngine
from fused_prefopt.ops.plan import statistics_bytes
from fused_prefopt.ops.tile import Tile
from fused_prefopt.ops.vocab_shard import WHOLE

if TYPE_CHECKING:
    from fused_prefopt.ops.kl_cublas_engine import CublasKlEngine


@dataclass(frozen=True)
class _Side(HeadRows):
    """The rows before one of the heads.

    Attributes:
        tiles: how both are cut.
    """

    tiles: Tiles = Tiles(1, 1, 1, 1, False)


@dataclass(frozen=True)
class KlSlab:
    """A slab of the vocabulary of both heads.

    Attributes:
        rows: of the policy.
        columns: of the vocabulary.
        hidden: rows of hidden of both, by slices.
        policy, reference: weight slab (v, D + r) in the operand dtype, bias slab (v,) or None.
    """

    rows: HeadRows
    columns: slice
    hidden: tuple[HiddenRows, HiddenRows]
    policy: tuple[Tensor, Tensor | None]
    reference: tuple[Tensor, Tensor | None]

    def tiles(self) -> Iterator[tuple[slice, Tile, Tile]]:
        """Row slice, and its tile of the policy's head and of the reference's."""
        for rows in self.rows.row_slices():
            where = self.rows.targets[rows], self.columns.start
            policy, reference = (hidden[rows] for hidden in self.hidden)
            yield (
                rows,
                Tile(policy, *self.policy, *where),
                Tile(reference, *self.reference, *where),
            )


@dataclass(frozen=True)
class KlRows:
    """Everything one pass over both heads needs.

    Attributes:
        policy, reference: the same rows before each head.
        engine: class of the engine.
    """

    policy: HeadRows
    reference: HeadRows
    engine: type[TorchKlEngine] | type[CublasKlEngine]

    @classmethod
    def of(
        cls,
        policy: HeadTensors,
        reference: HeadTensors,
        maths: tuple[HeadMath, HeadMath],
        targets: Tensor,
        index: Tensor,
        vocab: int,
        engine: str,
        workspace: int,
        backward: bool,
    ) -> KlRows:
        """The rows at `index` (n,) of targets (M,), before the first `vocab` rows of both heads.

        Args:
            maths: of the policy's head and of the reference's.
            engine: `torch`, `cublas` or `triton`.
            workspace: bytes for tiles, gathered rows and weight slabs.
            backward: whether the pass is a backward.
        """
        kind = load_kl_engine(engine)
        both = policy.first(vocab), reference.first(vocab)
        bent = maths[0] if maths[1].softcap is None else maths[1]
        weights = [WeightKind.of(side.weight) for side in both]
        cost = kind.costs(bent, weights[0], weights[1], backward)
        ranks = [0 if side.low_weight is None else side.low_weight.shape[1] for side in both]
        widths = [side.weight.shape[1] + rank for side, rank in zip(both, ranks, strict=True)]
        if any(ranks):
            # A slab of both weights, and its gradient before it is parted.
            size = bent.operand(index.device).itemsize + bent.accumulator.itemsize
            cost = replace(cost, weight=cost.weight + size)
        rows = index.shape[0]
        if index.device.type != "cpu":
            workspace -= min(statistics_bytes(rows), workspace // 2)
        gathered = rows * sum(widths) * cost.hidden
        once = 3 * gathered <= 2 * workspace
        budget = workspace
        if once:
            budget, cost = budget - gathered, replace(cost, hidden=0)
        shape = tile_shape(rows, vocab, sum(widths), budget, cost)
        tiles = Tiles(shape.rows, shape.vocab, shape.vocab, shape.rows, once)
        own = targets[index]

        def side(tensors: HeadTensors, math: HeadMath) -> HeadRows:
            options = (math, "recompute", engine, workspace, 0, backward)
            return _Side(tensors, index, own, WHOLE, *options, tiles=tiles)

        return cls(side(both[0], maths[0]), side(both[1], maths[1]), kind)

    @property
    def rows(self) -> int:
        return self.policy.rows

    def build_engine(self) -> TorchKlEngine | CublasKlEngine:
        """The engine, for tiles of this shape."""
        policy = self.policy
        return self.engine(policy.math, self.reference.math, policy.tiles, policy.device)

    def slabs(self) -> Iterator[KlSlab]:
        """Slabs of the vocabulary."""
        hidden = self.policy.hidden_rows(), self.reference.hidden_rows()
        for policy, reference in zip(self.policy.slabs(), self.reference.slabs(), strict=True):
            yield KlSlab(self.policy, policy[0], hidden, policy[1:], reference[1:])


def load_kl_engine(name: str) -> type[TorchKlEngine] | type[CublasKlEngine]:
    """The class of an engine of two heads; `triton` has its row kernels on library matmuls."""
    if name == "torch":
        return TorchKlEngine
    from fused_prefopt.ops.kl_cublas_engine import CublasKlEngine

    return CublasKlEngine
