"""Launches of every kernel, in its default configurations, and the targets they compile for.

A case is a name and a call of a launcher on the tensors of a `Setting`: add one to `CASES`. Loss
kernels take batches of a usual size, and the largest that one program takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fused_prefopt.kernels.accumulators import rescale_rows, spread_rows
from fused_prefopt.kernels.architectures import ARCHITECTURES, Architecture, architecture
from fused_prefopt.kernels.fold_logits import Partials, fold_logits, merge_partials
from fused_prefopt.kernels.fold_rows import fold_rows
from fused_prefopt.kernels.kl import SlabLogits, fold_kl_rows, kl_gradient
from fused_prefopt.kernels.logits_gradient import logits_gradient
from fused_prefopt.kernels.loss_form import (
    LARGEST,
    LARGEST_GROUPED,
    Link,
    Margin,
    Moments,
    PairForm,
)
from fused_prefopt.kernels.margin_solver import mirror_margins
from fused_prefopt.kernels.pair_loss import pair_loss
from fused_prefopt.kernels.point_loss import direct_reward
from fused_prefopt.kernels.recompute_gradient import recompute_gradient
from fused_prefopt.kernels.sequence_sums import sequence_sums
from fused_prefopt.ops.tile import (
    Details,
    KlGradients,
    MixtureStatistics,
    RowStatistics,
    WeighedRows,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPERANDS = tuple(DTYPES)
# For kernels that see none of the model's tensors.
STATISTICS = ("fp32",)


@dataclass(frozen=True)
class Target:
    """A GPU that kernels are compiled for.

    Attributes:
        gpu: as Triton names it.
        architecture: the tile shapes, and the shared memory that a program may take.
        gated: whether a spill, or too much shared memory, fails the build.
    """

    gpu: GPUTarget
    architecture: Architecture
    gated: bool = True


def _nvidia(entry: Architecture) -> Target:
    major, minor = entry.capability
    return Target(GPUTarget("cuda", 10 * major + minor, 32), entry)


_BY_NAME = {entry.name: entry for entry in ARCHITECTURES}
_AMD = replace(architecture((9, 4), hip=True), name="gfx942")
TARGETS = {
    **{name: _nvidia(_BY_NAME[name]) for name in ("sm_80", "sm_90")},
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), _AMD),
}


@dataclass(frozen=True)
class Setting:
    """The architecture and the dtype of a launch, and tensors without storage for it."""

    architecture: Architecture
    dtype: torch.dtype

    def tiles(self, rich: bool) -> dict[str, Any]:
        """How a matmul kernel works: its tile's shape, and how it loads."""
        block = self.architecture.block(self.dtype.itemsize, rich)
        return {"block": block, "descriptors": self.architecture.descriptors}

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Of `dtype`, or the setting's."""
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def floats(self, *shape: int) -> Tensor:
        return self.new(*shape, dtype=torch.float32)

    def indices(self, rows: int) -> Tensor:
        return self.new(rows, dtype=torch.int64)


@dataclass(frozen=True)
class Case:
    """One way to launch.

    Attributes:
        launch: calls a launcher.
        dtypes: those of the operands that it is launched with.
        default: it happens without being asked for, so that a spill fails the build; otherwise
            it is a limit, only shown.
    """

    launch: Callable[[Setting], object]
    dtypes: tuple[str, ...] = OPERANDS
    default: bool = True


# Labelled rows, seldom a multiple of anything; vocabulary and hidden size of Llama-3; a hidden size
# whose rows are not whole 16 bytes; the width of a slab of logits; sequences.
N, V, D, ODD_DEPTH, SLAB, S = 8191, 128_256, 4096, 4098, 8192, 16
CEILING = 30.0


def _gradient_rows(s: Setting) -> dict[str, Any]:
    """Tensors of a row's own token."""
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


def _kl_logits(s: Setting, bent: bool) -> SlabLogits:
    """`bent`: with a bias and a softcap."""
    products, bias = s.floats(N, SLAB), s.new(SLAB) if bent else None
    return SlabLogits(products, bias, 1.0, CEILING if bent else None)


def _statistics(s: Setting) -> RowStatistics:
    return RowStatistics(s.floats(N), s.floats(N), s.floats(N))


def _fold_kl_rows(s: Setting, *, bent: bool = False, mixtures: bool = False) -> None:
    logits = _kl_logits(s, bent), _kl_logits(s, bent)
    mixed = MixtureStatistics(0.01, _statistics(s), _statistics(s)) if mixtures else None
    fold_kl_rows(*logits, s.indices(N), _statistics(s), _statistics(s), s.floats(N), mixtures=mixed)


