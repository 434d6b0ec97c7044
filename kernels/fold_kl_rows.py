"""Fold a slab of both heads' products into each row's running statistics of their divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import triton
import triton.language as tl
from torch import Tensor

from fused_prefopt.kernels.row_statistics import slab_logits


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
    row_stride,
    other_stride,
    first,
    width,
    alpha,
    ceiling,
    other_alpha,
    other_ceiling,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_OTHER_BIAS: tl.constexpr,
    HAS_OTHER_CAP: tl.constexpr,
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

    _merge(maximum + row, total + row, running, sums)
    new, shrink = _merge(other_maximum + row, other_total + row, other_running, other_sums)
    added = tl.sum(terms * tl.exp(other_running - new), 0)
    tl.store(weighted + row, tl.load(weighted + row) * shrink + added)
    here = (target >= 0) & (target < width)
    tl.store(target_logit + row, tl.sum(found, 0), mask=here)
    tl.store(other_target_logit + row, tl.sum(other_found, 0), mask=here)


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

    def require_rows(self, name: str) -> None:
        """Raise ValueError unless rows are contiguous."""
        value = self.products
        if value.stride(1) != 1 and value.shape[1] > 1:
            raise ValueError(f"{name}: got strides {value.stride()}, wanted contiguous rows")


def common_shape(policy: SlabLogits, reference: SlabLogits) -> tuple[int, int]:
    """(c, v) of both slabs.

    Raises:
        ValueError: they differ in shape, or their rows are not contiguous.
    """
    (rows, width), other = policy.products.shape, reference.products.shape
    if other != (rows, width):
        raise ValueError(f"reference: got shape {tuple(other)}, wanted ({rows}, {width})")
    policy.require_rows("policy")
    reference.require_rows("reference")
    return rows, width


class Running(Protocol):
    """Running statistics of rows, each (c,) fp32: maximum, Σ exp(logit − maximum), target logit."""

    @property
    def maximum(self) -> Tensor: ...
    @property
    def sum(self) -> Tensor: ...
    @property
    def target(self) -> Tensor: ...


def fold_kl_rows(
    policy: SlabLogits,
    reference: SlabLogits,
    targets: Tensor,
    statistics: Running,
    reference_statistics: Running,
    weighted: Tensor,
    first: int = 0,
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

    Raises:
        ValueError: the slabs differ in shape, or their rows are not contiguous.
    """
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
            policy.products.stride(0),
            reference.products.stride(0),
            first,
            width,
            policy.alpha,
            policy.bound,
            reference.alpha,
            reference.bound,
            HAS_BIAS=policy.bias is not None,
            HAS_CAP=policy.ceiling is not None,
            HAS_OTHER_BIAS=reference.bias is not None,
            HAS_OTHER_CAP=reference.ceiling is not None,
            BLOCK=min(2048, triton.next_power_of_2(width)),
            num_warps=8,
            # logit − maximum must be exactly 0 at the maximum: no log-prob may be positive.
            enable_fp_fusion=False,
        )
