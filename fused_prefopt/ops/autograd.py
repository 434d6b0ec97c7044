"""Registered op `fused_prefopt::head_logps` and its backward: what autograd and compilers see.

Its outputs are dense, so a compiler knows their shapes; which rows are labelled, and what is kept
for the backward, stays inside. Its options go through it as `head_rows.Spec.packed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_prefopt.ops import dropped_mass
from fused_prefopt.ops.gradients import Gradients, Wanted
from fused_prefopt.ops.head_rows import HeadRows, HeadTensors, Spec
from fused_prefopt.ops.inputs import labelled_rows, sequences_of
from fused_prefopt.ops.passes import Kept, Upstream, backward, forward_of
from fused_prefopt.ops.precision import fixed_precision

FiveTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_FIVE = len(HeadTensors._fields)


@torch.library.custom_op("fused_prefopt::head_logps", mutates_args=())
def head_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    targets: Tensor,
    sequence_ids: Tensor | None,
    sizes: Sequence[int],
    scalars: Sequence[float],
    names: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs of the labelled rows, their sums over sequences and the sequences' lengths.

    Args:
        hidden: (M, D).
        weight: (V, D).
        bias: (V,) or None.
        low_hidden, low_weight: (M, r) and (V, r) of a low-rank term, or None.
        targets: (M,) int64, `ignore_index` where a row has no label.
        sequence_ids: (M,) int64 in [0, S), or None for M / S rows each, in order.
        sizes, scalars, names: a `Spec`, packed.

    Returns:
        logps (M,), 0 where there is no label; sums (S,); lengths (S,) int64; entropies (M,), or
        (0,) where they are not wanted; index (n,) of the labelled rows; and what is kept for the
        backward: logsumexps (n,), stash, maxima, ticket and masses (see `passes.Kept`).
    """
    spec = Spec.unpacked(sizes, scalars, names)
    index = labelled_rows(targets, spec.ignore_index, spec.num_labels)
    tensors = HeadTensors(hidden, weight, bias, low_hidden, low_weight)
    head = HeadRows.of(tensors, targets, index, spec)
    run = forward_of(head)
    with fixed_precision(hidden, spec.math.dtype):
        row_logps, row_entropies, kept = run(head).finished(head.shard)
        add = head.build_engine("fold").sequence_sums
        ids = sequences_of(index, sequence_ids, spec.num_sequences, targets.shape[0])
        sums, lengths = add(row_logps, ids, spec.num_sequences, sequence_ids is None)
    logps = row_logps.new_zeros(targets.shape)
    logps[index] = row_logps
    entropies = row_entropies
    if spec.entropy:
        entropies = torch.zeros_like(logps)
        entropies[index] = row_entropies
    saved = kept.logsumexps, kept.stash, kept.maxima, kept.ticket, kept.masses
    return logps, sums, lengths, entropies, index, *saved


