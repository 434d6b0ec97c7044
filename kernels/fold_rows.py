"""Fold a slab of products, as a matmul has left it, into each row's running log-sum-exp."""

from __future__ import annotations

from typing import Protocol

import triton
import triton.language as tl
from torch import Tensor

from fused_prefopt.kernels.tiles import bend, cap_slope, require_contiguous_rows


@triton.jit
def slab_logits(
    products, bias, columns, width, alpha, ceiling, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr
):
    """Logits of a row's products at some columns, -inf past the end of the slab."""
    inside = columns < width
    values = tl.load(products + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        values += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, bend(values, alpha, ceiling, HAS_CAP), -float("inf"))


@triton.jit
def _fold_rows_kernel(
    products,  # (c, v)
    bias,  # (v,)
    targets,  # (c,)
    maximum,  # (c,)
    total,  # (c,)
    target_logit,  # (c,)
    kept,  # (k, v)
    reference,  # (c,)
    earlier,  # (c, done)
    sums,  # (c, D)
    row_stride,
    kept_stride,
    sums_stride,
    kept_rows,
    first,
    width,
    done,
    depth,
    slack,
    alpha,
    ceiling,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    products += row * row_stride
    target = tl.load(targets + row) - first
    # A finite floor instead of -inf: rows whose logits are all -inf then sum to zero, not NaN.
    running = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)
    folded = tl.zeros((BLOCK,), tl.float32)
    found = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = slab_logits(products, bias, columns, width, alpha, ceiling, HAS_BIAS, HAS_CAP)
        above = tl.maximum(running, logits)
        folded = folded * tl.exp(running - above) + tl.exp(logits - above)
        found = tl.where(columns == target, logits, found)
        running = above

    old = tl.load(maximum + row)
    new = tl.maximum(old, tl.max(running, 0))
    shrink = tl.exp(old - new)
    tl.store(maximum + row, new)
    added = tl.sum(folded * tl.exp(running - new), 0)
    tl.store(total + row, tl.load(total + row) * shrink + added)
    tl.store(target_logit + row, tl.sum(found, 0), mask=(target >= 0) & (target < width))

    if HAS_REFERENCE:
        # Rows that are not kept have none.
        before = tl.load(reference + row, mask=row < kept_rows, other=3.4028234663852886e38)
        # Every warp reads it before one of them writes it: all must go the same way.
        tl.debug_barrier()
        # NaN is not above: a row that has one is lost either way.
        moves = new - before > slack
        new = tl.where(moves, new, before)
        if moves:
            tl.store(reference + row, new)
            smaller = tl.exp(before - new)
            earlier += row * kept_stride
            for start in range(0, done, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                values = tl.load(earlier + columns, mask=columns < done, other=0.0).to(tl.float32)
                values = (values * smaller).to(earlier.dtype.element_ty)
                tl.store(earlier + columns, values, mask=columns < done)
            if HAS_SUMS:
                sums += row * sums_stride
                for start in range(0, depth, BLOCK):
                    columns = start + tl.arange(0, BLOCK)
                    values = tl.load(sums + columns, mask=columns < depth, other=0.0)
                    tl.store(sums + columns, values * smaller, mask=columns < depth)

    if HAS_KEPT:
        if row < kept_rows:
            kept += row * kept_stride
            for start in range(0, width, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                logits = slab_logits(
                    products, bias, columns, width, alpha, ceiling, HAS_BIAS, HAS_CAP
                )
                values = tl.exp(logits - new)
                if HAS_CAP and HAS_REFERENCE:
                    values *= cap_slope(logits, ceiling)
                if HAS_REFERENCE:
                    # The target's own comes in fp32, with what it differs from 1 by.
                    values = tl.where(columns == target, 0.0, values)
                tl.store(kept + columns, values.to(kept.dtype.element_ty), mask=columns < width)


class Weighed(Protocol):
    """Weights that `fold_rows` leaves: exp(logit − reference) · slope, see `ops.tile`.

    `reference` (c,) fp32; `weights` (c, ≥ done + v) whose first `done` columns refer to it, with
    the strides of `kept`; `sums` (c, D) fp32 that do, or None.
    """

    @property
    def reference(self) -> Tensor: ...
    @property
    def weights(self) -> Tensor: ...
    @property
    def done(self) -> int: ...
    @property
    def sums(self) -> Tensor | None: ...


def fold_rows(
    products: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    maximum: Tensor,
    total: Tensor,
    target_logit: Tensor,
    *,
    alpha: float,
    ceiling: float | None,
    kept: Tensor | None = None,
    weighed: Weighed | None = None,
    slack: float = 0.0,
    first: int = 0,
) -> None:
    """Update running statistics by ``logits = alpha (products + bias)``; one program a row.

    With a `ceiling` the logits are ``ceiling · tanh`` of that. The slab is read once from memory,
    and for `kept` once more from the cache.

    Args:
        products: (c, v) fp32 or bf16, last dimension contiguous.
        bias: (v,) or None.
        targets: (c,) int64 vocabulary index of the targets, anywhere.
        maximum: (c,) fp32 running maxima, updated in place; start from the lowest finite number.
        total: (c,) fp32 running Σ exp(logit − maximum), updated in place.
        target_logit: (c,) fp32, updated in place where the target is inside.
        alpha: factor on the products.
        ceiling: bound of the logits, or None.
        kept: (k, v) becomes exp(logit − new maximum) of the first k rows; with `weighed` it is a
            part of its weights and becomes exp(logit − reference) times the softcap's slope. It
            may be `products`.
        weighed: its references are updated, and where one moves what refers to it is rescaled.
        slack: by how much a maximum may exceed its reference before that moves.
        first: vocabulary index at which the slab starts.

    Raises:
        ValueError: rows of `products` or `kept` are not contiguous.
    """
    rows, width = products.shape
    require_contiguous_rows(products=products, kept=kept)
    sums = None if weighed is None else weighed.sums
    if rows:
        _fold_rows_kernel[(rows,)](
            products,
            bias,
            targets,
            maximum,
            total,
            target_logit,
            kept,
            None if weighed is None else weighed.reference,
            None if weighed is None else weighed.weights,
            sums,
            products.stride(0),
            0 if kept is None else kept.stride(0),
            0 if sums is None else sums.stride(0),
            0 if kept is None else kept.shape[0],
            first,
            width,
            0 if weighed is None else weighed.done,
            0 if sums is None else sums.shape[1],
            slack,
            alpha,
            0.0 if ceiling is None else ceiling,
            HAS_BIAS=bias is not None,
            HAS_CAP=ceiling is not None,
            HAS_KEPT=kept is not None,
            HAS_REFERENCE=weighed is not None,
            HAS_SUMS=sums is not None,
            BLOCK=min(4096, triton.next_power_of_2(width)),
            num_warps=8,
            # logit − maximum must be exactly 0 at the maximum: no log-prob may be positive.
            enable_fp_fusion=False,
        )
