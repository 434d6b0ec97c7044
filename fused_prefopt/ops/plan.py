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
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from fused_prefopt.ops import dropped_mass
from fused_prefopt.ops.cutting import GpuPass, TileCost, Tiles, WeightKind, about, tile_shape
from fused_prefopt.ops.engines import load_engine, processors
from fused_prefopt.ops.precision import HeadMath
from fused_prefopt.types import COST_IN_P, Plan

PATHS = tuple(COST_IN_P)
MIB = 2**20

# The workspace where none is asked for: on a GPU the head's gradient may take more, up to what an
# fp32 sum of it would, and never more than this share of the GPU's memory.
_DEFAULT_WORKSPACE = 256 * MIB
_LARGEST_SHARE = 32
# What the statistics of a row and the layout of its batch take, at most, in bytes.
_ROW_STATISTICS = 256
# Fewer kept rows than this share of all save less than their handling costs.
_LEAST_KEPT = 16
# What must be left beside the probabilities of all rows.
_FAST_TILE = 256


def kept_bytes(rows: int, vocab: int, itemsize: int) -> int:
    """Bytes of the probabilities of some rows, kept from the forward to the backward."""
    return rows * vocab * itemsize


def statistics_bytes(rows: int) -> int:
    """Bytes that a GPU's workspace leaves for the statistics of the rows."""
    return rows * _ROW_STATISTICS


