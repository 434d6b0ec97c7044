"""The GPUs that times are predicted for, and what is assumed of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """What is known or assumed of a GPU.

    Attributes:
        name: for people.
        folder: of its measurements below `results`.
        target: of its compiled kernels.
        peak: dense bf16 FLOP/s of the datasheet.
        library: share of the peak that a library matmul reaches with full waves.
        fused: share of the peak that a fused Triton tile kernel reaches with full waves.
        bandwidth: bytes/s that a copy reaches.
        processors: streaming multiprocessors.
        shared: bytes of shared memory of one of them.
    """

    name: str
    folder: str
    target: str
    peak: float
    library: float
    fused: float
    bandwidth: float
    processors: int
    shared: int
    registers: int = 65_536
    threads: int = 2048


MACHINES = (
    Machine("A100-80GB", "a100", "sm_80", 312e12, 0.80, 0.67, 0.9 * 2.0e12, 108, 164 * 1024),
    Machine("H200", "h200", "sm_90", 989e12, 788 / 989, 0.625, 4.3e12, 132, 228 * 1024),
)
ASSUMPTIONS = """\
- Peak and bandwidth: the datasheets' dense bf16 rate and memory bandwidth. A100-80GB: 312 TFLOP/s,
  2.0 TB/s, 108 multiprocessors. H200: 989 TFLOP/s, 4.8 TB/s, 132 multiprocessors.
- Copies reach 4.3 TB/s on an H200 (measured), 90 % of the datasheet; the same share is assumed of
  an A100.
- A library matmul reaches 788 TFLOP/s on an H200 (measured, 8192³ on random data), 80 % of the
  peak; 80 % of an A100's, from public figures of chunked cuBLAS heads.
- A fused Triton tile kernel reaches 67 % of an A100's peak (public: cut-cross-entropy's forward)
  and 62.5 % of an H200's (public: 60 to 65 % for Triton matmuls on an H100). Its epilogue is in
  that share, so no epilogue is counted beside it.
- A library matmul uses the better of 128 × 256, 256 × 128 and 128 × 128 tiles, one program on a
  multiprocessor at a time. A fused kernel uses its default tile; how many programs share a
  multiprocessor follows from its registers, warps and shared memory, as compiled.
- Rows whose running maximum no longer rises are not rescaled: nothing is counted for the others.
- A matmul's own reads and writes overlap its arithmetic; other passes over memory overlap nothing.
  The fused kernel reads the weight once for each group of row tiles. Launches cost nothing.
- The workspace is 256 MiB and a slab at most 16384 entries wide: for `cublas` it holds fp32 logits
  and, for `stash` and `recompute`, their bf16 operand; for `triton` that operand alone, and fused
  forwards that need none take the vocabulary at once. `local` keeps its probabilities, 2 bytes a
  row and entry, beyond that workspace."""
