"""Divergence of two heads from slabs of their products: rows' running statistics, and gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_prefopt.kernels.fold_rows import slab_logits
from fused_prefopt.kernels.tiles import bend, blocks, cap_slope, require_contiguous_rows


@triton.jit
def _merge(maximum, total, running, sums):
    """Add a row's lanes to its running maximum and sum; the new maximum and the old ones' share."""
    old = tl.load(maximum)
    new = tl.maximum(old, tl.max(running, 0))
    shrink = tl.exp(old - new)
    tl.store(maximum, new)
    tl.store(total, tl.load(total) * shrink + tl.sum(sums * tl.exp(running - new), 0))
    return new, shrink


@triton.jit
def _fold_mixture(mixture, running, sums):
    """Add one logit of each lane to its running maximum and sum."""
    above = tl.maximum(running, mixture)
    return above, sums * tl.exp(running - above) + tl.exp(mixture - above)


@triton.jit
def _fold_kl_rows_kernel(
    products,  # (c, v)
    bias,  # (v,)
    other_products,  # (c, v)
    other_bias,  # (v,)
    targets,  # (c,)
    maximum,  # (c,)
    total,  # (c,)
    target_logit,  # (c,)
    other_maximum,  # (c,)
    other_total,  # (c,)
    other_target_logit,  # (c,)
    weighted,  # (c,)
    out_maximum,  # (c,)
    out_total,  # (c,)
    out_target_logit,  # (c,)
    in_maximum,  # (c,)
    in_total,  # (c,)
    in_target_logit,  # (c,)
    row_stride,
    other_stride,
    first,
    width,
    alpha,
    ceiling,
    other_alpha,
    other_ceiling,
    perturbation,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_OTHER_BIAS: tl.constexpr,
    HAS_OTHER_CAP: tl.constexpr,
    HAS_MIXTURES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    products += row * row_stride
    other_products += row * other_stride
    target = tl.load(targets + row) - first
    # A finite floor instead of -inf: rows whose logits are all -inf then sum to zero, not NaN.
    running = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    other_running, other_sums, terms = running, sums, sums
    found, other_found = sums, sums
    # Of what lies outward and inward of the policy, seen from the reference.
    out_running, out_sums, out_found = running, sums, sums
    in_running, in_sums, in_found = running, sums, sums
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = slab_logits(products, bias, columns, width, alpha, ceiling, HAS_BIAS, HAS_CAP)
        above = tl.maximum(running, logits)
        sums = sums * tl.exp(running - above) + tl.exp(logits - above)
        found = tl.where(columns == target, logits, found)
        running = above

        others = slab_logits(
            other_products,
            other_bias,
            columns,
            width,
            other_alpha,
            other_ceiling,
            HAS_OTHER_BIAS,
            HAS_OTHER_CAP,
        )
        above = tl.maximum(other_running, others)
        shrink, share = tl.exp(other_running - above), tl.exp(others - above)
        # Where the reference gives no probability, the policy may give none: inf − inf.
        shared = share > 0
        gap = tl.where(shared, others, 0.0) - tl.where(shared, logits, 0.0)
        terms = terms * shrink + gap * share
        other_sums = other_sums * shrink + share
        other_found = tl.where(columns == target, others, other_found)
        other_running = above

        if HAS_MIXTURES:
            # What the policy may not say, no mixture may: inf − inf.
            may = logits > -float("inf")
            step = perturbation * (tl.where(may, logits, 0.0) - tl.where(may, others, 0.0))
            outward, inward = logits + step, logits - step
            out_running, out_sums = _fold_mixture(outward, out_running, out_sums)
            in_running, in_sums = _fold_mixture(inward, in_running, in_sums)
            out_found = tl.where(columns == target, outward, out_found)
            in_found = tl.where(columns == target, inward, in_found)

    _merge(maximum + row, total + row, running, sums)
    new, shrink = _merge(other_maximum + row, other_total + row, other_running, other_sums)
    added = tl.sum(terms * tl.exp(other_running - new), 0)
    tl.store(weighted + row, tl.load(weighted + row) * shrink + added)
    here = (target >= 0) & (target < width)
    tl.store(target_logit + row, tl.sum(found, 0), mask=here)
    tl.store(other_target_logit + row, tl.sum(other_found, 0), mask=here)
    if HAS_MIXTURES:
        _merge(out_maximum + row, out_total + row, out_running, out_sums)
        _merge(in_maximum + row, in_total + row, in_running, in_sums)
        tl.store(out_target_logit + row, tl.sum(out_found, 0), mask=here)
        tl.store(in_target_logit + row, tl.sum(in_found, 0), mask=here)


@dataclass(frozen=True)
class SlabLogits:
    """Logits ``alpha (products + bias)``, or ``ceiling · tanh`` of that.

    Attributes:
        products: (c, v) fp32 or narrower, last dimension contiguous.
        bias: (v,) or None.
        alpha: factor on the products.
        ceiling: bound of the logits, or None.
    """

    products: Tensor
    bias: Tensor | None
    alpha: float
    ceiling: float | None

    @property
    def bound(self) -> float:
        """The ceiling as a kernel takes it: any number where there is none."""
        return 0.0 if self.ceiling is None else self.ceiling


def common_shape(policy: SlabLogits, reference: SlabLogits) -> tuple[int, int]:
    """(c, v) of both slabs.

    Raises:
        ValueError: they differ in shape, or their rows are not contiguous.
    """
    (rows, width), other = policy.products.shape, reference.products.shape
    if other != (rows, width):
        raise ValueError(f"reference: got shape {tuple(other)}, wanted ({rows}, {width})")
    require_contiguous_rows(policy=policy.products, reference=reference.products)
    return rows, width


class Running(Protocol):
    """Running statistics of rows, each (c,) fp32: maximum, Σ exp(logit − maximum), target logit."""

    @property
    def maximum(self) -> Tensor: ...
    @property
    def sum(self) -> Tensor: ...
    @property
    def target(self) -> Tensor: ...


class Mixtures(Protocol):
    """Running statistics under ``z + ε(z − r)`` and ``z − ε(z − r)``, logits z of the policy."""

    @property
    def perturbation(self) -> float: ...
    @property
    def extrapolated(self) -> Running: ...
    @property
    def interpolated(self) -> Running: ...


def fold_kl_rows(
    policy: SlabLogits,
    reference: SlabLogits,
    targets: Tensor,
    statistics: Running,
    reference_statistics: Running,
    weighted: Tensor,
    first: int = 0,
    mixtures: Mixtures | None = None,
) -> None:
    """Update running statistics of both distributions; one program a row, each slab read once.

    Args:
        policy, reference: the logits, of the same rows and vocabulary entries.
        targets: (c,) int64 vocabulary index of the targets, anywhere.
        statistics, reference_statistics: updated in place; maxima start from the lowest finite
            number.
        weighted: (c,) fp32 running Σ exp(r − max r) (r − z), z of the policy and r of the
            reference, updated in place.
        first: vocabulary index at which the slab starts.
        mixtures: statistics of mixtures of both logits, updated in place as well; or None.

    Raises:
        ValueError: the slabs differ in shape, or their rows are not contiguous.
    """
    two = () if mixtures is None else (mixtures.extrapolated, mixtures.interpolated)
    of_mixtures = [part for one in two for part in (one.maximum, one.sum, one.target)]
    rows, width = common_shape(policy, reference)
    if rows:
        _fold_kl_rows_kernel[(rows,)](
            policy.products,
            policy.bias,
            reference.products,
            reference.bias,
            targets,
            statistics.maximum,
            statistics.sum,
            statistics.target,
            reference_statistics.maximum,
            reference_statistics.sum,
            reference_statistics.target,
            weighted,
            *(of_mixtures or (None,) * 6),
            policy.products.stride(0),
            reference.products.stride(0),
            first,
            width,
            policy.alpha,
            policy.bound,
            reference.alpha,
            reference.bound,
            0.0 if mixtures is None else mixtures.perturbation,
            HAS_BIAS=policy.bias is not None,
            HAS_CAP=policy.ceiling is not None,
            HAS_OTHER_BIAS=reference.bias is not None,
            HAS_OTHER_CAP=reference.ceiling is not None,
            HAS_MIXTURES=mixtures is not None,
            # Mixtures double what a lane keeps: with fewer, several programs still fit beside.
            BLOCK=min(2048 if mixtures is None else 1024, triton.next_power_of_2(width)),
            num_warps=8,
            # logit − maximum must be exactly 0 at the maximum: no log-prob may be positive.
            enable_fp_fusion=False,
        )


@triton.jit
def _slab_tile(
    products,  # (c, v)
    bias,  # (v,)
    row,
    columns,
    inside,
    real,
    stride,
    alpha,
    ceiling,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """(ROWS, COLUMNS) logits; what lies outside is finite and means nothing."""
    entry = row.to(tl.int64)[:, None] * stride + columns[None, :]
    values = tl.load(products + entry, mask=inside[:, None] & real[None, :], other=0.0)
    values = values.to(tl.float32)
    if HAS_BIAS:
        values += tl.load(bias + columns, mask=real, other=0.0).to(tl.float32)[None, :]
    return bend(values, alpha, ceiling, HAS_CAP)


@triton.jit
def _kl_gradient_kernel(
    products,  # (c, v)
    bias,  # (v,)
    other_products,  # (c, v)
    other_bias,  # (v,)
    targets,  # (c,)
    logsumexps,  # (c,)
    other_logsumexps,  # (c,)
    scale,  # (c,)
    other_scale,  # (c,)
    target_values,  # (c,)
    out,  # (c, v)
    column_sums,  # (row blocks, v)
    row_stride,
    other_stride,
    out_stride,
    first,
    rows,
    width,
    alpha,
    ceiling,
    other_alpha,
    other_ceiling,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_OTHER_BIAS: tl.constexpr,
    HAS_OTHER_CAP: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, real = row < rows, columns < width
    logits = _slab_tile(
        products,
        bias,
        row,
        columns,
        inside,
        real,
        row_stride,
        alpha,
        ceiling,
        HAS_BIAS,
        HAS_CAP,
    )
    others = _slab_tile(
        other_products,
        other_bias,
        row,
        columns,
        inside,
        real,
        other_stride,
        other_alpha,
        other_ceiling,
        HAS_OTHER_BIAS,
        HAS_OTHER_CAP,
    )
    logsumexp = tl.load(logsumexps + row, mask=inside, other=0.0)
    other_logsumexp = tl.load(other_logsumexps + row, mask=inside, other=0.0)
    own = tl.load(scale + row, mask=inside, other=0.0)
    theirs = tl.load(other_scale + row, mask=inside, other=0.0)
    gradient = own[:, None] * tl.exp(logits - logsumexp[:, None])
    gradient += theirs[:, None] * tl.exp(others - other_logsumexp[:, None])
    if HAS_CAP:
        gradient *= cap_slope(logits, ceiling)
    target = tl.load(targets + row, mask=inside, other=-1) - first
    at_target = columns[None, :] == target[:, None]
    value = tl.load(target_values + row, mask=inside, other=0.0)
    gradient = tl.where(at_target, value[:, None], gradient)
    entry = row.to(tl.int64)[:, None] * out_stride + columns[None, :]
    stored = gradient.to(out.dtype.element_ty)
    tl.store(out + entry, stored, mask=inside[:, None] & real[None, :])
    if HAS_SUMS:
        sums = tl.sum(tl.where(inside[:, None], gradient, 0.0), 0)
        block = tl.program_id(0).to(tl.int64)
        tl.store(column_sums + block * width + columns, sums, mask=real)


class Rows(Protocol):
    """Numbers that rows' gradients are made of, each (c,) fp32: see `kl_gradient`."""

    @property
    def logsumexps(self) -> Tensor: ...
    @property
    def reference_logsumexps(self) -> Tensor: ...
    @property
    def scale(self) -> Tensor: ...
    @property
    def reference_scale(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...


def kl_gradient(
    policy: SlabLogits,
    reference: SlabLogits,
    targets: Tensor,
    rows: Rows,
    out: Tensor,
    *,
    first: int = 0,
    sums: bool = False,
) -> Tensor | None:
    """``(scale · p + reference_scale · q) · slope`` of a slab, into `out`; one read of each slab.

    Args:
        policy, reference: the logits, of the same rows and vocabulary entries; their probabilities
            are p and q, and the slope is that of the policy's softcap.
        targets: (c,) int64 vocabulary index of the targets, anywhere.
        rows: logsumexps of the whole rows, the two scales, and in `targets` the whole gradient of
            the target's logit.
        out: (c, v) fp32, fp16 or bf16; it may be the policy's products.
        first: vocabulary index at which the slab starts.
        sums: whether the gradient's sums over rows are wanted.

    Returns:
        (v,) fp32 sums over the rows, before rounding to the dtype of `out`; or None.

    Raises:
        ValueError: the slabs differ in shape, or rows of a slab or of `out` are not contiguous.
    """
    count, width = common_shape(policy, reference)
    require_contiguous_rows(out=out)
    height, block = 16, 256
    row_blocks = blocks(count, height)
    column_sums = None
    if sums:
        column_sums = torch.empty(row_blocks, width, dtype=torch.float32, device=out.device)
    if count:
        _kl_gradient_kernel[(row_blocks, blocks(width, block))](
            policy.products,
            policy.bias,
            reference.products,
            reference.bias,
            targets,
            rows.logsumexps,
            rows.reference_logsumexps,
            rows.scale,
            rows.reference_scale,
            rows.targets,
            out,
            column_sums,
            policy.products.stride(0),
            reference.products.stride(0),
            out.stride(0),
            first,
            count,
            width,
            policy.alpha,
            policy.bound,
            reference.alpha,
            reference.bound,
            HAS_BIAS=policy.bias is not None,
            HAS_CAP=policy.ceiling is not None,
            HAS_OTHER_BIAS=reference.bias is not None,
            HAS_OTHER_CAP=reference.ceiling is not None,
            HAS_SUMS=sums,
            ROWS=height,
            COLUMNS=block,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return None if column_sums is None else column_sums.sum(0)
