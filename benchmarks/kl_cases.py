"""The launches of the kernels of `sequence_kl`."""

from __future__ import annotations

from benchmarks.kernel_targets import STATISTICS, Case, Setting
from fused_prefopt.kernels.fold_kl_rows import SlabLogits, fold_kl_rows
from fused_prefopt.kernels.kl_gradient import kl_gradient
from fused_prefopt.ops.kl_tile import KlGradients
from fused_prefopt.ops.tile import RowStatistics

# Labelled rows, width of a slab of logits, softcap.
ROWS, SLAB, CEILING = 8191, 8192, 30.0


def _logits(s: Setting, bent: bool) -> SlabLogits:
    """`bent`: with a bias and a softcap."""
    products, bias = s.floats(ROWS, SLAB), s.new(SLAB) if bent else None
    return SlabLogits(products, bias, 1.0, CEILING if bent else None)


def _rows(s: Setting) -> RowStatistics:
    return RowStatistics(s.floats(ROWS), s.floats(ROWS), s.floats(ROWS))


def _fold(s: Setting, *, bent: bool = False) -> None:
    logits = _logits(s, bent), _logits(s, bent)
    fold_kl_rows(*logits, s.indices(ROWS), _rows(s), _rows(s), s.floats(ROWS))


def _gradient(s: Setting, *, bent: bool = False) -> None:
    numbers = KlGradients(*(s.floats(ROWS) for _ in range(5)))
    logits = _logits(s, bent), _logits(s, bent)
    kl_gradient(*logits, s.indices(ROWS), numbers, s.new(ROWS, SLAB), sums=bent)


KL_CASES = {
    "fold KL rows": Case(_fold, STATISTICS),
    "fold KL rows, bias and softcap": Case(lambda s: _fold(s, bent=True)),
    "KL gradient": Case(_gradient),
    "KL gradient, bias and softcap": Case(lambda s: _gradient(s, bent=True)),
}