def beside_statistics(budget: int, rows: int) -> int:
    """Bytes of a budget that are left for tiles: half of it at least."""
    return budget - min(statistics_bytes(rows), budget // 2)


def default_workspace(
    memory: int | None, rows: int, weight: tuple[int, int], itemsize: int, head_trains: bool
) -> int:
    """Bytes of the workspace where none is asked for.

    256 MiB on a CPU. On a GPU the labelled rows come on top, or, where the head trains and that is
    more, what an fp32 sum of its gradient would take; up to a 32nd of the GPU's memory: the same on
    every GPU of a kind, so that results stay the same to the bit.

    Args:
        memory: bytes of the GPU, or None for a CPU.
        rows: N, labelled rows.
        weight: (V, D) of the head.
        itemsize: bytes of an entry of the rows.
        head_trains: weight or bias needs a gradient.
    """
    if memory is None:
        return _DEFAULT_WORKSPACE
    gathered = about(rows) * weight[1] * itemsize
    wanted = _DEFAULT_WORKSPACE + max(gathered, 4 * weight[0] * weight[1] if head_trains else 0)
    return max(_DEFAULT_WORKSPACE, min(wanted, memory // _LARGEST_SHARE))


@dataclass(frozen=True)
class Room:
    """Bytes of kept probabilities, and of the tiles beside them.

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
        most = (spare - min(self.wanted, spare // 2)) // self.row
        kept = min(most, rows - 1) // 128 * 128
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
    wanted = int(rows * (cost.logit * min(vocab, 4096) + cost.slab * (vocab // 14)))
    return Room(row, gathered + statistics_bytes(rows), least, wanted)


@dataclass(frozen=True)
class Demand:
    """Request of a call to the planner.

    Attributes:
        path: `auto` or one of `PATHS`.
        rows: N, labelled rows (an upper bound where the count is not known).
        vocab: V, vocabulary entries.
        workspace: bytes.
        head_trains: weight or bias needs a gradient.
        hidden_trains: hidden needs a gradient.
        entropy: the entropies are wanted too, and their gradient.
        drop_mass: probability that a row's gradient may leave out.
    """

    path: str
    rows: int
    vocab: int
    workspace: int
    head_trains: bool
    hidden_trains: bool
    entropy: bool = False
    drop_mass: float = 0.0


def make_plan(demand: Demand, engine: Callable[[str, int], str], room: Callable[[], Room]) -> Plan:
    """Choose the cheapest path that fits, or check the one that is asked for.

    Args:
        demand: what is to be planned.
        engine: (path, kept rows) → name of the engine that would run it.
        room: what kept probabilities and tiles take of the workspace, where that is asked.

    Raises:
        ValueError: a forced path that cannot serve this call.
    """
    path, rows, workspace = demand.path, demand.rows, demand.workspace

    def plan(path: str, reason: str, kept: int = 0) -> Plan:
        return Plan(path, engine(path, kept), workspace, reason, rows, kept)

    if not (demand.head_trains or demand.hidden_trains):
        return plan("evaluate", "nothing needs a gradient")
    if demand.entropy:
        if path not in ("auto", "recompute"):
            raise ValueError(f"path: got {path!r}, but gradients of entropies need 'recompute'")
        return plan("recompute", "gradients of entropies need the logits")
    if path == "stash" and demand.head_trains:
        raise ValueError("path: 'stash' forms no head gradient, but weight or bias needs one")
    if path in ("evaluate", "stash", "recompute"):
        return plan(path, "asked for")
    if path == "auto" and not demand.head_trains:
        return plan("stash", "the head is frozen")
    found = room()
    kept = found.kept(rows, workspace)
    size = _size(demand, kept, found)
    if path == "local":
        if kept < rows:
            raise ValueError(f"path: 'local' does not fit workspace_mb: {size}")
        return plan(path, "asked for", rows)
    if demand.drop_mass and kept < rows:
        kept = 0  # rows that need a part of the vocabulary come in any order
    return plan("local" if kept == rows else "recompute", f"the head trains; {size}", kept)


def _size(demand: Demand, kept: int, room: Room) -> str:
    """Space that all rows would take, in words; a compiler's sizes have no digits yet."""
    if torch.compiler.is_compiling():
        return "sizes are the compiled call's"
    wanted = demand.rows * room.row + room.fixed + room.least
    return (
        f"{demand.rows} rows x {demand.vocab} entries and a tile take {wanted / MIB:.4g} of"
        f" {demand.workspace / MIB:g} MiB" + ("" if kept == demand.rows else f", {kept} rows fit")
    )


@dataclass(frozen=True)
class PassSize:
    """A pass over one head, or over two side by side, that is to be cut.

    Attributes:
        rows: n, labelled rows.
        vocab: V, vocabulary entries.
        hidden_size: D + r, what the products are summed over; of two heads the sum of theirs.
        workspace: bytes.
        cost: of the buffers of its engines.
        math: the head's scalars.
        device: of its tensors.
        backward: whether it is a backward.
        low_rank: whether a head has a low-rank term.
        gpu: whether its engine goes through a slab in products of all rows.
        bias: whether the head has one, whose gradient sums slabs over their rows.
        kept: k rows whose probabilities are kept for the backward.
        in_place: whether they become their gradient where they are.
        drops: whether rows may leave out parts of the vocabulary.
        cuts_rows: whether a slice of rows can go through the whole vocabulary before the next.
    """

    rows: int
    vocab: int
    hidden_size: int
    workspace: int
    cost: TileCost
    math: HeadMath
    device: torch.device
    backward: bool
    low_rank: bool
    gpu: bool = False
    bias: bool = False
    kept: int = 0
    in_place: bool = False
    drops: bool = False
    cuts_rows: bool = False


def cut(size: PassSize) -> Tiles:
    """Cut of a pass, within its workspace."""
    math, vocab = size.math, size.vocab
    rows = about(size.rows) if size.gpu else size.rows
    operand, accumulator = math.operand(size.device).itemsize, math.accumulator.itemsize
    cost = size.cost
    if size.backward and size.in_place:
        cost = replace(cost, slab=0)
    if size.low_rank:
        # A slab of both weights, and its gradient before it is parted.
        cost = replace(cost, weight=cost.weight + operand + accumulator)
    if size.gpu and size.backward and size.bias:
        # Sums over the rows, a number for every 16 of them.
        cost = replace(cost, slab=cost.slab + accumulator / 16)
    copied = 0
    if size.drops:
        narrow = min(cost.preferred.vocab, dropped_mass.PART)
        cost = replace(cost, preferred=replace(cost.preferred, vocab=narrow))
        # The rows that need a part are copied from all of them, and so are their sums.
        copied = operand + accumulator
        if size.kept:
            cost = replace(cost, logit=cost.logit + math.kept.itemsize)
    budget = size.workspace - kept_bytes(size.kept, vocab, math.kept.itemsize)
    if size.gpu:
        budget = beside_statistics(budget, rows) - 4 * size.kept * -(-vocab // 128)
    if not size.gpu or size.drops:
        gathered = rows * size.hidden_size * cost.hidden
        once = 3 * gathered <= 2 * budget
        if once:
            budget, cost = budget - gathered, replace(cost, hidden=0)
        whole = replace(cost, hidden=cost.hidden + copied, logit=cost.logit + cost.slab)
        shape = tile_shape(rows, vocab, size.hidden_size, budget, whole)
        return Tiles(shape.rows, shape.vocab, shape.vocab, shape.rows, once)
    # What was kept is multiplied no more.
    multiplied = rows - size.kept if size.backward else rows
    budget = budget // MIB * MIB if budget > MIB else budget
    given = (rows, multiplied, vocab, size.hidden_size, budget, cost, processors(size.device))
    return GpuPass(*given, size.cuts_rows).tiles()


def cost_of(named: tuple[tuple[str, str], ...], math: HeadMath, weight: WeightKind) -> TileCost:
    """Most that the buffers of a tile take.

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
