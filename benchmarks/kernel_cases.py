"""Every kernel's launches, in the configurations that are its defaults.

A case is a name and a call of a launcher on the tensors of a `Setting`: add one to `CASES`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.kernel_targets import STATISTICS, Case, Setting
from benchmarks.kl_cases import KL_CASES
from benchmarks.loss_cases import LOSS_CASES
from fused_prefopt.kernels.fold_logits import Partials, fold_logits
from fused_prefopt.kernels.logits_gradient import logits_gradient
from fused_prefopt.kernels.merge_partials import merge_partials
from fused_prefopt.kernels.recompute_gradient import recompute_gradient
from fused_prefopt.kernels.rescale import rescale_rows
from fused_prefopt.kernels.row_statistics import fold_rows
from fused_prefopt.kernels.sequence_sums import sequence_sums
from fused_prefopt.kernels.spread_rows import spread_rows
from fused_prefopt.ops.tile import Details, WeighedRows

# Labelled rows, seldom a multiple of anything; vocabulary and hidden size of Llama-3; a hidden size
# whose rows are not whole 16 bytes; the width of a slab of logits; sequences.
N, V, D, ODD_DEPTH, SLAB, S = 8191, 128_256, 4096, 4098, 8192, 16
CEILING = 30.0


def _gradient_rows(s: Setting) -> dict[str, Any]:
    """What a row's own token asks of the gradient."""
    return {"targets": s.indices(N), "residuals": s.floats(N), "scale": s.floats(N)}


def _partials(s: Setting, details: bool) -> Partials:
    size = V // 256, N
    found = Partials(s.floats(*size), s.floats(*size), 256)
    if not details:
        return found
    best = s.new(*size, dtype=torch.int32)
    weighted, squares, logit_sum = (s.floats(*size) for _ in range(3))
    return replace(found, weighted=weighted, squares=squares, logit_sum=logit_sum, best=best)


def _fold_logits(
    s: Setting,
    *,
    depth: int = D,
    bent: bool = False,
    kept: bool = False,
    details: bool = False,
) -> None:
    """`bent`: with a bias and a softcap."""
    fold_logits(
        s.new(N, depth),
        s.new(V, depth),
        s.new(V) if bent else None,
        s.indices(N),
        s.floats(N),
        alpha=1.0,
        ceiling=CEILING if bent else None,
        kept=s.new(N, V) if kept else None,
        details=details,
        **s.tiles(rich=bent or kept or details or depth == ODD_DEPTH),
    )


def _recompute_gradient(s: Setting, *, depth: int = D, bent: bool = False) -> None:
    recompute_gradient(
        s.new(N, depth),
        s.new(SLAB, depth),
        s.new(SLAB) if bent else None,
        s.floats(N),
        **_gradient_rows(s),
        out=s.new(N, SLAB),
        alpha=1.0,
        ceiling=CEILING if bent else None,
        sums=bent,
        **s.tiles(rich=bent or depth == ODD_DEPTH),
    )


def _fold_rows(
    s: Setting, *, bent: bool = False, kept: bool = False, weighed: bool = False
) -> None:
    weights = s.new(N, 2 * SLAB)
    given = WeighedRows(s.floats(N), weights, SLAB, s.floats(N, D)) if weighed else None
    fold_rows(
        s.floats(N, SLAB),
        s.new(SLAB) if bent else None,
        s.indices(N),
        s.floats(N),
        s.floats(N),
        s.floats(N),
        alpha=1.0,
        ceiling=CEILING if bent else None,
        kept=weights[:, SLAB:] if weighed else s.new(N, SLAB) if kept else None,
        weighed=given,
        slack=60.0,
    )


