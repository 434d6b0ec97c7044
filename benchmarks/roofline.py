"""Predicted time of each path from matmul rates, memory passes and tile counts. Not a measurement.

A path is a list of steps that follow each other. A matmul takes whole waves of tiles at an assumed
share of the peak, or as long as its operands take to move, whichever is more; a pass takes as long
as its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from benchmarks.machines import Machine
from benchmarks.shapes import LARGEST_OUTPUT, Shape

# Bytes of the workspace, and the most vocabulary entries of a slab.
WORKSPACE, WIDEST = 256 * 2**20, 16384
PATHS = ("evaluate", "stash", "local", "recompute")
ENGINES = ("cublas", "triton")
# What a fused kernel does to its tile → the case that stands for it.
TILE_CASES = {
    "fold": "fold logits",
    "keep": "fold logits, kept",
    "gradient": "recompute gradient",
}
_HALF, _SINGLE, _PARTIAL = 2, 4, 8


@dataclass(frozen=True)
class Step:
    """One kernel: seconds of arithmetic (none for a pass) and of memory traffic.

    Attributes:
        name: what it does.
        arithmetic: seconds of the matrix units.
        memory: seconds of the memory.
    """

    name: str
    arithmetic: float
    memory: float

    @property
    def seconds(self) -> float:
        return max(self.arithmetic, self.memory)


@dataclass(frozen=True)
class Prediction:
    """Of one path, engine, shape and machine.

    Attributes:
        ms: milliseconds of forward and backward together.
        in_p: the same in P, the library's bare matmul in this model.
        memory_share: share of the time that steps bound by memory take.
    """

    ms: float
    in_p: float
    memory_share: float

    @property
    def bound(self) -> str:
        return "memory" if self.memory_share > 0.5 else "matmul"


@dataclass(frozen=True)
class FusedTile:
    """How a fused kernel is compiled: the size of its tile, the row tiles of a group, and the
    programs that one multiprocessor runs at once."""

    rows: int
    vocab: int
    group: int
    resident: int


def waves(tiles: int, slots: int) -> int:
    """How often a machine that runs `slots` programs at once is filled by `tiles` programs."""
    return ceil(tiles / slots)


def occupancy(row: Mapping[str, Any], machine: Machine) -> int:
    """Programs of a compiled kernel that one multiprocessor runs at once."""
    threads = 32 * row["warps"]
    # Registers are handed out to a warp in units of 256, and a program reserves 1 KiB itself.
    registers = row["warps"] * ceil(32 * row["registers"] / 256) * 256
    by_shared = machine.shared // (row["shared"] + 1024)
    return min(machine.registers // registers, machine.threads // threads, by_shared)


def multiply(
    machine: Machine,
    name: str,
    size: tuple[int, int, int],
    tile: tuple[int, int],
    *,
    share: float,
    resident: int,
    traffic: float,
) -> Step:
    """A matmul.

    Args:
        machine: where.
        name: of the step.
        size: (m, n, k): an (m, n) output that sums over k.
        tile: of the output, one program each.
        share: of the peak, with full waves.
        resident: programs that share a multiprocessor.
        traffic: bytes read and written.
    """
    m, n, k = size
    slots = machine.processors * resident
    # The last wave takes as long as a full one, and a cut tile as long as a whole one.
    full = waves(ceil(m / tile[0]) * ceil(n / tile[1]), slots)
    flops = 2 * full * slots * tile[0] * tile[1] * k
    return Step(name, flops / (share * machine.peak), traffic / machine.bandwidth)


def library(machine: Machine, name: str, size: tuple[int, int, int], traffic: float) -> Step:
    """A matmul of the vendor's library, in the better of its usual tiles."""
    tiles = ((128, 256), (256, 128), (128, 128))
    steps = (
        multiply(machine, name, size, tile, share=machine.library, resident=1, traffic=traffic)
        for tile in tiles
    )
    return min(steps, key=lambda step: step.seconds)