@head_logps.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    targets: Tensor,
    sequence_ids: Tensor | None,
    sizes: Sequence[int],
    scalars: Sequence[float],
    names: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    spec, context = Spec.unpacked(sizes, scalars, names), torch.library.get_ctx()
    rows = context.new_dynamic_size() if spec.num_labels < 0 else spec.num_labels

    def empty(*size: Any) -> Tensor:
        return hidden.new_empty(size, dtype=spec.math.accumulator)

    index = targets.new_empty(rows)
    stash, maxima = empty(0), empty(0, 0)
    if spec.path == "stash":
        stash = empty(rows, hidden.shape[1] + (0 if low_hidden is None else low_hidden.shape[1]))
        maxima = empty(1, rows)
    elif spec.path == "local" or spec.kept_rows:
        maxima = empty(context.new_dynamic_size(), context.new_dynamic_size())
    masses = empty(-(-spec.vocab // dropped_mass.PART), rows) if spec.drop_mass else empty(0)
    ticket = torch.empty(1, dtype=torch.int64, device="cpu")
    lengths = targets.new_empty(spec.num_sequences)
    logps, sums = empty(targets.shape[0]), empty(spec.num_sequences)
    entropies = empty(targets.shape[0] if spec.entropy else 0)
    return logps, sums, lengths, entropies, index, empty(rows), stash, maxima, ticket, masses


@torch.library.custom_op("fused_prefopt::head_logps_backward", mutates_args=())
def head_logps_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    targets: Tensor,
    sequence_ids: Tensor | None,
    logps: Tensor,
    entropies: Tensor,
    index: Tensor,
    logsumexps: Tensor,
    stash: Tensor,
    maxima: Tensor,
    ticket: Tensor,
    masses: Tensor,
    grad_logps: Tensor | None,
    grad_sums: Tensor | None,
    grad_entropies: Tensor | None,
    sizes: Sequence[int],
    scalars: Sequence[float],
    names: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to the tensors of the head; empty where none is wanted.

    Args:
        grad_logps: (M,) d loss / d logps, None for zeros.
        grad_sums: (S,) d loss / d sums, None for zeros.
        grad_entropies: (M,) d loss / d entropies, None for zeros.
        wanted: which gradients of the five tensors of `HeadTensors`.

    The others are the inputs and outputs of `head_logps`.
    """
    spec = Spec.unpacked(sizes, scalars, names)
    tensors = HeadTensors(hidden, weight, bias, low_hidden, low_weight)
    head = HeadRows.of(tensors, targets, index, spec, backward=True)
    parts = [] if grad_logps is None else [grad_logps[index]]
    if grad_sums is not None:
        ids = sequences_of(index, sequence_ids, spec.num_sequences, targets.shape[0])
        parts.append(grad_sums[ids])
    by_logps = torch.zeros_like(logsumexps) if not parts else parts[0]
    if len(parts) > 1:
        by_logps = parts[0] + parts[1]
    upstream = Upstream(logps[index], by_logps)
    if spec.entropy and grad_entropies is not None:
        upstream = Upstream(logps[index], by_logps, entropies[index], grad_entropies[index])
    kept = Kept(logsumexps, stash, maxima, ticket, masses)
    with fixed_precision(hidden, spec.math.dtype):
        grads = backward(head, kept, upstream, weight.shape[0], Wanted(*wanted))
    return without_none(grads, hidden)


@head_logps_backward.register_fake
def fake_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    *rest: Any,
) -> FiveTensors:
    """Gradients of the five tensors without values, as a compiler sees them; `wanted` is last."""
    *_, wanted = rest

    def empty(value: Tensor | None, needed: bool, rows: bool = False) -> Tensor:
        if value is None or not needed:
            return hidden.new_empty(0)
        # The weights' gradients are contiguous, whatever the strides of the weights.
        return torch.empty_like(value) if rows else value.new_empty(value.shape)

    need = Wanted(*wanted)
    return (
        empty(hidden, need.hidden, rows=True),
        empty(weight, need.weight),
        empty(bias, need.bias),
        empty(low_hidden, need.low_hidden, rows=True),
        empty(low_weight, need.low_weight),
    )


def without_none(grads: Gradients, hidden: Tensor) -> FiveTensors:
    """The gradients as an op returns them: an empty tensor where there is none."""
    first, second, third, fourth, fifth = (
        hidden.new_empty(0) if grad is None else grad for grad in grads
    )
    return first, second, third, fourth, fifth


def save(ctx: Any, inputs: tuple[Any, ...], *outputs: Tensor) -> None:
    """Keep what a backward reads: the op's tensors, outputs of it, and its packed options."""
    *tensors, sizes, scalars, names = inputs
    # Zeros for the gradient of what is kept would take as much memory as that.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *outputs)
    ctx.packed, ctx.inputs = (sizes, scalars, names), len(inputs)


def returned(ctx: Any, backward_op: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    """The gradients of an op's inputs, from its registered backward.

    Args:
        ctx: as `save` has left it.
        backward_op: takes what was saved, `upstream`, the packed options and what is wanted.
        upstream: gradients of the op's outputs.
    """
    wanted = list(ctx.needs_input_grad[:_FIVE])
    grads = backward_op(*ctx.saved_tensors, *upstream, *ctx.packed, wanted)
    found = [grad if need else None for grad, need in zip(grads, wanted, strict=True)]
    return (*found, *[None] * (ctx.inputs - _FIVE))


def refuse_double_backward(op: Any, names: str) -> None:
    """Let a registered backward raise RuntimeError where it is differentiated.

    Args:
        op: the registered op.
        names: of the public functions whose backward it is.
    """

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"{names} cannot be differentiated twice: the backward is computed without logits."
            " Use eager log-softmax where a second derivative is needed."
        )

    op.register_autograd(refuse)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logps, _, lengths, entropies, index, *kept = output
    ctx.mark_non_differentiable(lengths, index, *kept)
    save(ctx, inputs, logps, entropies, index, *kept)


def _backward(
    ctx: Any,
    grad_logps: Tensor | None,
    grad_sums: Tensor | None,
    _: Any,
    grad_entropies: Tensor | None,
    *__: Any,
) -> tuple[Any, ...]:
    return returned(ctx, head_logps_backward, grad_logps, grad_sums, grad_entropies)


head_logps.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(head_logps_backward, "sequence_logps and token_logps")
