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
ASSUMPTIONS = """\
| | A100-80GB | H200 |
| --- | --- | --- |
| bf16 peak, TFLOP/s; multiprocessors | 312; 108 | 989; 132 |
| library matmul, share of the peak, in whole waves of the best of 128 × 256, 256 × 128 and 128 × 128 (at 0.9 of that) tiles | 0.80 | 0.80 |
| matmul inside a Triton kernel, 128 × 256 tile / 128 × 128 tile, share of the peak | 0.66 / 0.56 | 0.62 / 0.52 |
| memory bandwidth, TB/s | 1.8 | 4.3 |
| a buffer of up to this that the next launch reads costs half of its traffic | 20 MB | 25 MB |
| share of a matmul's output traffic (read and write where it accumulates) that its own work does not hide | 0.3 | 0.3 |
| gap between launches | 3 µs | 3 µs |
| host: measured Python of a call on one core with mocked launches, plus a library call / a Triton launch | 5 / 15 µs | 5 / 15 µs |

Rows whose reference does not move are not rescaled: nothing is counted for the others. Ours is told
the number of labelled rows, as trainers tell it; TRL's function finds its rows by a mask, which
waits for the GPU. Both get the labelled rows alone; extra bytes are the peak of all that a step
allocates, gradients included."""
