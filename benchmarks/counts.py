"""FLOPs, bytes moved and bytes alive of a candidate, counted from its design and not measured.

Rows n are the labelled ones or all of them, b is the bytes of the operands' dtype:

    FLOPs = 2 n V D matmuls
    bytes moved = matmuls b (n D + V D) + n V (b narrow + 4 single)
    extra bytes = logits alive + 4 n D hidden + V D weight + the workspace

What a matmul reads twice because of its tiles or chunks is not counted, nor are passes over (n, D).
PyTorch's linear_cross_entropy is counted as it works by default in bf16 on CUDA, the compiled eager
loss as Inductor writes it in PyTorch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.shapes import Shape

WORKSPACE = 256 * 2**20
# TRL's tiles of logits, and the rows that Liger's per-token function takes at once.
_TRL_ROWS, _TRL_VOCAB, _LIGER_ROWS = 4096, 32_768, 512


@dataclass(frozen=True)
class Counts:
    """Of one step: FLOPs of its matmuls, bytes moved, bytes beyond inputs and gradients."""

    flops: int
    moved: int
    extra: int

    @property
    def intensity(self) -> float:
        """FLOPs for each byte moved."""
        return self.flops / self.moved


def _all_rows(shape: Shape, rows: int) -> int:
    return rows


def _a_pair(shape: Shape, rows: int) -> int:
    return 2 * shape.length


def _torch_chunk(shape: Shape, rows: int) -> int:
    """Half of the power of two whose logits take no less than the hidden states."""
    wanted = -(-rows // -(-shape.vocab // shape.hidden_size))
    return max(1, (1 << (wanted - 1).bit_length()) // 2)


@dataclass(frozen=True)
class _Design:
    """The work of a candidate for each logit.

    Attributes:
        matmuls: over the rows and the vocabulary, forward and backward together.
        narrow: how often a logit is read or written in the operands' dtype.
        single: how often in fp32.
        alive: bytes of a logit that are alive at the peak.
        tile_rows: shape, rows → the most rows whose logits are alive.
        tile_vocab: the most entries of the vocabulary that are, 0 for all.
        labelled: whether only labelled rows meet the head.
        workspace: whether the logits live in the workspace instead.
        hidden: whether dhidden is summed in fp32 beside the gradient.
        weight: bytes of a second gradient of the weight.
        copies: logits in the operands' dtype that are alive beside `alive`.
    """

    matmuls: int
    narrow: int
    single: int
    alive: int = 0
    tile_rows: Callable[[Shape, int], int] = _all_rows
    tile_vocab: int = 0
    labelled: bool = True
    workspace: bool = False
    hidden: bool = False
    weight: int = 0
    copies: int = 0


def _ours(matmuls: int, narrow: int, single: int, hidden: bool = True) -> _Design:
    return _Design(matmuls, narrow, single, workspace=True, hidden=hidden)


def _trl(matmuls: int, narrow: int, hidden: bool = True, weight: int = 0) -> _Design:
    def rows(shape: Shape, rows: int) -> int:
        return _TRL_ROWS

    return _Design(matmuls, narrow, 0, 2, rows, _TRL_VOCAB, hidden=hidden, weight=weight)


def _liger_rows(shape: Shape, rows: int) -> int:
    return _LIGER_ROWS


_DESIGNS = {
    "ours: evaluate": _ours(1, 0, 2, hidden=False),
    "ours: stash": _ours(2, 2, 2),
    "ours: local": _ours(3, 5, 2),
    "ours: recompute": _ours(4, 3, 4),
    "TRL: no gradient": _trl(1, 2, hidden=False),
    "TRL: frozen head": _trl(3, 6),
    "TRL": _trl(4, 7, weight=4),
    # Logits, kept for their mean, their gradient, and the fp32 gradient of the gathered entries.
    "Liger": _Design(3, 6, 8, 4, _a_pair, labelled=False, copies=2),
    "Liger: per token": _Design(4, 7, 26, 22, _liger_rows, labelled=False, weight=2),
    "cut-cross-entropy": _Design(4, 0, 0),
    "cut-cross-entropy: full gradient": _Design(4, 0, 0),
    # fp32 logits of a chunk and their bf16 copy; both passes make them, the second also dlogits.
    "torch linear_cross_entropy": _Design(4, 3, 17, 6, _torch_chunk, hidden=True),
    # bf16 logits, overwritten by their gradient, and the fp32 gradient of the gathered entries.
    "eager, compiled": _Design(3, 7, 3, alive=6, labelled=False),
    "eager, labelled rows": _Design(3, 5, 8, alive=12),
    "eager, fp32 logits": _Design(3, 0, 9, alive=12, labelled=False, weight=8),
    "eager": _Design(3, 5, 8, alive=12, labelled=False),
}


def count(name: str, shape: Shape, itemsize: int) -> Counts | None:
    """Counts of a candidate, or None where its design is not known well enough.

    Args:
        name: of the candidate; what follows a path of ours (its engine) makes no difference.
        shape: of the batch.
        itemsize: bytes of the operands' dtype.
    """
    design = _DESIGNS.get(_base(name))
    if design is None:
        return None
    rows = shape.labelled_rows if design.labelled else shape.rows
    logits, weight = rows * shape.vocab, shape.vocab * shape.hidden_size
    hidden = rows * shape.hidden_size
    moved = design.matmuls * itemsize * (hidden + weight)
    moved += logits * (itemsize * design.narrow + 4 * design.single)
    alive = design.alive + design.copies * itemsize
    extra = alive * _alive(design, shape, rows) + design.weight * weight
    extra += 4 * hidden * design.hidden + WORKSPACE * design.workspace
    if _base(name) == "ours: local":
        extra += itemsize * logits
    return Counts(2 * logits * shape.hidden_size * design.matmuls, moved, extra)


def _alive(design: _Design, shape: Shape, rows: int) -> int:
    most_vocab = design.tile_vocab or shape.vocab
    return min(rows, design.tile_rows(shape, rows)) * min(shape.vocab, most_vocab)


def _base(name: str) -> str:
    """A candidate's name without the engine; Liger's other losses are counted as its DPO."""
    if name.startswith("Liger: ") and name != "Liger: per token":
        return "Liger"
    return name.split(",")[0] if name.startswith("ours: ") else name
