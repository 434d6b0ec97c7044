"""Cuts of a pass over a head into tiles, within a budget of bytes.

On a CPU a tile is what its caches hold. On a GPU a slab of the vocabulary goes through products of
the library, and is cut so that each fills whole waves of the GPU's multiprocessors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import torch
from torch import Tensor

_SMALLEST_TILE = 64
# A GPU's tile of a matmul, at least; also what rows are cut at multiples of.
_TILE = 128
# Into how many parts rows are cut at most where that may be faster.
_MOST_CUTS = 6
# Shares of the budget that products in memory may take beside the slab of their gradient.
_SHARES = (0.2, 0.35, 0.5)
# What two launches take, some 6 µs, what reading and writing an fp32 sum does, and gathering an
# entry of hidden, in the time in which a wave of a GPU's matmul tiles adds one summand.
_LAUNCHES, _SUMS, _GATHER = 550.0, 5e-5, 8e-5


@dataclass(frozen=True)
class TileShape:
    """Rows × vocabulary entries of one logits tile."""

    rows: int
    vocab: int


@dataclass(frozen=True, order=True)
class Tiles:
    """Cut of one pass over the head.

    Attributes:
        rows: c, rows of a tile.
        vocab: v, vocabulary entries of a slab, whose gradient is formed in one product.
        products: w, entries of a slab whose logits are in memory at a time.
        multiplied: rows of them: those whose logits are needed.
        gathered: whether the labelled rows are copied once, not tile by tile.
    """

    rows: int
    vocab: int
    products: int
    multiplied: int
    gathered: bool


@dataclass(frozen=True)
class WeightKind:
    """A head's weight, as far as the cost of its tiles depends on it.

    Attributes:
        dtype, device: of it.
        contiguous: whether its rows are.
    """

    dtype: torch.dtype
    device: torch.device
    contiguous: bool

    @classmethod
    def of(cls, weight: Tensor) -> WeightKind:
        return cls(weight.dtype, weight.device, weight.stride(1) == 1)


@dataclass(frozen=True)
class TileCost:
    """Bytes of a tile's buffers, for each logit, hidden entry and weight entry of the tile.

    Attributes:
        logit: of a logit in memory; 0 where a kernel multiplies and leaves none.
        hidden: of an entry of the tile's rows, where they are not gathered once.
        weight: of an entry of the slab of the weight.
        preferred: the tile shape that is large enough.
        smallest: rows and slabs that the engine can work with.
        slab: of an entry of the slab that a gradient's product reads; 0 where there is none.
        sliced: of a weight entry, in addition, where a tile has not all rows.
        sums_rows: whether the slab is summed over its rows, as the weight's gradient is.
    """

    logit: float
    hidden: int
    weight: int
    preferred: TileShape
    smallest: int = 1
    slab: float = 0.0
    sliced: int = 0
    sums_rows: bool = False

    def total(self, rows: int, vocab: int, hidden_size: int) -> int:
        """Bytes of the buffers of a tile of (rows, vocab) logits."""
        logits, hidden = self.logit * rows * vocab, self.hidden * rows * hidden_size
        return int(logits) + hidden + self.weight * vocab * hidden_size


def tile_shape(rows: int, vocab: int, hidden_size: int, budget: int, cost: TileCost) -> TileShape:
    """The largest tile, up to the preferred shape, whose buffers fit the budget.

    Below the whole vocabulary its width is a power of two, so that slabs start where the parts of
    a row's statistics do, and matmul operands are aligned.

    Args:
        rows: N, labelled rows.
        vocab: V, vocabulary entries.
        hidden_size: D.
        budget: bytes.
        cost: of the engine's buffers.
    """
    smallest = max(_SMALLEST_TILE, cost.smallest)
    tile_rows = max(1, min(rows, cost.preferred.rows))
    tile_vocab = min(1 << (vocab - 1).bit_length(), cost.preferred.vocab)
    while max(tile_rows, tile_vocab) > smallest:
        if cost.total(tile_rows, min(tile_vocab, vocab), hidden_size) <= budget:
            break
        if tile_vocab >= tile_rows:
            tile_vocab = max(smallest, tile_vocab // 2)
        else:
            tile_rows = max(smallest, tile_rows // 2)
    return TileShape(tile_rows, min(tile_vocab, vocab))


@dataclass(frozen=True)
class GpuPass:
    """A pass over a head on a GPU, to be cut.

    Attributes:
        rows: N, labelled rows, or a few more: calls of about as many share what is found.
        multiplied: those of them whose logits are multiplied.
        vocab: V, vocabulary entries.
        hidden_size: D.
        budget: bytes.
        cost: of the engine's buffers.
        processors: multiprocessors; 1 where a width is as good as another.
        cuts_rows: whether a slice of rows can go through the whole vocabulary before the next.
    """

    rows: int
    multiplied: int
    vocab: int
    hidden_size: int
    budget: int
    cost: TileCost
    processors: int
    cuts_rows: bool

    @lru_cache(maxsize=4096)  # noqa: B019
    def tiles(self) -> Tiles:
        """All rows in a tile if they fit beside a slab of some width, or fewer.

        Where rows may be cut, they are cut as it is fastest.
        """
        copied = self.cost.hidden * self.rows * self.hidden_size
        once = 3 * copied <= 2 * self.budget
        ways = [self._cuts(gathered, copied) for gathered in ((True, False) if once else (False,))]
        found = [each for way in ways for each in (way if self.cuts_rows else islice(way, 1))]
        return min(found)[2]

    def _cuts(self, gathered: bool, copied: int) -> Iterator[tuple[float, int, Tiles]]:
        """Time, number of row slices and tiles, from the fewest slices on that leave room."""
        least = min(self.vocab, 2048 if self.cost.slab else 1024)
        parts = 1
        while True:
            rows = max(1, self.rows if parts == 1 else -(-self.rows // parts // _TILE) * _TILE)
            multiplied = min(rows, self.multiplied)
            hidden = copied if gathered else self.cost.hidden * rows * self.hidden_size
            slab, products = self._slab(rows, multiplied, self.budget - hidden)
            smallest = rows <= max(_TILE, self.cost.smallest)
            tiles = Tiles(rows, slab, products, multiplied, gathered)
            fits = hidden + self._bytes(tiles) <= self.budget
            good = fits and slab >= least
            # Rows that are gathered once may leave too little: then there is no such cut.
            if good or (smallest and (fits or not gathered)):
                yield self._time(tiles), parts, tiles
            if smallest or (good and parts >= _MOST_CUTS):
                return
            parts += max(1, parts // 4)

    def _bytes(self, tiles: Tiles) -> float:
        """Of a tile's buffers, without the rows that it multiplies."""
        cost = self.cost
        weight = cost.weight + (cost.sliced if tiles.rows < self.rows else 0)
        logits = cost.logit * tiles.multiplied * tiles.products
        return (
            weight * self.hidden_size * tiles.vocab + logits + cost.slab * tiles.rows * tiles.vocab
        )

    @property
    def _step(self) -> int:
        return max(_SMALLEST_TILE if self.processors == 1 else _TILE, self.cost.smallest)

    def _slab(self, rows: int, multiplied: int, left: int) -> tuple[int, int]:
        """Entries of a slab of so many rows, and those of it that are multiplied at a time.

        A gradient's slab takes what the products leave: the wider it is, the fewer sums pass
        through memory; the wider those, the fewer launches.
        """
        cost, size, step = self.cost, self.hidden_size, self._step
        weight = (cost.weight + (cost.sliced if rows < self.rows else 0)) * size
        logits = cost.logit * multiplied
        within = ((multiplied, size),) if multiplied else ()
        if not cost.slab:
            most = min(int(left / max(logits + weight, 1e-9)), cost.preferred.vocab)
            slab = self._even(most, step, within)
            return slab, slab
        across = ((size, rows),) if cost.sums_rows else ()
        if not logits:
            most = int(left / max(cost.slab * rows + weight, 1e-9))
            slab = self._even(most, step, (*across, *within))
            return slab, slab
        found = []
        for share in _SHARES:
            products = self._even(int(left * share / logits), step, within)
            most = int((left - logits * products) / max(cost.slab * rows + weight, 1e-9))
            slab = self._even(most, products if products <= most else step, across)
            sizes = slab, min(products, slab)
            time = self._time(Tiles(rows, *sizes, multiplied, gathered=False))
            found.append((time, -share, sizes))
        return min(found)[2]

    def _even(self, most: int, step: int, products: Sequence[tuple[int, int]]) -> int:
        """The width, a multiple of `step`, in which the vocabulary takes the least time.

        A GPU works through a product in waves of as many 128 × 256 tiles as it has processors; a
        last wave takes as long as a full one, and every slab costs a launch or two.

        Args:
            most: entries that fit.
            step: what the width is a multiple of, if it is not the vocabulary.
            products: that a slab takes part in: their other side, and what they sum over.
        """
        if most >= self.vocab:
            return self.vocab
        if most < 2 * step or self.processors == 1:
            return min(self.vocab, max(step, most // step * step))

        def time(width: int) -> float:
            return _LAUNCHES + sum(self._waves(width, across) * depth for across, depth in products)

        def total(width: int) -> float:
            full, rest = divmod(self.vocab, width)
            return full * time(width) + (time(rest) if rest else 0.0)

        return min(self._widths(most, step, products), key=lambda width: (total(width), -width))

    def _widths(self, most: int, step: int, products: Sequence[tuple[int, int]]) -> set[int]:
        """The widest that fits, and those of fewer waves that none is wider than."""
        found = {most // step * step}
        for across, _ in products:
            for unit, other in ((128, 256), (256, 128)):
                column = -(-across // other)
                waves = most // unit * column // self.processors
                for count in range(waves, max(0, waves // 2 - 1), -1):
                    width = count * self.processors // column * unit // step * step
                    if width:
                        found.add(width)
        return found

    def _time(self, tiles: Tiles) -> float:
        """Of all slabs and their products; a summand of a wave of tiles takes 1."""
        size, sums_rows = self.hidden_size, self.cost.sums_rows

        def of(rows: int, slab: int) -> float:
            # Logits, the product with the weight, and for its gradient that with the rows.
            multiplied = min(rows, tiles.multiplied)
            full, rest = divmod(slab, tiles.products)
            logits = full * self._waves(tiles.products, multiplied)
            logits += self._waves(rest, multiplied) if rest else 0.0
            launches = (full + (rest > 0)) * _LAUNCHES
            if not self.cost.slab:
                return logits * size + launches
            others = self._parted(rows, slab) * slab
            if sums_rows and not tiles.gathered:
                others += rows * size * _GATHER  # again for each slab
            others += self._waves(slab, size) * rows if sums_rows else 0.0
            return logits * size + others + launches + 0.5 * _LAUNCHES + rows * size * _SUMS

        def over_vocab(rows: int) -> float:
            full, rest = divmod(self.vocab, tiles.vocab)
            return full * of(rows, tiles.vocab) + (of(rows, rest) if rest else 0.0)

        full, rest = divmod(self.rows, tiles.rows)
        return full * over_vocab(tiles.rows) + (over_vocab(rest) if rest else 0.0)

    def _parted(self, rows: int, slab: int) -> float:
        """Waves of the slab's product with the weight."""
        size, first = self.hidden_size, first_rows(rows, self.hidden_size, slab, self.processors)
        return self._waves(first, size) + (self._waves(rows - first, size) if first < rows else 0)

    def _waves(self, width: int, across: int) -> float:
        return waves(width, across, self.processors)


def waves(rows: int, columns: int, processors: int) -> float:
    """Number of times that a product's tiles fill a GPU's processors, in the best of shapes."""

    def count(height: int, width: int) -> int:
        return -(-(-(-rows // height) * -(-columns // width)) // processors)

    return min(count(128, 256), count(256, 128), count(128, 128) / 1.8)


@lru_cache(maxsize=4096)
def first_rows(rows: int, columns: int, depth: int, processors: int) -> int:
    """Rows of a product that are multiplied first, so that the others take less than a wave.

    All of them where a second launch would take longer than that saves.

    Args:
        rows, columns: of the product.
        depth: what is summed over.
        processors: multiprocessors of a GPU; 1 where rows are never parted.
    """
    if processors == 1:
        return rows
    whole = waves(rows, columns, processors)
    best, saved = rows, _LAUNCHES / depth
    for height, width in ((128, 256), (256, 128)):
        across = -(-columns // width)
        full = rows // height * across // processors
        first = full * processors // across * height
        if 0 < first < rows:
            parted = waves(first, columns, processors) + waves(rows - first, columns, processors)
            if whole - parted > saved:
                best, saved = first, whole - parted
    return best


def aligned(entries: int) -> int:
    """A row's entries, rounded up so that the next row starts where a GPU's matmul wants it."""
    return -(-entries // 16) * 16


def about(rows: int) -> int:
    """Rows, rounded up: what a GPU's pass is cut for, so that calls of about as many share it."""
    return -(-rows // 256) * 256
