"""What a trainer logs of each token beside its log-prob, at the cost of an evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_prefopt.ops.call import LogpOptions, read_call
from fused_prefopt.ops.head_rows import HeadRows
from fused_prefopt.ops.layout import labelled_rows
from fused_prefopt.ops.precision import fixed_precision
from fused_prefopt.ops.tile import Details, RowStatistics, Tile
from fused_prefopt.types import AnyHead, TokenStatistics


@torch.no_grad()
def token_statistics(
    hidden: Tensor,
    head: AnyHead,
    labels: Tensor,
    *,
    shift: bool = True,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    num_labels: int | None = None,
    ignore_index: int = -100,
    workspace_mb: float | None = None,
    engine: str = "auto",
) -> TokenStatistics:
    """Log-prob, entropy, collision, mean logit and correctness of every labelled token.

    Without gradient. The entropy ``−Σ_v p_v log p_v``, the collision ``log Σ_v p_v²`` and the
    others come from the one pass over the logits that the log-probs need. Arguments, layout and
    errors are those of `token_logps`.
    """
    options = LogpOptions(
        shift=shift,
        sequence_ids=sequence_ids,
        num_sequences=num_sequences,
        num_labels=num_labels,
        ignore_index=ignore_index,
        workspace_mb=workspace_mb,
        engine=engine,
    )
    call = read_call(hidden, head, labels, options)
    if call.shard.group:
        raise ValueError("head: token_statistics takes whole heads, got one sharded over ranks")
    index = labelled_rows(call.layout.targets, ignore_index, call.count)
    rows = HeadRows.of(
        call.tensors,
        call.layout.targets,
        index,
        call.vocab,
        call.shard,
        call.math,
        "evaluate",
        call.engine,
        call.workspace(workspace_mb, index.shape[0], False),
        0,
        False,
        0.0,
        True,
    )
    with fixed_precision(hidden, call.math.dtype):
        statistics, details = call.checked(_fold(rows))

    def dense(values: Tensor) -> Tensor:
        everywhere = values.new_zeros(call.layout.targets.shape)
        everywhere[index] = values
        everywhere = everywhere.view(labels.shape)
        return everywhere.roll(1, -1) if shift else everywhere

    return TokenStatistics(
        dense(statistics.logps()),
        dense(details.entropies(statistics)),
        dense(details.squares.log() - 2 * statistics.sum.log()),
        dense(details.logit_sum / call.vocab),
        dense(details.best == rows.targets),
    )


def _fold(head: HeadRows) -> tuple[RowStatistics, Details]:
    engine, hidden = head.build_engine("details"), head.hidden_rows()
    statistics = RowStatistics.empty(head.rows, head.math.accumulator, head.device)
    details = Details.empty(head.rows, head.math.accumulator, head.device)
    for slab, weight, bias in head.slabs():
        for rows in head.row_slices():
            tile = Tile(hidden[rows], weight, bias, head.targets[rows], slab.start)
            engine.fold_details(tile, statistics[rows], details[rows])
    return statistics, details
