"""Tile shapes and engine choices for each GPU architecture: data, and how a GPU finds its own.

A shape is chosen here, not at run time, so that a first call costs no search and two machines of
one kind give the same bits. `fused_prefopt.ops.tuning` can search instead, where it is asked to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Block:
    """How one program of a matmul kernel works.

    Attributes:
        rows: hidden rows of its logits tile.
        vocab: vocabulary entries of its logits tile.
        depth: hidden entries loaded at a time.
        group: programs that follow each other down the rows before the vocabulary advances: they
            share a slab of the weight in the L2 cache.
        warps: of 32 threads.
        stages: of the loads' pipeline.
    """

    rows: int
    vocab: int
    depth: int
    group: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Architecture:
    """A compute capability and what is chosen for it.

    Attributes:
        name: "sm_80", "gfx90a".
        capability: (8, 0); AMD's of gfx90a is (9, 0).
        shared: bytes of shared memory that one program may take.
        descriptors: matmul kernels load their tiles through tensor descriptors (TMA).
        plain: shape of matmul kernels on fp16 and bf16 that only fold their tile.
        rich: the same where registers go to more than that: a softcap, sums of a gradient, stored
            exponentials, loads of rows that are not whole 16 bytes.
        single: shape on fp32, which is multiplied without tensor cores, exactly.
        fused: role of an engine → the largest hidden sizes, without a softcap and with one, up to
            which its matmul is faster inside the kernel than beside the library's.
    """

    name: str
    capability: tuple[int, int]
    shared: int
    descriptors: bool
    plain: Block
    rich: Block
    single: Block
    fused: dict[str, tuple[int, int]]

    def block(self, itemsize: int, rich: bool) -> Block:
        """The shape for operands of `itemsize` bytes."""
        if itemsize != 2:
            return self.single
        return self.rich if rich else self.plain

    def engine(self, role: str, hidden_size: int, bent: bool) -> str:
        """`triton` or `cublas`, whichever is faster.

        Args:
            role: one of `fused_prefopt.ops.engines.ROLES`.
            hidden_size: D.
            bent: whether the head has a softcap.
        """
        largest = self.fused.get(role, (0, 0))[bent]
        return "triton" if hidden_size <= largest else "cublas"


_SINGLE = Block(rows=64, vocab=64, depth=32, group=8, warps=4, stages=2)
# The widest tile that compiles without a spill, and one that leaves room for an epilogue.
_WIDE = Block(rows=128, vocab=256, depth=64, group=8, warps=8, stages=3)
_SQUARE = Block(rows=128, vocab=128, depth=64, group=8, warps=8, stages=3)
# Predicted, not measured (`python -m benchmarks replay`): a library's matmul is faster than a fused
# kernel's, by a fifth with the wide tile and by half with the square one; its fp32 logits then pass
# through memory, which takes the larger share of the time the smaller the hidden size.
_FUSED = {"fold": (1600, 880), "keep": (1088, 1088), "rebuild": (2080, 1120)}

ARCHITECTURES = (
    Architecture("sm_80", (8, 0), 163 * 1024, False, _WIDE, _SQUARE, _SINGLE, _FUSED),
    # Consumer GPUs, those of sm_89 and sm_12x too: a program gets less than on sm_80.
    Architecture("sm_86", (8, 6), 99 * 1024, False, _SQUARE, _SQUARE, _SINGLE, _FUSED),
    Architecture("sm_90", (9, 0), 227 * 1024, True, _WIDE, _SQUARE, _SINGLE, _FUSED),
    Architecture("sm_100", (10, 0), 227 * 1024, True, _WIDE, _SQUARE, _SINGLE, _FUSED),
)
# 64 KiB of LDS, and no descriptors. A stage more is a buffer more than AMD's pipeline has.
_AMD_WIDE = Block(rows=128, vocab=256, depth=32, group=8, warps=8, stages=2)
_AMD_SQUARE = Block(rows=128, vocab=128, depth=64, group=8, warps=8, stages=2)
AMD_ARCHITECTURES = (
    Architecture("gfx90a", (9, 0), 64 * 1024, False, _AMD_WIDE, _AMD_SQUARE, _SINGLE, _FUSED),
)

# What `autotune` tries; a shape that does not fit a GPU drops out by itself.
CANDIDATES = tuple(
    Block(rows, vocab, depth, group, warps, stages)
    for rows, vocab, depth, warps in (
        (64, 128, 64, 4),
        (128, 128, 32, 8),
        (128, 128, 64, 8),
        (128, 256, 32, 8),
        (128, 256, 64, 8),
        (256, 128, 32, 8),
        (256, 128, 64, 8),
    )
    for stages in (3, 4)
    for group in (8, 16)
)


def architecture(
    capability: tuple[int, int], *, hip: bool = False, shared: int | None = None
) -> Architecture:
    """What is chosen for a GPU: the newest architecture that is not newer and whose shapes fit.

    Args:
        capability: (major, minor), as `torch.cuda.get_device_capability` returns.
        hip: whether it is AMD's, whose capabilities are numbers of their own.
        shared: bytes of shared memory that the GPU gives one program, None if it is not known.

    Raises:
        ValueError: the GPU is older than every architecture here, or has too little shared memory.
    """
    table = AMD_ARCHITECTURES if hip else ARCHITECTURES
    known = [entry for entry in table if entry.capability <= capability]
    if not known:
        raise ValueError(f"capability: got {capability}, wanted at least {table[0].name}")
    fitting = [entry for entry in known if shared is None or entry.shared <= shared]
    if not fitting:
        least = min(entry.shared for entry in known)
        raise ValueError(f"shared: got {shared} bytes, wanted at least {least}")
    found = fitting[-1]
    # A generation that is not known may load its tiles in another way.
    same = found.capability[0] == capability[0]
    return found if same else replace(found, descriptors=False)