def _logits_gradient(
    s: Setting, *, bent: bool = False, kept: bool = False, entropy: bool = False
) -> None:
    """`kept`: from exponentials, in place."""
    source = s.new(N, SLAB) if kept else s.floats(N, SLAB)
    logits_gradient(
        source,
        s.floats(N),
        source if kept else s.new(N, SLAB),
        **_gradient_rows(s),
        bias=s.new(SLAB) if bent and not kept else None,
        ceiling=CEILING if bent else None,
        maxima=s.floats(SLAB // 128, N) if kept else None,
        part_width=128 if kept else 0,
        entropies=s.floats(N) if entropy else None,
        entropy_scale=s.floats(N) if entropy else None,
        sums=bent,
    )


def _merge_partials(s: Setting, *, details: bool = False) -> None:
    extra = None
    if details:
        best = s.new(N, dtype=torch.int32)
        extra = Details(s.floats(N), s.floats(N), s.floats(N), best)
    reference = None if details else s.floats(N)
    merge_partials(_partials(s, details), s.floats(N), s.floats(N), extra, reference=reference)


def _spread_rows(s: Setting, *, added: bool = False) -> None:
    own = (s.floats(N), s.new(N, D), s.floats(N)) if added else ()
    spread_rows(s.floats(N, D), s.indices(N), s.new(2 * N, D), s.floats(N), *own)


def _sequence_sums(s: Setting, *, sorted_ids: bool) -> None:
    sequence_sums(s.floats(N), s.indices(N), S, sorted_ids)


CASES = {
    "fold logits": Case(_fold_logits),
    "fold logits, bias and softcap": Case(lambda s: _fold_logits(s, bent=True)),
    "fold logits, kept": Case(lambda s: _fold_logits(s, kept=True)),
    "fold logits, details": Case(lambda s: _fold_logits(s, details=True)),
    "fold logits, everything": Case(lambda s: _fold_logits(s, bent=True, kept=True, details=True)),
    "fold logits, odd depth": Case(lambda s: _fold_logits(s, depth=ODD_DEPTH)),
    "fold logits, odd depth, everything": Case(
        lambda s: _fold_logits(s, depth=ODD_DEPTH, bent=True, kept=True, details=True)
    ),
    "recompute gradient": Case(_recompute_gradient),
    "recompute gradient, bias and softcap": Case(lambda s: _recompute_gradient(s, bent=True)),
    "recompute gradient, odd depth": Case(lambda s: _recompute_gradient(s, depth=ODD_DEPTH)),
    "fold rows": Case(_fold_rows, STATISTICS),
    "fold rows, kept": Case(lambda s: _fold_rows(s, kept=True)),
    "fold rows, kept, bias and softcap": Case(lambda s: _fold_rows(s, bent=True, kept=True)),
    "fold rows, weighed": Case(lambda s: _fold_rows(s, weighed=True)),
    "fold rows, weighed, bias and softcap": Case(lambda s: _fold_rows(s, bent=True, weighed=True)),
    "logits gradient": Case(_logits_gradient),
    "logits gradient, bias and softcap": Case(lambda s: _logits_gradient(s, bent=True)),
    "logits gradient, entropy, bias and softcap": Case(
        lambda s: _logits_gradient(s, bent=True, entropy=True)
    ),
    "logits gradient, kept": Case(lambda s: _logits_gradient(s, kept=True)),
    "logits gradient, kept, softcap": Case(lambda s: _logits_gradient(s, bent=True, kept=True)),
    "merge partials": Case(_merge_partials, STATISTICS),
    "merge partials, details": Case(lambda s: _merge_partials(s, details=True), STATISTICS),
    "rescale rows": Case(lambda s: rescale_rows(s.floats(N, D), s.floats(N)), STATISTICS),
    "spread rows": Case(_spread_rows),
    "spread rows, added": Case(lambda s: _spread_rows(s, added=True)),
    "sequence sums": Case(lambda s: _sequence_sums(s, sorted_ids=True), STATISTICS),
    "sequence sums, unsorted": Case(lambda s: _sequence_sums(s, sorted_ids=False), STATISTICS),
    **KL_CASES,
    **LOSS_CASES,
}
