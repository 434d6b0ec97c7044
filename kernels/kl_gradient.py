"""Gradient of log-probs and of their divergence from a reference by the policy's logits."""

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_prefopt.kernels.fold_kl_rows import SlabLogits, common_shape
from fused_prefopt.kernels.tiles import bend, blocks, cap_slope


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
    """What rows' gradients are made of, each (c,) fp32: see `kl_gradient`."""

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
    if out.stride(1) != 1 and width > 1:
        raise ValueError(f"out: got strides {out.stride()}, wanted contiguous rows")
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
