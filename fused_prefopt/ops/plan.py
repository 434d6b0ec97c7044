"""The planner: which path computes a batch of log-probs, on which engine, in which workspace.

Costs are in P, the time of one bare matmul ``hidden @ weight.T`` over the labelled rows.

=========== ==== =========================================================================
path        cost when
=========== ==== =========================================================================
`evaluate`  1P   nothing needs a gradient
`stash`     2P   the head is frozen: the forward also forms d logp / d hidden
`local`     3P   the head trains and the probabilities of all labelled rows fit three
                 quarters of the workspace: they are kept from the forward to the backward
`recompute` 4P   the head trains, any size: the backward rebuilds the logits tile by tile
=========== ==== =========================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

_SMALLEST_TILE = 64
PATHS = ("evaluate", "stash", "local", "recompute")
COST_IN_P = {"evaluate": 1.0, "stash": 2.0, "local": 3.0, "recompute": 4.0}

# What `local` must be able to afford beside the probabilities it keeps.
_FAST_TILE = 256


@dataclass(frozen=True)
class Plan:
    """How a batch of log-probs is computed.

    Attributes:
        path: `evaluate`, `stash`, `local` or `recompute`.
        engine: `torch`, `cublas` or `triton`.
        workspace: bytes that the tiles (and `local`'s probabilities) may take.
        reason: why this path, in words.
    """

    path: str
    engine: str
    workspace: int
    reason: str

    @property
    def cost(self) -> float:
        """Matmuls of forward and backward together, in P."""
        return COST_IN_P[self.path]


@dataclass(frozen=True)
class TileShape:
    """Rows × vocabulary entries of one logits tile."""

    rows: int
    vocab: int


@dataclass(frozen=True)
class TileCost:
    """Bytes of a tile's buffers, for each logit, hidden entry and weight entry of the tile.

    Attributes:
        preferred: the tile shape that is large enough.
        smallest: rows and slabs that the engine can work with.
    """

    logit: float
    hidden: int
    weight: int
    preferred: TileShape
    smallest: int = 1

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


def aligned(entries: int) -> int:
    """A row's entries, rounded up so that the next row starts where a GPU's matmul wants it."""
    return -(-entries // 16) * 16


def kept_bytes(rows: int, vocab: int, itemsize: int) -> int:
    """What `local` keeps from the forward to the backward: one probability a row and entry."""
    return rows * vocab * itemsize


def _size(rows: int, vocab: int, wanted: int, workspace: int) -> str:
    """What `local` would take of the workspace, in words; a compiler's sizes have no digits yet."""
    if torch.compiler.is_compiling():
        return "sizes are the compiled call's"
    return (
        f"{rows} rows x {vocab} entries and a tile take {wanted / 2**20:.4g} of"
        f" {workspace / 2**20:g} MiB"
    )


def make_plan(
    *,
    path: str,
    engines: Mapping[str, str],
    rows: int,
    vocab: int,
    hidden_size: int,
    workspace_mb: float,
    itemsize: int,
    cost: TileCost,
    head_trains: bool,
    hidden_trains: bool,
    entropy: bool = False,
) -> Plan:
    """Choose the cheapest path that fits, or check the one that is asked for.

    Args:
        path: `auto` or one of `PATHS`.
        engines: path → engine that would run it.
        rows: N, labelled rows (an upper bound where the count is not known).
        vocab: V, vocabulary entries.
        hidden_size: D.
        workspace_mb: budget in MiB.
        itemsize: bytes of one probability that `local` keeps.
        cost: of the tiles' buffers.
        head_trains: weight or bias needs a gradient.
        hidden_trains: hidden needs a gradient.
        entropy: the entropies are wanted too, and their gradient.

    Raises:
        ValueError: a forced path that cannot serve this call.
    """
    workspace = int(workspace_mb * 2**20)
    kept = kept_bytes(rows, vocab, itemsize)
    tiles = cost.total(min(rows, _FAST_TILE), min(vocab, _FAST_TILE), hidden_size)
    fits = kept + tiles <= workspace
    size = _size(rows, vocab, kept + tiles, workspace)

    def plan(path: str, reason: str) -> Plan:
        return Plan(path, engines[path], workspace, reason)

    if not (head_trains or hidden_trains):
        return plan("evaluate", "nothing needs a gradient")
    if entropy:
        if path not in ("auto", "recompute"):
            raise ValueError(f"path: got {path!r}, but gradients of entropies need 'recompute'")
        return plan("recompute", "gradients of entropies need the logits")
    if path == "stash" and head_trains:
        raise ValueError("path: 'stash' forms no head gradient, but weight or bias needs one")
    if path == "local" and not fits:
        raise ValueError(f"path: 'local' does not fit workspace_mb: {size}")
    if path != "auto":
        return plan(path, "asked for")
    if not head_trains:
        return plan("stash", "the head is frozen")
    return plan("local" if fits else "recompute", f"the head trains; {size}")
