"""FLOPs, bytes moved and bytes alive of a candidate, counted from its design and not measured.

Rows n are the labelled ones or all of them, b is the bytes of the operands' dtype:

    FLOPs = 2 n V D matmuls
    bytes moved = matmuls b (n D + V D) + n V (b narrow + 4 single)
    extra bytes = logits alive + 4 n D hidden + V D weight + the workspace

What a matmul reads twice because of its tiles is not counted, nor are passes over (n, D).
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class _Design:
    """What a candidate does for each logit.

    Attributes:
        matmuls: over the rows and the vocabulary, forward and backward together.
        narrow: how often a logit is read or written in the operands' dtype.
        single: how often in fp32.
        alive: bytes of a logit that are alive at the peak.
        tile: the most logits alive, (rows, vocabulary); 0 stands for all there are.
        labelled: whether only labelled rows meet the head.
        workspace: whether the logits live in the workspace instead.
        hidden: whether dhidden is summed in fp32 beside the gradient.
        weight: bytes of a second gradient of the weight.
    """

    matmuls: int
    narrow: int
    single: int
    alive: int = 0
    tile: tuple[int, int] = (0, 0)
    labelled: bool = True
    workspace: bool = False
    hidden: bool = False
    weight: int = 0


def _ours(matmuls: int, narrow: int, single: int, hidden: bool = True) -> _Design:
    return _Design(matmuls, narrow, single, workspace=True, hidden=hidden)


_EAGER = _Design(3, 5, 8, alive=12, labelled=False)
_TRL_TILE = (_TRL_ROWS, _TRL_VOCAB)
_DESIGNS = {
    "ours: evaluate": _ours(1, 0, 2, hidden=False),
    "ours: stash": _ours(2, 2, 2),
    "ours: local": _ours(3, 5, 2),
    "ours: recompute": _ours(4, 3, 4),
    "TRL: no gradient": _Design(1, 2, 0, alive=2, tile=_TRL_TILE),
    "TRL: frozen head": _Design(3, 6, 0, alive=2, tile=_TRL_TILE, hidden=True),
    "TRL": _Design(4, 7, 0, alive=2, tile=_TRL_TILE, hidden=True, weight=4),
    "Liger": _Design(3, 6, 8, alive=12, tile=(-1, 0), labelled=False, weight=2),
    "Liger: per token": _Design(
        4, 7, 26, alive=22, tile=(_LIGER_ROWS, 0), labelled=False, weight=2
    ),
    "cut-cross-entropy": _Design(4, 0, 0),
    "cut-cross-entropy: full gradient": _Design(4, 0, 0),
    "eager, labelled rows": _Design(3, 5, 8, alive=12),
    "eager, fp32 logits": _Design(3, 0, 9, alive=12, labelled=False, weight=8),
    "eager": _EAGER,
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
    extra = design.alive * _alive(design, shape, rows) + design.weight * weight
    extra += 4 * hidden * design.hidden + WORKSPACE * design.workspace
    if _base(name) == "ours: local":
        extra += itemsize * logits
    return Counts(2 * logits * shape.hidden_size * design.matmuls, moved, extra)


def _alive(design: _Design, shape: Shape, rows: int) -> int:
    most_rows, most_vocab = design.tile
    if most_rows < 0:  # a pair of sequences at a time
        most_rows = 2 * shape.length
    return min(rows, most_rows or rows) * min(shape.vocab, most_vocab or shape.vocab)


def _base(name: str) -> str:
    """A candidate's name without the engine; Liger's other losses are counted as its DPO."""
    if name.startswith("Liger: ") and name != "Liger: per token":
        return "Liger"
    return name.split(",")[0] if name.startswith("ours: ") else name
