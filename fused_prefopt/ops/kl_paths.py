"""Forward and backward of `sequence_kl`: loops over tiles of both heads' logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_prefopt.ops.gradients import Gradients, GradientSums, Needs, row_factors
from fused_prefopt.ops.kl_rows import KlRows
from fused_prefopt.ops.kl_tile import KlGradients, KlStatistics
from fused_prefopt.ops.passes import Kept, Upstream
from fused_prefopt.ops.passes import backward as gradients_of_logps


@dataclass(frozen=True)
class KlResult:
    """What a forward finds for each labelled row, all (n,).

    Attributes:
        kls: KL(reference || policy), in nats.
        logps, reference_logps: of the labels.
        logsumexps, reference_logsumexps: of the logits.
    """

    kls: Tensor
    logps: Tensor
    reference_logps: Tensor
    logsumexps: Tensor
    reference_logsumexps: Tensor


def forward(head: KlRows) -> KlResult:
    """One pass over both heads: two matmuls."""
    engine = head.build_engine()
    math, device = head.policy.math, head.policy.device
    statistics = KlStatistics.empty(head.rows, math.accumulator, device)
    for slab in head.slabs():
        for rows, policy, reference in slab.tiles():
            engine.fold_both(policy, reference, statistics[rows])
    return KlResult(
        statistics.kls(),
        statistics.policy.logps(),
        statistics.reference.logps(),
        statistics.policy.logsumexps(),
        statistics.reference.logsumexps(),
    )


def backward(
    head: KlRows,
    found: KlResult,
    by_kls: Tensor | None,
    by_logps: Tensor,
    padded: int,
    needs: Needs,
) -> Gradients:
    """Gradients of ``(by_kls * kls + by_logps * logps).sum()`` by the policy's tensors.

    ``d logits = by_kls (p − q) + by_logps (one-hot − p)`` with p of the policy, q of the reference,
    from logits that are built again: two matmuls, and one for each of hidden and weight. Without
    `by_kls` (a loss that takes the divergence as a constant) the reference's are not built.

    Args:
        found: what `forward` has returned; its `kls` are not used.
        by_kls: (n,), or None for zeros.
        by_logps: (n,).
        padded: rows of the policy's weight with its padding.
        needs: which gradients are wanted.
    """
    if by_kls is None:
        nothing = head.policy.new(0)
        kept = Kept(found.logsumexps, nothing, nothing, torch.zeros(1, dtype=torch.int64), nothing)
        return gradients_of_logps(head.policy, kept, Upstream(found.logps, by_logps), padded, needs)
    if not head.rows:
        return GradientSums(head.policy, padded, needs).gradients()
    numbers, unit = _row_gradients(head, found, by_kls, by_logps)
    sums = GradientSums(head.policy, padded, needs, unit)
    engine, buffer = head.build_engine(), head.policy.slab_buffer()
    for slab in head.slabs():
        sums.begin(slab.columns)
        for rows, policy, reference in slab.tiles():
            size, width = policy.shape
            out = buffer[:size, :width]
            by_bias = engine.kl_gradient(policy, reference, numbers[rows], out, sums.wants_bias)
            sums.add_bias(by_bias, slice(0, width))
            sums.add(out, rows, policy.hidden, policy.weight)
        sums.finish()
    return sums.gradients()


def _row_gradients(
    head: KlRows, found: KlResult, by_kls: Tensor, by_logps: Tensor
) -> tuple[KlGradients, Tensor | None]:
    """What the rows' gradients are made of, and the unit that it is in (None for 1)."""
    math = head.policy.math
    (by_kls, by_logps), unit = row_factors([by_kls, by_logps], head.policy.operand)
    scale, reference_scale = (by_kls - by_logps) * math.slope, -by_kls * math.slope
    # p − 1 is exact near 1, where the difference of two exponentials would not be.
    targets = scale * found.logps.expm1() + reference_scale * found.reference_logps.expm1()
    if math.softcap is not None:
        targets = targets * math.cap_slope(found.logps + found.logsumexps)
    numbers = KlGradients(
        found.logsumexps, found.reference_logsumexps, scale, reference_scale, targets
    )
    return numbers, unit
