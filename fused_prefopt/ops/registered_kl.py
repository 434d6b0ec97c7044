"""The registered op `fused_prefopt::head_kl`: what autograd and torch.compile see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_prefopt.ops import kl_paths
from fused_prefopt.ops.gradients import Needs
from fused_prefopt.ops.head_math import HeadMath
from fused_prefopt.ops.head_rows import HeadTensors
from fused_prefopt.ops.kl_paths import KlResult
from fused_prefopt.ops.kl_rows import KlRows, load_kl_engine
from fused_prefopt.ops.layout import labelled_rows, sequences_of
from fused_prefopt.ops.precision import fixed_precision
from fused_prefopt.ops.registered_backward import (
    empty_gradients,
    refuse_double_backward,
    without_none,
)


def _maths(scalars: Sequence[float], dtype: torch.dtype) -> tuple[HeadMath, HeadMath]:
    def math(softcap: float, scale: float, temperature: float) -> HeadMath:
        return HeadMath(softcap or None, scale, temperature, dtype)

    return math(*scalars[:3]), math(*scalars[3:])


@torch.library.custom_op("fused_prefopt::head_kl", mutates_args=())
def head_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    ref_low_hidden: Tensor | None,
    ref_low_weight: Tensor | None,
    targets: Tensor,
    sequence_ids: Tensor | None,
    num_sequences: int,
    ignore_index: int,
    num_labels: int,
    vocab: int,
    scalars: Sequence[float],
    dtype: torch.dtype,
    engine: str,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums over sequences of KL(reference || policy) and of both log-probs.

    Args:
        hidden, weight, bias, low_hidden, low_weight: (M, D), (V, D), (V,), (M, r), (V, r) of the
            policy's head, the last three or None.
        ref_hidden, …, ref_low_weight: the same of the reference's, constants.
        targets: (M,) int64, `ignore_index` where a row has no label.
        sequence_ids: (M,) int64 in [0, S), or None for M / S rows each, in order.
        num_sequences: S.
        ignore_index: the target of rows without a label.
        num_labels: labelled rows, or -1.
        vocab: rows of both weights that are no padding.
        scalars: softcap (0 for none), logit scale and temperature of each head.
        dtype: what the matmuls compute in.
        engine: `torch`, `cublas` or `triton`.
        workspace: bytes.

    Returns:
        kl (S,), policy (S,), reference (S,), lengths (S,) int64; and what is kept for the backward:
        index (n,) of the labelled rows, logps (n,), reference logps (n,), logsumexps (n,) and
        reference logsumexps (n,).
    """
    index = labelled_rows(targets, ignore_index, num_labels)
    head = KlRows.of(
        HeadTensors(hidden, weight, bias, low_hidden, low_weight),
        HeadTensors(ref_hidden, ref_weight, ref_bias, ref_low_hidden, ref_low_weight),
        _maths(scalars, dtype),
        targets,
        index,
        vocab,
        engine,
        workspace,
        False,
    )
    ids = sequences_of(index, sequence_ids, num_sequences, targets.shape[0])
    sorted_ids, add = sequence_ids is None, load_kl_engine(engine).sequence_sums
    with fixed_precision(hidden, dtype):
        found = kl_paths.forward(head)
        kls, lengths = add(found.kls, ids, num_sequences, sorted_ids)
        policy, _ = add(found.logps, ids, num_sequences, sorted_ids)
        others, _ = add(found.reference_logps, ids, num_sequences, sorted_ids)
    return (
        kls,
        policy,
        others,
        lengths,
        index,
        found.logps,
        found.reference_logps,
        found.logsumexps,
        found.reference_logsumexps,
    )


@head_kl.register_fake
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    targets, _, num_sequences, _, num_labels, _, _, dtype = rest[9:17]
    context = torch.library.get_ctx()
    rows = context.new_dynamic_size() if num_labels < 0 else num_labels
    accumulator = HeadMath(None, 1.0, 1.0, dtype).accumulator

    def empty(size: Any) -> Tensor:
        return hidden.new_empty(size, dtype=accumulator)

    sums = [empty(num_sequences) for _ in range(3)]
    lengths, index = targets.new_empty(num_sequences), targets.new_empty(rows)
    return (*sums, lengths, index, *(empty(rows) for _ in range(4)))


@torch.library.custom_op("fused_prefopt::head_kl_backward", mutates_args=())
def head_kl_backward(
    grad_kl: Tensor | None,
    grad_policy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    ref_low_hidden: Tensor | None,
    ref_low_weight: Tensor | None,
    targets: Tensor,
    sequence_ids: Tensor | None,
    index: Tensor,
    logps: Tensor,
    reference_logps: Tensor,
    logsumexps: Tensor,
    reference_logsumexps: Tensor,
    vocab: int,
    scalars: Sequence[float],
    dtype: torch.dtype,
    engine: str,
    workspace: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to the policy's tensors; empty where none is needed.

    Args:
        grad_kl: (S,) d loss / d kl, None for zeros.
        grad_policy: (S,) d loss / d policy, None for zeros.
        needs: of the five tensors of `HeadTensors`, those that need a gradient.

    The others are the inputs and outputs of `head_kl`.
    """
    head = KlRows.of(
        HeadTensors(hidden, weight, bias, low_hidden, low_weight),
        HeadTensors(ref_hidden, ref_weight, ref_bias, ref_low_hidden, ref_low_weight),
        _maths(scalars, dtype),
        targets,
        index,
        vocab,
        engine,
        workspace,
        True,
    )

    def of_rows(grad: Tensor) -> Tensor:
        return grad[sequences_of(index, sequence_ids, grad.shape[0], targets.shape[0])]

    by_kls = None if grad_kl is None else of_rows(grad_kl)
    by_logps = torch.zeros_like(logps) if grad_policy is None else of_rows(grad_policy)
    found = KlResult(logps, logps, reference_logps, logsumexps, reference_logsumexps)
    with fixed_precision(hidden, dtype):
        grads = kl_paths.backward(head, found, by_kls, by_logps, weight.shape[0], Needs(*needs))
    return without_none(grads, hidden)


@head_kl_backward.register_fake
def _(
    grad_kl: Tensor | None, grad_policy: Tensor | None, hidden: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return empty_gradients((hidden, *rest[:4]), rest[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, targets, sequence_ids = inputs[:12]
    _, _, others, lengths, *kept = output
    ctx.mark_non_differentiable(others, lengths, *kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, targets, sequence_ids, *kept)
    ctx.options = inputs[-5:]  # from `vocab` on


def _backward(
    ctx: Any, grad_kl: Tensor | None, grad_policy: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:5]
    grads = head_kl_backward(grad_kl, grad_policy, *ctx.saved_tensors, *ctx.options, needs)
    wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (*wanted, *(None,) * 15)


head_kl.register_autograd(_backward, setup_context=_setup_context)


refuse_double_backward(head_kl_backward, "sequence_kl")