@dataclass(frozen=True)
class _Sizes:
    """Of one prediction: rows n, hidden size d, one slab of v entries, and who computes it."""

    machine: Machine
    n: int
    d: int
    v: int
    fused: Mapping[str, FusedTile]

    def passed(self, name: str, size: float) -> Step:
        return Step(name, 0.0, size / self.machine.bandwidth)

    def logits(self, itemsize: int = _SINGLE) -> Step:
        operands = _HALF * (self.n + self.v) * self.d
        size = (self.n, self.v, self.d)
        return library(self.machine, "logits", size, operands + itemsize * self.n * self.v)

    def tiles(self, kind: str) -> Step:
        """Logits by the fused kernel; all but a mere fold writes a bf16 for each of them."""
        tile = self.fused[kind]
        groups = ceil(self.n / (tile.rows * tile.group))
        written = 0 if kind == "fold" else _HALF * self.n * self.v
        if kind != "gradient":
            written += self._partials(kind)
        return multiply(
            self.machine,
            "tiles",
            (self.n, self.v, self.d),
            (tile.rows, tile.vocab),
            share=self.machine.fused,
            resident=tile.resident,
            traffic=_HALF * (self.n + groups * self.v) * self.d + written,
        )

    def merge(self, kind: str) -> Step:
        return self.passed("merge partials", self._partials(kind))

    def _partials(self, kind: str) -> int:
        return _PARTIAL * self.n * ceil(self.v / self.fused[kind].vocab)

    def hidden_product(self) -> Step:
        """(n, v) times the weight, added to an fp32 (n, d)."""
        read = _HALF * (self.n * self.v + self.v * self.d)
        size = (self.n, self.d, self.v)
        return library(self.machine, "d hidden", size, read + 2 * _SINGLE * self.n * self.d)

    def weight_product(self) -> Step:
        read = _HALF * (self.n * self.v + self.n * self.d)
        return library(
            self.machine, "d weight", (self.v, self.d, self.n), read + _HALF * self.v * self.d
        )

    def gradients(self) -> list[Step]:
        return [self.weight_product(), self.hidden_product()]

    def cublas(self, path: str) -> tuple[list[Step], list[Step]]:
        """Forward and backward: fp32 logits in memory, a pass over them, bf16 for a matmul."""
        entries = self.n * self.v
        fold = self.passed("fold", _SINGLE * entries)
        fold_and_keep = self.passed("fold and keep", (_SINGLE + _HALF) * entries)
        if path == "evaluate":
            return [self.logits(), fold], []
        if path == "stash":
            return [self.logits(), fold_and_keep, self.hidden_product()], []
        if path == "local":
            return [self.logits(), fold_and_keep], [self.convert(), *self.gradients()]
        residual = self.passed("residual", (_SINGLE + _HALF) * entries)
        return [self.logits(), fold], [self.logits(), residual, *self.gradients()]

    def triton(self, path: str) -> tuple[list[Step], list[Step]]:
        """Forward and backward: logits never in memory, bf16 only where a matmul reads it."""
        fold = [self.tiles("fold"), self.merge("fold")]
        fold_and_keep = [self.tiles("keep"), self.merge("keep")]
        if path == "evaluate":
            return fold, []
        if path == "stash":
            return [*fold_and_keep, self.convert(), self.hidden_product()], []
        if path == "local":
            return fold_and_keep, [self.convert(), *self.gradients()]
        return fold, [self.tiles("gradient"), *self.gradients()]

    def convert(self) -> Step:
        """Kept exponentials become the next matmul's operand, in place."""
        return self.passed("convert", 2 * _HALF * self.n * self.v)


def slabs(vocab: int, width: int) -> Iterator[int]:
    """Widths of the slabs of a vocabulary."""
    for start in range(0, vocab, width):
        yield min(width, vocab - start)


def bare_matmul(machine: Machine, shape: Shape) -> float:
    """Seconds of P: bf16 hidden @ weight.T into an existing bf16 output."""
    n = shape.labelled_rows
    widths = slabs(shape.vocab, LARGEST_OUTPUT // (_HALF * n))
    sizes = (_Sizes(machine, n, shape.hidden_size, v, {}) for v in widths)
    return sum(size.logits(_HALF).seconds for size in sizes)


def slab_widths(engine: str, path: str, n: int, vocab: int) -> tuple[int, int]:
    """Vocabulary entries of a slab in the forward and in the backward."""
    if engine == "cublas":
        # fp32 products, and where the next matmul follows at once its bf16 operand beside them.
        size = _SINGLE + (_HALF if path in ("stash", "recompute") else 0)
        width = min(WIDEST, WORKSPACE // (size * n))
        return width, width
    width = min(WIDEST, WORKSPACE // (_HALF * n))
    # Only `stash` has a slab in its forward.
    return (width if path == "stash" else vocab), width


def steps(
    machine: Machine, shape: Shape, path: str, engine: str, fused: Mapping[str, FusedTile]
) -> list[Step]:
    """Every step of a forward and its backward, slab after slab."""
    n = shape.labelled_rows
    found = []
    for direction, width in enumerate(slab_widths(engine, path, n, shape.vocab)):
        for v in slabs(shape.vocab, width):
            sizes = _Sizes(machine, n, shape.hidden_size, v, fused)
            both = sizes.cublas(path) if engine == "cublas" else sizes.triton(path)
            found += both[direction]
    return found


def predict(
    machine: Machine, shape: Shape, path: str, engine: str, fused: Mapping[str, FusedTile]
) -> Prediction:
    """Time of a path, with the tiles that `fused_tiles` gives."""
    taken = steps(machine, shape, path, engine, fused)
    total = sum(step.seconds for step in taken)
    memory = sum(step.seconds for step in taken if step.memory > step.arithmetic)
    return Prediction(1e3 * total, total / bare_matmul(machine, shape), memory / total)


def fused_tiles(kernels: Mapping[str, Any], machine: Machine) -> dict[str, FusedTile]:
    """The kernels of `TILE_CASES` in bf16, as compiled for a machine.

    Raises:
        ValueError: a case is not among the compiled kernels.
    """
    rows = {
        row["case"]: row
        for row in kernels.get(machine.target, {"rows": []})["rows"]
        if row["dtype"] == "bf16" and row["status"] == "ok"
    }
    missing = sorted(set(TILE_CASES.values()) - rows.keys())
    if missing:
        raise ValueError(f"{machine.target}: got no compiled kernel for {', '.join(missing)}")
    return {kind: _fused_tile(rows[case], machine) for kind, case in TILE_CASES.items()}


def _fused_tile(row: Mapping[str, Any], machine: Machine) -> FusedTile:
    named = dict(word.split("=") for word in row["configuration"].split())
    rows, vocab, group = (int(named[name]) for name in ("ROWS", "VOCAB", "GROUP"))
    return FusedTile(rows, vocab, group, max(1, occupancy(row, machine)))
