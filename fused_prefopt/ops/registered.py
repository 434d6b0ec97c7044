"""The registered op `fused_prefopt::head_logps`: what autograd, torch.compile and autocast see.

Its outputs are dense, so a compiler knows their shapes; which rows are labelled, and what is kept
for the backward, stays inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_prefopt.ops import dropped_mass, paths
from fused_prefopt.ops.engines import load_engine
from fused_prefopt.ops.head_math import HeadMath
from fused_prefopt.ops.head_rows import HeadRows, HeadTensors
from fused_prefopt.ops.torch_engine import matmul_precision
from fused_prefopt.ops.vocab_shard import VocabShard


@torch.library.custom_op("fused_prefopt::head_logps", mutates_args=())
def head_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    targets: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    sorted_ids: bool,
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
    group: str,
    first: int,
    drop_mass: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs of the labelled rows, their sums over sequences and the sequences' lengths.

    Args:
        hidden: (M, D).
        weight: (V, D).
        bias: (V,) or None.
        low_hidden, low_weight: (M, r) and (V, r) of a low-rank term, or None.
        targets: (M,) int64, `ignore_index` where a row has no label.
        sequence_ids: (M,) int64 in [0, S).
        num_sequences: S.
        sorted_ids: the sequence ids never fall from one row to the next.
        ignore_index: the target of rows without a label.
        num_labels: labelled rows, or -1: counting them costs CUDA a host sync.
        vocab: rows of `weight` that are no padding.
        softcap, logit_scale, temperature: of the head.
        dtype: what the matmuls compute in.
        path, engine, workspace: of the plan.
        group: the process group whose ranks share the head's rows; empty for a whole head.
        first: vocabulary index of this rank's first row.
        drop_mass: probability that the gradient of a row may leave out; 0 but for `local` and
            `recompute`.

    Returns:
        logps (M,), 0 where there is no label; sums (S,); lengths (S,) int64; index (n,) of the
        labelled rows; and what is kept for the backward: logsumexps (n,), stash, maxima, ticket and
        masses (see `paths.Kept`).
    """
    labelled = targets != ignore_index
    if num_labels < 0:
        index = labelled.nonzero().squeeze(1)
    else:
        index = labelled.nonzero_static(size=num_labels).squeeze(1)
    math = HeadMath(softcap, logit_scale, temperature, dtype)
    tensors, shard = (
        HeadTensors(hidden, weight, bias, low_hidden, low_weight),
        VocabShard(group, first),
    )
    head = HeadRows.of(
        tensors, targets, index, vocab, shard, math, path, engine, workspace, False, drop_mass
    )
    with fixed_precision(hidden, dtype):
        row_logps, kept = paths.forward(head)
    logps = row_logps.new_zeros(targets.shape)
    logps[index] = row_logps
    add = load_engine(engine).sequence_sums
    sums, lengths = add(row_logps, sequence_ids[index], num_sequences, sorted_ids)
    return (
        logps,
        sums,
        lengths,
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
    sequence_ids: Tensor,
    num_sequences: int,
    sorted_ids: bool,
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
    group: str,
    first: int,
    drop_mass: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    math = HeadMath(softcap, logit_scale, temperature, dtype)
    context = torch.library.get_ctx()
    rows = context.new_dynamic_size() if num_labels < 0 else num_labels

    def empty(*size: Any) -> Tensor:
        return hidden.new_empty(size, dtype=math.accumulator)

    index = targets.new_empty(rows)
    stash, maxima = empty(0), empty(0)
    if path == "stash":
        stash = empty(rows, hidden.shape[1] + (0 if low_hidden is None else low_hidden.shape[1]))
    elif path == "local":
        maxima = empty(context.new_dynamic_size(), rows)
    masses = empty(-(-vocab // dropped_mass.PART), rows) if drop_mass else empty(0)
    ticket = torch.empty(1, dtype=torch.int64, device="cpu")
    lengths = targets.new_empty(num_sequences)
    logps, sums = empty(targets.shape[0]), empty(num_sequences)
    return logps, sums, lengths, index, empty(rows), stash, maxima, ticket, masses


@torch.library.custom_op("fused_prefopt::head_logps_backward", mutates_args=())
def head_logps_backward(
    grad_logps: Tensor | None,
    grad_sums: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    targets: Tensor,
    sequence_ids: Tensor,
    logps: Tensor,
    index: Tensor,
    logsumexps: Tensor,
    stash: Tensor,
    maxima: Tensor,
    ticket: Tensor,
    masses: Tensor,
    vocab: int,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    dtype: torch.dtype,
    path: str,
    engine: str,
    workspace: int,
    group: str,
    first: int,
    drop_mass: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to the tensors of the head; empty where none is needed.

    Args:
        grad_logps: (M,) d loss / d logps, None for zeros.
        grad_sums: (S,) d loss / d sums, None for zeros.
        needs: of the five tensors of `HeadTensors`, those that need a gradient.

    The others are the inputs and outputs of `head_logps`.
    """
    math = HeadMath(softcap, logit_scale, temperature, dtype)
    tensors, shard = (
        HeadTensors(hidden, weight, bias, low_hidden, low_weight),
        VocabShard(group, first),
    )
    head = HeadRows.of(
        tensors, targets, index, vocab, shard, math, path, engine, workspace, True, drop_mass
    )
    upstream = torch.zeros_like(logsumexps)
    if grad_logps is not None:
        upstream += grad_logps[index]
    if grad_sums is not None:
        upstream += grad_sums[sequence_ids[index]]
    kept = paths.Kept(logsumexps, stash, maxima, ticket, masses)
    with fixed_precision(hidden, dtype):
        grads = paths.backward(
            head, kept, logps[index], upstream, weight.shape[0], paths.Needs(*needs)
        )
    found = [hidden.new_empty(0) if grad is None else grad for grad in grads]
    return found[0], found[1], found[2], found[3], found[4]


@head_logps_backward.register_fake
def _(
    grad_logps: Tensor | None, grad_sums: Tensor | None, hidden: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    weight, bias, low_hidden, low_weight = rest[:4]
    wanted = dict(zip(paths.Needs._fields, rest[-1], strict=True))

    def empty(name: str, value: Tensor | None) -> Tensor:
        if value is None or not wanted[name]:
            return hidden.new_empty(0)
        # The weights' gradients are contiguous, whatever the strides of the weights.
        rows = name in ("hidden", "low_hidden")
        return torch.empty_like(value) if rows else value.new_empty(value.shape)

    return (
        empty("hidden", hidden),
        empty("weight", weight),
        empty("bias", bias),
        empty("low_hidden", low_hidden),
        empty("low_weight", low_weight),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, targets, sequence_ids = inputs[:7]
    options = inputs[-11:]  # from `vocab` on
    logps, _, lengths, index, *kept = output
    ctx.mark_non_differentiable(lengths, index, *kept)
    # Zeros for the gradient of `stash` would take as much memory as the stash.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, targets, sequence_ids, logps, index, *kept)
    ctx.options = options


def _backward(
    ctx: Any, grad_logps: Tensor | None, grad_sums: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:5]
    grads = head_logps_backward(grad_logps, grad_sums, *ctx.saved_tensors, *ctx.options, needs)
    wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (*wanted, *(None,) * 17)


head_logps.register_autograd(_backward, setup_context=_setup_context)


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "sequence_logps and token_logps cannot be differentiated twice: their backward is computed"
        " without logits. Use eager log-softmax where a second derivative is needed."
    )


head_logps_backward.register_autograd(_no_double_backward)


class fixed_precision:
    """Autocast off (the op has chosen its dtype) and the CPU matmul precision of that dtype."""

    def __init__(self, hidden: Tensor, dtype: torch.dtype) -> None:
        self._autocast = torch.autocast(hidden.device.type, enabled=False)
        self._precision = matmul_precision(dtype, hidden.device)

    def __enter__(self) -> None:
        self._autocast.__enter__()
        self._precision.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._precision.__exit__(*error)
        self._autocast.__exit__(*error)
