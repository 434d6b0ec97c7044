"""What each Triton kernel moves and multiplies, from the arguments of its launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

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
    """What a launch moves.

    Args:
        kernel: name of the jit function.
        arguments: by their names.
        grid: of the launch.

    Raises:
        KeyError: a kernel that is not known here, and so would cost nothing.
    """
    if kernel not in _KERNELS:
        raise KeyError(
            f"{kernel}: its traffic is not known, add it to benchmarks/kernel_traffic.py"
        )
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
