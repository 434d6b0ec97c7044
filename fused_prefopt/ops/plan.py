"""The planner: which path computes a batch of log-probs, in which workspace, in which tiles.

Costs are in P, the time of one bare matmul ``hidden @ weight.T`` over the labelled rows.

=========== ========== =====================================================================
path        cost       when
=========== ========== =====================================================================
`evaluate`  1P         nothing needs a gradient
`stash`     2P         the head is frozen: the forward also forms d logp / d hidden
`local`     3P         the head trains, and the workspace holds the probabilities of all n
                       labelled rows: they are kept from the forward to the backward
`recompute` 4P − k/n P the head trains: the probabilities of k of the n rows are kept, those
                       of the others are built again, tile by tile
=========== ========== =====================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

PATHS = ("evaluate", "stash", "local", "recompute")
COST_IN_P = {"evaluate": 1.0, "stash": 2.0, "local": 3.0, "recompute": 4.0}
MIB = 2**20

# The workspace where none is asked for: on a GPU the head's gradient may take more, up to what an
# fp32 sum of it would, and never more than this share of the GPU's memory.
_DEFAULT_WORKSPACE = 256 * MIB
_LARGEST_SHARE = 64
# What the statistics of a row and the layout of its batch take, at most, in bytes.
_ROW_STATISTICS = 256
# Fewer kept rows than this share of all save less than their handling costs.
_LEAST_KEPT = 16
_SMALLEST_TILE = 64
# What must be left beside the probabilities of all rows.
_FAST_TILE = 256


@dataclass(frozen=True)
class Plan:
    """How a batch of log-probs is computed.

    Attributes:
        path: `evaluate`, `stash`, `local` or `recompute`.
        engine: `torch`, `cublas` or `triton`; `cublas+triton` where each does a part.
        workspace: bytes that tiles and kept probabilities may take.
        reason: why this path, in words.
        rows: n, labelled rows (an upper bound where a compiler traces).
        kept_rows: k of them whose probabilities are kept for the backward.
    """

    path: str
    engine: str
    workspace: int
    reason: str
    rows: int = 0
    kept_rows: int = 0

    @property
    def cost(self) -> float:
        """Matmuls of forward and backward together, in P."""
        if self.path != "recompute" or not self.rows:
            return COST_IN_P[self.path]
        return COST_IN_P["recompute"] - self.kept_rows / self.rows


@dataclass(frozen=True)
class TileShape:
    """Rows × vocabulary entries of one logits tile."""

    rows: int
    vocab: int


@dataclass(frozen=True)
class Tiles:
    """How one pass over the head is cut.

    Attributes:
        rows: c, rows of a tile.
        vocab: v, vocabulary entries of a slab, whose gradient is formed in one product.
        products: w, entries of a slab whose logits are in memory at a time.
        gathered: whether the labelled rows are copied once, not tile by tile.
    """

    rows: int
    vocab: int
    products: int
    gathered: bool


@dataclass(frozen=True)
class TileCost:
    """Bytes of a tile's buffers, for each logit, hidden entry and weight entry of the tile.

    Attributes:
        logit: of a logit in memory.
        hidden: of an entry of the tile's rows, where they are not gathered once.
        weight: of an entry of the slab of the weight.
        preferred: the tile shape that is large enough.
        smallest: rows and slabs that the engine can work with.
        slab: of an entry of the slab that a gradient's product reads; 0 where there is none.
        sliced: of a weight entry, in addition, where a tile has not all rows.
    """

    logit: float
    hidden: int
    weight: int
    preferred: TileShape
    smallest: int = 1
    slab: float = 0.0
    sliced: int = 0

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


def wide_tiles(
    rows: int, vocab: int, hidden_size: int, budget: int, cost: TileCost, processors: int
) -> TileShape:
    """Rows c, and the most entries v of a slab whose logits a GPU multiplies, in whole waves.

    All rows if they fit beside 1024 entries, up to the preferred number.

    Args:
        rows, vocab, hidden_size, budget, cost: as in `tile_shape`.
        processors: multiprocessors of the GPU.
    """
    step = max(_SMALLEST_TILE if processors == 1 else 128, cost.smallest)
    tile_rows = max(1, min(rows, cost.preferred.rows))
    while True:
        left = budget - cost.hidden * tile_rows * hidden_size
        most = int(left / max(cost.logit * tile_rows + cost.weight * hidden_size, 1e-9))
        if most >= min(vocab, 1024) or tile_rows <= _SMALLEST_TILE:
            break
        tile_rows = max(_SMALLEST_TILE, tile_rows // 2)
    most = min(most, cost.preferred.vocab)
    return TileShape(tile_rows, even_width(vocab, tile_rows, most, step, processors, hidden_size))


def slab_tiles(
    rows: int, vocab: int, hidden_size: int, budget: int, cost: TileCost, processors: int
) -> tuple[TileShape, int]:
    """Rows c and entries v of the slab of a gradient on a GPU, and w of them multiplied at a time.

    The slab takes what the products leave: the wider it is, the fewer sums pass through memory; and
    with all rows in it, the weight's gradient is written once.

    Args:
        rows, vocab, hidden_size, budget, cost, processors: as in `wide_tiles`.
    """
    step = max(_SMALLEST_TILE if processors == 1 else 128, cost.smallest)
    tile_rows = max(1, min(rows, cost.preferred.rows))
    while True:
        left = budget - cost.hidden * tile_rows * hidden_size
        products = vocab
        if cost.logit:
            third = int(left / 3 / (cost.logit * tile_rows))
            products = even_width(vocab, tile_rows, third, step, processors, hidden_size)
            left -= int(cost.logit * tile_rows * products)
        weight = cost.weight + (cost.sliced if tile_rows < rows else 0)
        most = int(left / max(cost.slab * tile_rows + weight * hidden_size, 1e-9))
        if most >= min(vocab, 2048) or tile_rows <= _SMALLEST_TILE:
            break
        tile_rows = max(_SMALLEST_TILE, tile_rows // 2)
    step = products if cost.logit and products <= most else step
    slab = even_width(vocab, hidden_size, most, step, processors, tile_rows)
    return TileShape(tile_rows, slab), min(products, slab)


@lru_cache(maxsize=1024)
def even_width(total: int, across: int, most: int, step: int, processors: int, depth: int) -> int:
    """Entries, a multiple of `step`, in which `total` are multiplied with the least idle time.

    A GPU works through a product in waves of as many 128 × 256 tiles as it has processors; a last
    wave takes as long as a full one, and every product costs a launch or two.

    Args:
        total: entries.
        across: the product's other side.
        most: entries that fit.
        step: what the width is a multiple of, if it is not `total`.
        processors: multiprocessors.
        depth: what is summed over: the deeper, the less a launch counts beside a wave.
    """
    if most >= total:
        return total
    if most < 2 * step or processors == 1:
        return min(total, max(step, most // step * step))

    def time(width: int) -> float:
        full, rest = divmod(total, width)
        parts = full * (_waves(width, across, processors) + launches)
        return parts + (_waves(rest, across, processors) + launches if rest else 0)

    launches = 550 / depth  # in waves: some 6 µs
    return min(range(step, most + 1, step), key=lambda width: (time(width), -width))


def _waves(width: int, across: int, processors: int) -> float:
    def count(rows: int, columns: int) -> int:
        return -(-(-(-width // rows) * -(-across // columns)) // processors)

    return min(count(128, 256), count(256, 128), count(128, 128) / 1.8)


def aligned(entries: int) -> int:
    """A row's entries, rounded up so that the next row starts where a GPU's matmul wants it."""
    return -(-entries // 16) * 16


def kept_bytes(rows: int, vocab: int, itemsize: int) -> int:
    """What the probabilities of some rows take from the forward to the backward."""
    return rows * vocab * itemsize


def statistics_bytes(rows: int) -> int:
    """What a GPU's workspace leaves for the statistics of the rows."""
    return rows * _ROW_STATISTICS


