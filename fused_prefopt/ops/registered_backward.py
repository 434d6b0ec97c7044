"""The registered op `fused_prefopt::head_logps_backward`: the gradients of `head_logps`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_prefopt.ops.gradients import Gradients, Needs
from fused_prefopt.ops.head_math import HeadMath
from fused_prefopt.ops.head_rows import HeadRows, HeadTensors
from fused_prefopt.ops.layout import sequences_of
from fused_prefopt.ops.passes import Kept, Upstream, backward
from fused_prefopt.ops.precision import fixed_precision
from fused_prefopt.ops.vocab_shard import VocabShard

FiveTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("fused_prefopt::head_logps_backward", mutates_args=())
def head_logps_backward(
    grad_logps: Tensor | None,
    grad_sums: Tensor | None,
    grad_entropies: Tensor | None,
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
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to the tensors of the head; empty where none is needed.

    Args:
        grad_logps: (M,) d loss / d logps, None for zeros.
        grad_sums: (S,) d loss / d sums, None for zeros.
        grad_entropies: (M,) d loss / d entropies, None for zeros.
        needs: of the five tensors of `HeadTensors`, those that need a gradient.

    The others are the inputs and outputs of `head_logps`.
    """
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
        True,
        drop_mass,
        entropy,
    )
    parts = [] if grad_logps is None else [grad_logps[index]]
    if grad_sums is not None:
        ids = sequences_of(index, sequence_ids, grad_sums.shape[0], targets.shape[0])
        parts.append(grad_sums[ids])
    by_logps = torch.zeros_like(logsumexps) if not parts else parts[0]
    if len(parts) > 1:
        by_logps = parts[0] + parts[1]
    upstream = Upstream(logps[index], by_logps)
    if entropy and grad_entropies is not None:
        upstream = Upstream(logps[index], by_logps, entropies[index], grad_entropies[index])
    kept = Kept(logsumexps, stash, maxima, ticket, masses)
    with fixed_precision(hidden, dtype):
        grads = backward(head, kept, upstream, weight.shape[0], Needs(*needs))
    return without_none(grads, hidden)


@head_logps_backward.register_fake
def _(
    grad_logps: Tensor | None,
    grad_sums: Tensor | None,
    grad_entropies: Tensor | None,
    hidden: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return empty_gradients((hidden, *rest[:4]), rest[-1])


def without_none(grads: Gradients, hidden: Tensor) -> FiveTensors:
    """The gradients as an op returns them: an empty tensor where there is none."""
    found = [hidden.new_empty(0) if grad is None else grad for grad in grads]
    return found[0], found[1], found[2], found[3], found[4]


def empty_gradients(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> FiveTensors:
    """Gradients of the five tensors of `HeadTensors` without values, as a compiler sees them."""
    hidden = tensors[0]
    assert hidden is not None

    def empty(name: str, value: Tensor | None, need: bool) -> Tensor:
        if value is None or not need:
            return hidden.new_empty(0)
        # The weights' gradients are contiguous, whatever the strides of the weights.
        rows = name in ("hidden", "low_hidden")
        return torch.empty_like(value) if rows else value.new_empty(value.shape)

    found = [empty(*each) for each in zip(Needs._fields, tensors, needs, strict=True)]
    return found[0], found[1], found[2], found[3], found[4]


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


refuse_double_backward(head_logps_backward, "sequence_logps and token_logps")
