"""The planner: which path computes a batch of log-probs, in which workspace.

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

import torch

from fused_prefopt.ops.cutting import TileCost, about

PATHS = ("evaluate", "stash", "local", "recompute")
COST_IN_P = {"evaluate": 1.0, "stash": 2.0, "local": 3.0, "recompute": 4.0}
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


def make_plan(
    *,
    path: str,
    engine: Callable[[str, int], str],
    rows: int,
    vocab: int,
    workspace: int,
    room: Callable[[], Room],
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
        room: what kept probabilities and tiles take of it, where that is asked.
        head_trains: weight or bias needs a gradient.
        hidden_trains: hidden needs a gradient.
        entropy: the entropies are wanted too, and their gradient.
        drop_mass: probability that a row's gradient may leave out.

    Raises:
        ValueError: a forced path that cannot serve this call.
    """

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
    if path in ("evaluate", "stash", "recompute"):
        return plan(path, "asked for")
    if path == "auto" and not head_trains:
        return plan("stash", "the head is frozen")
    found = room()
    kept = found.kept(rows, workspace)
    size = _size(rows, vocab, kept, found, workspace)
    if path == "local":
        if kept < rows:
            raise ValueError(f"path: 'local' does not fit workspace_mb: {size}")
        return plan(path, "asked for", rows)
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