def _kl_gradient(s: Setting, *, bent: bool = False) -> None:
    numbers = KlGradients(*(s.floats(N) for _ in range(5)))
    logits = _kl_logits(s, bent), _kl_logits(s, bent)
    kl_gradient(*logits, s.indices(N), numbers, s.new(N, SLAB), sums=bent)


# Pairs or completions of a usual batch; places of the queue of past margins, and how large a pool
# is drawn from it, by default.
USUAL, PLACES, SAMPLE = 32, 2048, 256

# γ-PO's margin and α-DPO's: they do most beside the link.
_DYNAMIC = PairForm(
    margin=Margin.DYNAMIC, beta=2.5, gamma=1.5, tau=15.0, steps=20, update=1, reward_per_token=1
)
_ADAPTIVE = PairForm(
    margin=Margin.ADAPTIVE,
    gap_policy=1,
    gap_reference=-1,
    gap_per_token=1,
    moments=Moments.CORRECTED,
    passes_gradient=1,
    update=1,
    beta=10.0,
    gamma=4.0,
    alpha=0.05,
    momentum=0.9,
)


def _pair_loss(s: Setting, form: PairForm, pairs: int = USUAL) -> None:
    """With what the form's margin keeps: running moments, or past margins to draw from."""
    average = weight = order = queue = None
    if form.margin == Margin.ADAPTIVE:
        average, weight = s.new(2, dtype=torch.float64), s.new(dtype=torch.float64)
    if form.margin == Margin.DYNAMIC:
        queue = s.new(PLACES, dtype=torch.float64)
        order = s.indices(PLACES) if form.draws else None
    nonfinite = s.new(dtype=torch.int64) if form.update else None
    fields = (s.floats(2 * pairs), s.indices(2 * pairs), s.floats(2 * pairs), None)
    pair_loss(*fields, average, weight, None, order, queue, nonfinite, form)


def _point_loss(s: Setting, size: int = USUAL, *, groups: bool = False) -> None:
    indices = s.indices(size) if groups else None
    policy, reference, scores, prompt, prompt_reference = (s.floats(size) for _ in range(5))
    direct_reward(policy, reference, scores, prompt, prompt_reference, indices, 0.1, 0.0)


def _mirror_margins(s: Setting, size: int = USUAL) -> None:
    mirror_margins(s.floats(size), _DYNAMIC.gamma, _DYNAMIC.tau)


def _case(
    launch: Callable[..., None], *arguments: Any, default: bool = True, **options: Any
) -> Case:
    """Of a launch that takes a setting first."""
    return Case(lambda s: launch(s, *arguments, **options), STATISTICS, default)


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
    "fold KL rows": Case(_fold_kl_rows, STATISTICS),
    "fold KL rows, bias and softcap": Case(lambda s: _fold_kl_rows(s, bent=True)),
    "fold KL rows, mixtures": Case(lambda s: _fold_kl_rows(s, mixtures=True), STATISTICS),
    "fold KL rows, mixtures, bias and softcap": Case(
        lambda s: _fold_kl_rows(s, bent=True, mixtures=True)
    ),
    "KL gradient": Case(_kl_gradient),
    "KL gradient, bias and softcap": Case(lambda s: _kl_gradient(s, bent=True)),
    **{
        f"pair loss, {link.name.lower().replace('_', '-')}": _case(
            _pair_loss, PairForm(link=link, link_a=0.1)
        )
        for link in Link
    },
    "pair loss, adaptive": _case(_pair_loss, _ADAPTIVE),
    "pair loss, adaptive, largest": _case(_pair_loss, _ADAPTIVE, LARGEST, default=False),
    "pair loss, dynamic": _case(_pair_loss, replace(_DYNAMIC, draws=SAMPLE - USUAL)),
    "pair loss, dynamic, largest": _case(_pair_loss, _DYNAMIC, LARGEST, default=False),
    "direct reward": _case(_point_loss),
    "direct reward, groups": _case(_point_loss, groups=True),
    "direct reward, largest": _case(_point_loss, LARGEST, default=False),
    "direct reward, groups, largest": _case(
        _point_loss, LARGEST_GROUPED, groups=True, default=False
    ),
    "mirror margins": _case(_mirror_margins),
    "mirror margins, largest": _case(_mirror_margins, LARGEST, default=False),
}
