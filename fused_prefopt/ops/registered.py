"""The registered op `fused_prefopt::head_logps`: what autograd, torch.compile and autocast see.

Its outputs are dense, so a compiler knows their shapes; which rows are labelled, and what is kept
for the backward, stays inside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_prefopt.ops import dropped_mass
from fused_prefopt.ops.head_math import HeadMath
from fused_prefopt.ops.head_rows import HeadRows, HeadTensors
from fused_prefopt.ops.layout import labelled_rows, sequences_of
from fused_prefopt.ops.passes import forward
from fused_prefopt.ops.precision import fixed_precision
from fused_prefopt.ops.registered_backward import head_logps_backward
from fused_prefopt.ops.vocab_shard import VocabShard


@torch.library.custom_op("fused_prefopt::head_logps", mutates_args=())
def head_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    targets: Tensor,
    sequence_ids: Tensor | None,
    num_sequences: int,
    ignore_index: int,
    num_labels: int,
    vocab: int,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    dtype: torch.dtype,
    path: str,
    engine: str,
    workspace: int,
    kept_rows: int,
    group: str,
    first: int,
    drop_mass: float,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs of the labelled rows, their sums over sequences and the sequences' lengths.

    Args:
        hidden: (M, D).
        weight: (V, D).
        bias: (V,) or None.
        low_hidden, low_weight: (M, r) and (V, r) of a low-rank term, or None.
        targets: (M,) int64, `ignore_index` where a row has no label.
        sequence_ids: (M,) int64 in [0, S), or None for M / S rows each, in order.
        num_sequences: S.
        ignore_index: the target of rows without a label.
        num_labels: labelled rows, or -1: counting them costs CUDA a host sync.
        vocab: rows of `weight` that are no padding.
        softcap, logit_scale, temperature: of the head.
        dtype: what the matmuls compute in.
        path, engine, workspace, kept_rows: of the plan; the engine may be `auto`.
        group: the process group whose ranks share the head's rows; empty for a whole head.
        first: vocabulary index of this rank's first row.
        drop_mass: probability that the gradient of a row may leave out; 0 but for `local` and
            `recompute`.
        entropy: the entropies are wanted; on `evaluate` and `recompute` only.

    Returns:
        logps (M,), 0 where there is no label; sums (S,); lengths (S,) int64; entropies (M,), or
        (0,) where they are not wanted; index (n,) of the labelled rows; and what is kept for the
        backward: logsumexps (n,), stash, maxima, ticket and masses (see `passes.Kept`).
    """
    index = labelled_rows(targets, ignore_index, num_labels)
    math = HeadMath(softcap, logit_scale, temperature, dtype)
    tensors = HeadTensors(hidden, weight, bias, low_hidden, low_weight)
    shard = VocabShard(group, first)
    head = HeadRows.of(
        tensors,
        targets,
        index,
        vocab,
        shard,
        math,
        path,
        engine,
        workspace,
        kept_rows,
        False,
        drop_mass,
        entropy,
    )
    with fixed_precision(hidden, dtype):
        row_logps, row_entropies, kept = forward(head)
        add = head.build_engine("fold").sequence_sums
        ids = sequences_of(index, sequence_ids, num_sequences, targets.shape[0])
        sums, lengths = add(row_logps, ids, num_sequences, sequence_ids is None)
    logps = row_logps.new_zeros(targets.shape)
    logps[index] = row_logps
    entropies = row_entropies
    if entropy:
        entropies = torch.zeros_like(logps)
        entropies[index] = row_entropies
    return (
        logps,
        sums,
        lengths,
        entropies,
        index,
        kept.logsumexps,
        kept.stash,
        kept.maxima,
        kept.ticket,
        kept.masses,
    )


@head_logps.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    targets: Tensor,
    sequence_ids: Tensor | None,
    num_sequences: int,
    ignore_index: int,
    num_labels: int,
    vocab: int,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    dtype: torch.dtype,
    path: str,
    engine: str,
    workspace: int,
    kept_rows: int,
    group: str,
    first: int,
    drop_mass: float,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    math = HeadMath(softcap, logit_scale, temperature, dtype)
    context = torch.library.get_ctx()
    rows = context.new_dynamic_size() if num_labels < 0 else num_labels

    def empty(*size: Any) -> Tensor:
        return hidden.new_empty(size, dtype=math.accumulator)

    index = targets.new_empty(rows)
    stash, maxima = empty(0), empty(0)
    if path == "stash":
        stash = empty(rows, hidden.shape[1] + (0 if low_hidden is None else low_hidden.shape[1]))
        maxima = empty(1, rows)
    elif path == "local" or kept_rows:
        maxima = empty(context.new_dynamic_size(), context.new_dynamic_size())
    masses = empty(-(-vocab // dropped_mass.PART), rows) if drop_mass else empty(0)
    ticket = torch.empty(1, dtype=torch.int64, device="cpu")
    lengths = targets.new_empty(num_sequences)
    logps, sums = empty(targets.shape[0]), empty(num_sequences)
    entropies = empty(targets.shape[0] if entropy else 0)
    return logps, sums, lengths, entropies, index, empty(rows), stash, maxima, ticket, masses


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, targets, sequence_ids = inputs[:7]
    options = inputs[-13:]  # from `vocab` on
    logps, _, lengths, entropies, index, *kept = output
    ctx.mark_non_differentiable(lengths, index, *kept)
    # Zeros for the gradient of `stash` would take as much memory as the stash.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, targets, sequence_ids, logps, entropies, index, *kept)
    ctx.options = options


def _backward(
    ctx: Any,
    grad_logps: Tensor | None,
    grad_sums: Tensor | None,
    _: Any,
    grad_entropies: Tensor | None,
    *__: Any,
) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:5]
    upstream = (grad_logps, grad_sums, grad_entropies)
    grads = head_logps_backward(*upstream, *ctx.saved_tensors, *ctx.options, needs)
    wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (*wanted, *(None,) * 18)


head_logps.register_autograd(_backward, setup_context=_setup_context)
