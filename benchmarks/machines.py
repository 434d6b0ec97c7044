"""The GPUs that times are predicted for: what is known of them, and what is assumed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """A GPU as the replay plays on it.

    Attributes:
        name: for people.
        folder: of its measurements below `results`.
        capability: as `torch.cuda.get_device_capability` tells it.
        peak: dense bf16 FLOP/s of the datasheet.
        processors: streaming multiprocessors.
        memory: bytes.
        bandwidth: bytes/s that a copy reaches.
        cached: bytes of a buffer that the next launch finds in the L2 cache, at half the cost.
        fused: share of the peak of a matmul inside a Triton kernel, by the area of its tile.
    """

    name: str
    folder: str
    capability: tuple[int, int]
    peak: float
    processors: int
    memory: int
    bandwidth: float
    cached: int
    fused: dict[int, float]


WIDE, SQUARE = 128 * 256, 128 * 128
MACHINES = (
    Machine(
        "A100-80GB",
        "a100",
        (8, 0),
        312e12,
        108,
        int(79.15 * 2**30),
        1.8e12,
        20_000_000,
        {WIDE: 0.66, SQUARE: 0.56},
    ),
    Machine(
        "H200",
        "h200",
        (9, 0),
        989e12,
        132,
        int(139.8 * 2**30),
        4.3e12,
        25_000_000,
        {WIDE: 0.62, SQUARE: 0.52},
    ),
)
# Share of the peak that a library's matmul reaches with full waves of its tiles; of its small tile.
LIBRARY, SMALL_TILE = 0.80, 0.9
LIBRARY_TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, SMALL_TILE))
# Share of a matmul's output traffic that its own work does not hide.
UNHIDDEN = 0.3
# Seconds between two launches, and of the host for a library call and for a Triton launch beside
# the measured Python.
GAP, LIBRARY_CALL, TRITON_LAUNCH = 3e-6, 5e-6, 15e-6
# fp32 products without tensor cores, as a share of the bf16 rate.
SINGLE = 1 / 16
