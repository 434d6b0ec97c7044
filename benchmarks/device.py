"""GPUs that times are predicted for, and how a recording is played on one.

A machine is what is known and assumed of a GPU, traffic what each kernel moves and multiplies; the
host is played beside the GPU on a second timeline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from torch import Tensor


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


# A tensor, and how many bytes of it; None for all.
Moved = list[tuple[Tensor, int | None]]


@dataclass(frozen=True)
class Traffic:
    """Of one launch.

    Attributes:
        reads, writes: tensors, and the bytes of them.
        size: (m, n, k) of the matmul inside, or None.
        tile: of that matmul, or None.
        itemsize: of its operands.
    """

    reads: Moved = field(default_factory=list)
    writes: Moved = field(default_factory=list)
    size: tuple[int, int, int] | None = None
    tile: tuple[int, int] | None = None
    itemsize: int = 2


def traffic_of(kernel: str, arguments: Any, grid: Any) -> Traffic:
    """Bytes and products of a launch.

    Args:
        kernel: name of the jit function.
        arguments: by their names.
        grid: of the launch.

    Raises:
        KeyError: a kernel that is not known here, and so would cost nothing.
    """
    if kernel not in _KERNELS:
        raise KeyError(f"{kernel}: its traffic is not known, add it to benchmarks/device.py")
    return _KERNELS[kernel](arguments)


def _given(*values: Any) -> Moved:
    return [(value, None) for value in values if isinstance(value, Tensor)]


def _base(value: Any) -> Tensor:
    """The tensor of an operand, which may be a descriptor."""
    found: Tensor = getattr(value, "base", value)
    return found


def _slab(value: Tensor | None, rows: int, width: int) -> Moved:
    return [] if value is None else [(value, rows * width * value.itemsize)]


def _fold_logits(a: Any) -> Traffic:
    hidden, weight = _base(a.hidden), _base(a.weight)
    written = _given(a.maximum, a.total, a.target_logit, a.kept, a.weighted, a.squares)
    written += _given(a.logit_sum, a.best)
    return Traffic(
        _given(hidden, weight, a.bias, a.targets),
        written,
        (a.rows, a.vocab, a.depth),
        (a.ROWS, a.VOCAB),
        hidden.itemsize,
    )


def _recompute_gradient(a: Any) -> Traffic:
    hidden, weight = _base(a.hidden), _base(a.weight)
    return Traffic(
        _given(hidden, weight, a.bias, a.targets, a.logsumexps, a.residuals, a.scale),
        _given(a.out, a.column_sums),
        (a.rows, a.vocab, a.depth),
        (a.ROWS, a.VOCAB),
        hidden.itemsize,
    )


def _merge_partials(a: Any) -> Traffic:
    parts = _given(a.part_maximum, a.part_total, a.part_weighted, a.part_squares)
    parts += _given(a.part_logit_sum, a.part_best)
    running = _given(a.maximum, a.total, a.weighted, a.squares, a.logit_sum, a.best)
    return Traffic(parts + running, running + _given(a.reference, a.factor))


def _fold_rows(a: Any) -> Traffic:
    rows = a.products.shape[0]
    running = _given(a.maximum, a.total, a.target_logit)
    # What is read a second time for `kept` is in the cache; rows that are rescaled are rare.
    kept = _slab(a.kept, a.kept_rows, a.width) if isinstance(a.kept, Tensor) else []
    reads = _slab(a.products, rows, a.width) + _given(a.bias, a.targets, a.reference) + running
    return Traffic(reads, running + kept)


def _logits_gradient(a: Any) -> Traffic:
    numbers = _given(a.bias, a.targets, a.logsumexps, a.residuals, a.scale, a.entropies)
    maxima = _slab(a.maxima, a.rows, -(-a.width // a.part_width)) if _is(a.maxima) else []
    reads = _slab(a.source, a.rows, a.width) + numbers + maxima
    return Traffic(reads, _slab(a.out, a.rows, a.width) + _given(a.column_sums))


def _is(value: object) -> bool:
    return isinstance(value, Tensor)


def _spread_rows(a: Any) -> Traffic:
    rows, width = a.values.shape
    reads = _given(a.values, a.index, a.factor, a.scale, a.added, a.own)
    return Traffic(reads, _slab(a.out, rows, width))


def _fold_kl_rows(a: Any) -> Traffic:
    rows = a.products.shape[0]
    slabs = _slab(a.products, rows, a.width) + _slab(a.other_products, rows, a.width)
    running = _given(a.maximum, a.total, a.target_logit, a.weighted)
    running += _given(a.other_maximum, a.other_total, a.other_target_logit)
    running += _given(a.out_maximum, a.out_total, a.out_target_logit)
    running += _given(a.in_maximum, a.in_total, a.in_target_logit)
    return Traffic(slabs + _given(a.bias, a.other_bias, a.targets) + running, running)


def _kl_gradient(a: Any) -> Traffic:
    slabs = _slab(a.products, a.rows, a.width) + _slab(a.other_products, a.rows, a.width)
    numbers = _given(a.logsumexps, a.other_logsumexps, a.scale, a.other_scale, a.target_values)
    reads = slabs + numbers + _given(a.bias, a.other_bias, a.targets)
    return Traffic(reads, _slab(a.out, a.rows, a.width) + _given(a.column_sums))


def _trl_pass(writes: bool) -> Callable[[Any], Traffic]:
    def traffic(a: Any) -> Traffic:
        values = vars(a)
        tensors = [value for value in values.values() if isinstance(value, Tensor)]
        slab, rows = tensors[0], tensors[1].shape[0]
        moved = _slab(slab, rows, a.n_cols)
        return Traffic(moved + _given(*tensors[1:]), moved if writes else _given(*tensors[2:]))

    return traffic


_KERNELS: dict[str, Callable[[Any], Traffic]] = {
    "_fold_logits_kernel": _fold_logits,
    "_recompute_gradient_kernel": _recompute_gradient,
    "_merge_partials_kernel": _merge_partials,
    "_fold_rows_kernel": _fold_rows,
    "_logits_gradient_kernel": _logits_gradient,
    "_spread_rows_kernel": _spread_rows,
    "_fold_kl_rows_kernel": _fold_kl_rows,
    "_kl_gradient_kernel": _kl_gradient,
    # Rows whose factor is 1, nearly all, are not touched.
    "_rescale_rows_kernel": lambda a: Traffic(_given(a.factor), []),
    "_sequence_sums_kernel": lambda a: Traffic(_given(a.values, a.ids), _given(a.sums, a.lengths)),
    # TRL's.
    "_forward_kernel": _trl_pass(writes=False),
    "_backward_kernel": _trl_pass(writes=True),
}


# A storage, and how many bytes of it.
Part = tuple[int, int]


@dataclass
class Event:
    """A call that a GPU would run.

    Attributes:
        name: of the operator or kernel.
        reads, writes: (storage, bytes) of what it reads and writes.
        size: (m, n, k) of a matmul, or None.
        tile: of a fused kernel's matmul, or None for the library's.
        accumulates: whether a matmul adds to its output.
        itemsize: bytes of a matmul's operands.
        triton: whether it is a kernel launch, not a library call.
        waits: whether the host waits for its result.
        anchor: whether it is a launch or a matmul into an output: what a mocked step meets too.
    """

    name: str
    reads: list[Part]
    writes: list[Part]
    size: tuple[int, int, int] | None = None
    tile: tuple[int, int] | None = None
    accumulates: bool = False
    itemsize: int = 2
    triton: bool = False
    waits: bool = False
    anchor: bool = False


@dataclass(frozen=True)
class Played:
    """A recording on a machine.

    Attributes:
        seconds: from the first call of the host to the end of the last kernel.
        exposed: of them, the GPU has waited for the host, gaps between launches not counted.
        launches: calls that the GPU ran.
        moved: bytes read and written.
    """

    seconds: float
    exposed: float
    launches: int
    moved: int


def waves(tiles: int, processors: int) -> int:
    """How often a GPU is filled by as many tiles."""
    return ceil(tiles / processors)


def matmul_seconds(machine: Machine, event: Event) -> float:
    """Of a matmul's arithmetic, in whole waves of its tiles.

    Raises:
        ValueError: a fused kernel's tile that no rate is assumed for.
    """
    assert event.size is not None
    m, n, k = event.size
    peak = machine.peak * (1.0 if event.itemsize == 2 else SINGLE)

    def seconds(rows: int, columns: int, share: float) -> float:
        full = waves(ceil(m / rows) * ceil(n / columns), machine.processors)
        return 2 * full * machine.processors * rows * columns * k / (share * peak)

    if event.tile is None:
        return min(seconds(rows, cols, LIBRARY * part) for rows, cols, part in LIBRARY_TILES)
    area = event.tile[0] * event.tile[1]
    if area not in machine.fused:
        raise ValueError(f"{event.name}: got a tile {event.tile}, no rate is assumed for it")
    return seconds(*event.tile, machine.fused[area])


def event_seconds(machine: Machine, events: Sequence[Event], place: int) -> float:
    """Of one event, with what its neighbours leave or find in the cache."""
    event = events[place]
    before = {key for key, _ in events[place - 1].writes} if place else set()
    after = {key for key, _ in events[place + 1].reads} if place + 1 < len(events) else set()

    def cost(parts: Sequence[tuple[int, int]], near: set[int]) -> float:
        halves = (0.5 if key in near and size <= machine.cached else 1.0 for key, size in parts)
        return sum(half * size for half, (_, size) in zip(halves, parts, strict=True))

    reads, writes = cost(event.reads, before), cost(event.writes, after)
    if event.size is None:
        return (reads + writes) / machine.bandwidth
    output = UNHIDDEN * writes * (2 if event.accumulates else 1)
    return max(matmul_seconds(machine, event), reads / machine.bandwidth) + (
        output / machine.bandwidth
    )


def play(
    machine: Machine, events: Sequence[Event], python: Sequence[float] | None = None
) -> Played:
    """Play events in their order.

    Args:
        machine: where.
        events: of a recording.
        python: seconds of the host's own code before each event, or None for a host that costs
            nothing.
    """
    host = free = exposed = 0.0
    for place, event in enumerate(events):
        if python is not None:
            host += python[place] + (TRITON_LAUNCH if event.triton else LIBRARY_CALL)
        ready = free + (GAP if place else 0.0)
        exposed += max(0.0, host - ready)
        free = max(host, ready) + event_seconds(machine, events, place)
        if event.waits:
            host = max(host, free)
    moved = sum(size for event in events for _, size in (*event.reads, *event.writes))
    return Played(free, exposed, len(events), moved)
