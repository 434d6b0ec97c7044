"""Gradient of the log-probs with respect to the logits, from a slab that is in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_prefopt.kernels.tiles import bend, blocks, cap_slope, require_contiguous_rows


@triton.jit
def tile_gradient(
    probabilities,  # (ROWS, COLUMNS)
    logits,  # (ROWS, COLUMNS)
    row,  # (ROWS,)
    columns,  # (COLUMNS,)
    targets,  # (c,)
    residuals,  # (c,)
    scale,  # (c,)
    first,
    rows,
    ceiling,
    HAS_CAP: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
):
    """scale · (softmax − one-hot) · slope of the softcap, of one tile."""
    inside = row < rows
    values = probabilities
    if HAS_CAP:
        values *= cap_slope(logits, ceiling)
    if HAS_TARGETS:
        target = tl.load(targets + row, mask=inside, other=-1) - first
        at_target = columns[None, :] == target[:, None]
        own = tl.load(residuals + row, mask=inside, other=0.0)
        values = tl.where(at_target, own[:, None], values)
        values *= tl.load(scale + row, mask=inside, other=0.0)[:, None]
    return values


@triton.jit
def _logits_gradient_kernel(
    source,  # (c, v)
    bias,  # (v,)
    targets,  # (c,)
    logsumexps,  # (c,)
    residuals,  # (c,)
    scale,  # (c,)
    entropies,  # (c,)
    entropy_scale,  # (c,)
    maxima,  # (parts, c)
    out,  # (c, v)
    column_sums,  # (row blocks, v)
    source_stride,
    maxima_stride,
    out_stride,
    part_width,
    first,
    rows,
    width,
    alpha,
    ceiling,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    HAS_MAXIMA: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(1) * COLUMNS
    columns = first_column + tl.arange(0, COLUMNS)
    inside, real = row < rows, columns < width
    there = inside[:, None] & real[None, :]
    far = row.to(tl.int64)[:, None]
    logsumexp = tl.load(logsumexps + row, mask=inside, other=0.0)
    values = tl.load(source + far * source_stride + columns[None, :], mask=there, other=0.0)
    values = values.to(tl.float32)
    if HAS_MAXIMA:
        part = (first + first_column) // part_width
        highest = tl.load(maxima + part.to(tl.int64) * maxima_stride + row, mask=inside, other=0.0)
        probabilities = values * tl.exp(highest - logsumexp)[:, None]
        # Where the exponential has underflowed to 0, 0 · slope of -inf would be NaN.
        logits = highest[:, None] + tl.log(tl.maximum(values, 1e-30))
    else:
        if HAS_BIAS:
            values += tl.load(bias + columns, mask=real, other=0.0).to(tl.float32)[None, :]
        logits = bend(values, alpha, ceiling, HAS_CAP)
        probabilities = tl.exp(logits - logsumexp[:, None])
    gradient = tile_gradient(
        probabilities,
        logits,
        row,
        columns,
        targets,
        residuals,
        scale,
        first,
        rows,
        ceiling,
        HAS_CAP,
        HAS_TARGETS,
    )
    if HAS_ENTROPY:
        entropy = tl.load(entropies + row, mask=inside, other=0.0)
        factor = tl.load(entropy_scale + row, mask=inside, other=0.0)
        if HAS_CAP:
            probabilities *= cap_slope(logits, ceiling)
        # The floor: 0 times the logarithm of an underflowed p would be NaN.
        logps = tl.maximum(logits - logsumexp[:, None], -46.0)
        gradient += factor[:, None] * probabilities * (logps + entropy[:, None])
    stored = gradient.to(out.dtype.element_ty)
    tl.store(out + far * out_stride + columns[None, :], stored, mask=there)
    if HAS_SUMS:
        sums = tl.sum(tl.where(inside[:, None], gradient, 0.0), 0)
        block = tl.program_id(0).to(tl.int64)
        tl.store(column_sums + block * width + columns, sums, mask=real)


def logits_gradient(
    source: Tensor,
    logsumexps: Tensor,
    out: Tensor,
    *,
    targets: Tensor | None = None,
    residuals: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    alpha: float = 1.0,
    ceiling: float | None = None,
    maxima: Tensor | None = None,
    part_width: int = 0,
    first: int = 0,
    entropies: Tensor | None = None,
    entropy_scale: Tensor | None = None,
    sums: bool = False,
) -> Tensor | None:
    """``scale · (softmax − one-hot) · slope`` of a slab, into `out`, which may be the source.

    With entropies H, ``entropy_scale · p · (log p + H) · slope`` is added.

    Args:
        source: (c, v) products of a matmul; or, with `maxima`, exp(logit − the part's maximum).
        logsumexps: (c,) fp32 of the whole rows.
        out: (c, v) fp32, fp16 or bf16.
        targets: (c,) int64 vocabulary index of the targets, anywhere; or None, with `residuals`
            and `scale`, for the softmax (times the slope) alone.
        residuals: (c,) fp32 (p − 1) · slope of the targets, from their fp32 log-probs.
        scale: (c,) fp32 factor on the whole row.
        bias: (v,) added to the products, or None.
        alpha: factor on the products.
        ceiling: bound of the logits, or None.
        maxima: (parts, c) fp32, where the source holds exponentials.
        part_width: vocabulary entries of a part; parts begin where blocks of a power of two do.
        first: vocabulary index at which the slab starts: targets and maxima are the whole
            vocabulary's.
        entropies: (c,) fp32 H of the whole rows, or None.
        entropy_scale: (c,) fp32, given with them.
        sums: whether the gradient's sums over rows are wanted.

    Returns:
        (v,) fp32 sums over the rows, before rounding to the dtype of `out`; or None.

    Raises:
        ValueError: rows of `source` or `out` are not contiguous, or the parts do not fit.
    """
    rows, width = source.shape
    require_contiguous_rows(source=source, out=out)
    height, block = 16, 256
    if maxima is not None and part_width < first + width:
        # A block meets one maximum: the largest that divides every part.
        while block > 1 and (part_width % block or first % block):
            block //= 2
        if block < 16 and part_width > 1:
            raise ValueError(
                f"part_width: got {part_width} and a slab at {first}, wanted multiples of 16"
            )
    row_blocks = blocks(rows, height)
    column_sums = None
    if sums:
        column_sums = torch.empty(row_blocks, width, dtype=torch.float32, device=source.device)
    if rows:
        _logits_gradient_kernel[(row_blocks, blocks(width, block))](
            source,
            bias,
            targets,
            logsumexps,
            residuals,
            scale,
            entropies,
            entropy_scale,
            maxima,
            out,
            column_sums,
            source.stride(0),
            0 if maxima is None else maxima.stride(0),
            out.stride(0),
            max(1, part_width),
            first,
            rows,
            width,
            alpha,
            0.0 if ceiling is None else ceiling,
            HAS_BIAS=bias is not None,
            HAS_CAP=ceiling is not None,
            HAS_TARGETS=targets is not None,
            HAS_MAXIMA=maxima is not None,
            HAS_ENTROPY=entropies is not None,
            HAS_SUMS=sums,
            ROWS=height,
            COLUMNS=block,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return None if column_sums is None else column_sums.sum(0)
