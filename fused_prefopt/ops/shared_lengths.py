"""Log-probs of pairs cut where the shorter completion ends: what LD-DPO weighs apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_prefopt.ops.layout import Layout, packed_layout, padded_layout
from fused_prefopt.ops.logps import sequence_logps
from fused_prefopt.types import AnyHead, SequenceLogps


def shared_and_tail_logps(
    hidden: Tensor,
    head: AnyHead,
    labels: Tensor,
    *,
    shift: bool = True,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> tuple[SequenceLogps, SequenceLogps]:
    """`sequence_logps` of the tokens up to the length of the partner, and of those beyond.

    One call of the op at no further cost: the tails are sequences of their own. The first half of
    the sequences is chosen, the second rejected; of a pair with ``n = min(|y_w|, |y_l|)`` labelled
    tokens, the first n of each completion are shared and the others its tail. The two sums and
    lengths add up to those of `sequence_logps`.

    Args:
        hidden, head, labels, shift, sequence_ids, num_sequences, ignore_index: as there.
        **options: the others of `sequence_logps`.

    Returns:
        The shared parts and the tails, S sequences each, with one plan.

    Raises:
        ValueError: the number of sequences is odd, or what `sequence_logps` raises.

    Source: LD-DPO (Liu et al. 2024, arXiv:2409.06411), whose α weighs the tails.
    """
    layout = (
        padded_layout(labels, shift=shift, ignore_index=ignore_index)
        if sequence_ids is None
        else packed_layout(
            labels, sequence_ids, num_sequences, shift=shift, ignore_index=ignore_index
        )
    )
    sequences = layout.num_sequences
    if sequences % 2:
        raise ValueError(
            f"labels: got {sequences} sequences, needs an even number: chosen first, then rejected"
        )
    out = sequence_logps(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        layout.targets,
        shift=False,
        sequence_ids=layout.ids() + sequences * _in_tail(layout, ignore_index),
        num_sequences=2 * sequences,
        ignore_index=ignore_index,
        **options,
    )
    shared = SequenceLogps(out.sums[:sequences], out.lengths[:sequences], out.plan)
    return shared, SequenceLogps(out.sums[sequences:], out.lengths[sequences:], out.plan)


def _in_tail(layout: Layout, ignore_index: int) -> Tensor:
    """(M,) bool, whether a labelled row is beyond the length of its sequence's partner."""
    ids, order = layout.ids().sort(stable=True)
    counted = (layout.targets != ignore_index)[order]
    lengths = ids.new_zeros(layout.num_sequences).scatter_add(0, ids, counted.long())
    pairs = layout.num_sequences // 2
    shared = lengths[:pairs].minimum(lengths[pairs:]).repeat(2)
    before = lengths.cumsum(0) - lengths
    beyond = counted.cumsum(0) - before[ids] > shared[ids]
    return torch.empty_like(beyond).scatter(0, order, beyond)