def default_workspace(
    memory: int | None, rows: int, weight: tuple[int, int], itemsize: int, head_trains: bool
) -> int:
    """Bytes of the workspace where none is asked for.

    256 MiB on a CPU. On a GPU the labelled rows come on top, and where the head trains what an fp32
    sum of its gradient would take, up to a 64th of the GPU's memory: the same on every GPU of a
    kind, so that results stay the same to the bit.

    Args:
        memory: bytes of the GPU, or None for a CPU.
        rows: N, labelled rows.
        weight: (V, D) of the head.
        itemsize: bytes of an entry of the rows.
        head_trains: weight or bias needs a gradient.
    """
    if memory is None:
        return _DEFAULT_WORKSPACE
    gathered = rows * weight[1] * itemsize
    wanted = _DEFAULT_WORKSPACE + gathered + (4 * weight[0] * weight[1] if head_trains else 0)
    return max(_DEFAULT_WORKSPACE, min(wanted, memory // _LARGEST_SHARE))


@dataclass(frozen=True)
class Room:
    """What the probabilities of rows and the tiles beside them take.

    Attributes:
        row: bytes of a row's probabilities.
        fixed: bytes that are taken anyway.
        least: bytes of the tiles that must fit beside all rows.
        wanted: bytes of the tiles that some rows are kept beside.
    """

    row: int
    fixed: int
    least: int
    wanted: int

    def kept(self, rows: int, workspace: int) -> int:
        """k of n rows: all, as many as leave the tiles what they want, or none."""
        spare = workspace - self.fixed
        if rows * self.row + self.least <= spare:
            return rows
        kept = (spare - min(self.wanted, spare // 2)) // self.row // 128 * 128
        return kept if kept * _LEAST_KEPT >= rows else 0


def room_of(
    rows: int, vocab: int, hidden_size: int, itemsize: int, cost: TileCost, gpu: bool
) -> Room:
    """The room for kept probabilities.

    Args:
        rows: N, labelled rows.
        vocab: V.
        hidden_size: D.
        itemsize: bytes of one probability that is kept.
        cost: of the tiles that rows are built again in.
        gpu: whether tiles are planned for a GPU.
    """
    row = kept_bytes(1, vocab, itemsize)
    if not gpu:
        smallest = cost.total(min(rows, _FAST_TILE), min(vocab, _FAST_TILE), hidden_size)
        preferred = cost.preferred
        tile = cost.total(min(rows, preferred.rows), min(vocab, preferred.vocab), hidden_size)
        return Room(row, 0, smallest, tile)
    # A maximum for each 128 entries goes with a row.
    row += 4 * -(-vocab // 128)
    gathered = rows * hidden_size * cost.hidden
    least = rows * min(vocab, 1024) * 4
    wanted = int(rows * (cost.logit * min(vocab, 4096) + cost.slab * min(vocab, 8192)))
    return Room(row, gathered + statistics_bytes(rows), least, wanted)


def make_plan(
    *,
    path: str,
    engine: Callable[[str, int], str],
    rows: int,
    vocab: int,
    workspace: int,
    room: Room,
    head_trains: bool,
    hidden_trains: bool,
    entropy: bool = False,
    drop_mass: float = 0.0,
) -> Plan:
    """Choose the cheapest path that fits, or check the one that is asked for.

    Args:
        path: `auto` or one of `PATHS`.
        engine: (path, kept rows) → name of the engine that would run it.
        rows: N, labelled rows (an upper bound where the count is not known).
        vocab: V, vocabulary entries.
        workspace: bytes.
        room: what kept probabilities and tiles take of it.
        head_trains: weight or bias needs a gradient.
        hidden_trains: hidden needs a gradient.
        entropy: the entropies are wanted too, and their gradient.
        drop_mass: probability that a row's gradient may leave out.

    Raises:
        ValueError: a forced path that cannot serve this call.
    """
    kept = room.kept(rows, workspace)
    size = _size(rows, vocab, kept, room, workspace)

    def plan(path: str, reason: str, kept: int = 0) -> Plan:
        return Plan(path, engine(path, kept), workspace, reason, rows, kept)

    if not (head_trains or hidden_trains):
        return plan("evaluate", "nothing needs a gradient")
    if entropy:
        if path not in ("auto", "recompute"):
            raise ValueError(f"path: got {path!r}, but gradients of entropies need 'recompute'")
        return plan("recompute", "gradients of entropies need the logits")
    if path == "stash" and head_trains:
        raise ValueError("path: 'stash' forms no head gradient, but weight or bias needs one")
    if path == "local" and kept < rows:
        raise ValueError(f"path: 'local' does not fit workspace_mb: {size}")
    if path != "auto":
        return plan(path, "asked for", rows if path == "local" else 0)
    if not head_trains:
        return plan("stash", "the head is frozen")
    if drop_mass and kept < rows:
        kept = 0  # rows that need a part of the vocabulary come in any order
    return plan("local" if kept == rows else "recompute", f"the head trains; {size}", kept)


def _size(rows: int, vocab: int, kept: int, room: Room, workspace: int) -> str:
    """What all rows would take of the workspace; a compiler's sizes have no digits yet."""
    if torch.compiler.is_compiling():
        return "sizes are the compiled call's"
    wanted = rows * room.row + room.fixed + room.least
    return (
        f"{rows} rows x {vocab} entries and a tile take {wanted / MIB:.4g} of"
        f" {workspace / MIB:g} MiB" + ("" if kept == rows else f", {kept} rows fit")
    )
