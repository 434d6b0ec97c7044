"""LD-DPO: what a longer completion says beyond the length of its partner counts less."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from fused_prefopt.checks import require_integer, require_number, require_shape
from fused_prefopt.losses.needs import halves, needed
from fused_prefopt.types import LogpBatch


def tail_labels(labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Labels of the tokens by which each completion exceeds the other one of its pair.

    Args:
        labels: (S, T) chosen half first, `ignore_index` everywhere but on completion tokens and in
            the first column.
        ignore_index: what marks a position without a label.

    Returns:
        (S, T) the same labels with the first ``min(|y_w|, |y_l|)`` of each row ignored: what
        `sequence_logps` sums to the tail's log-prob.

    Raises:
        ValueError: the shape or dtype does not fit, or the number of sequences is odd.
    """
    require_shape("labels", labels, ("S", "T"))
    require_integer("labels", labels)
    counted = labels != ignore_index
    chosen, rejected = halves(counted.sum(1))
    shared = chosen.minimum(rejected).repeat(2)
    return labels.masked_fill(counted.cumsum(1) <= shared[:, None], ignore_index)


def length_desensitized(
    batch: LogpBatch, tail: Tensor, tail_reference: Tensor | None, *, alpha: float
) -> LogpBatch:
    """The batch with the tails' log-probs weighted: any loss of it is length-desensitised.

    ``L ← L − (1−α) L_tail``, and the same for the reference. WPO's weights stay those of the whole
    completions, as TRL's.

    Args:
        batch: pairs.
        tail: (S,) log-probs of `tail_labels` under the policy, in nats, differentiable.
        tail_reference: (S,) the same under the reference; None where there is no reference, or
            its tails are weighted already.
        alpha: 0 <= α <= 1, weight of the tails; 1 changes nothing.

    Returns:
        A new batch.

    Raises:
        ValueError: a field is missing, or a shape or α does not fit.

    Source: LD-DPO (Liu et al. 2024, arXiv:2409.06411), TRL's `ld_alpha`.
    """
    require_number("alpha", alpha, low=0, high=1)
    require_shape("tail", tail, batch.policy.shape)
    reference, collision = batch.reference, -(1 - alpha) * tail.detach()
    if tail_reference is not None:
        require_shape("tail_reference", tail_reference, batch.policy.shape)
        reference = needed(batch, "reference") - (1 - alpha) * tail_reference
    return dataclasses.replace(
        batch,
        policy=batch.policy - (1 - alpha) * tail,
        reference=reference,
        # What the weights subtract from the policy's log-probs.
        collision=collision if batch.collision is None else batch.collision + collision,
    )
