"""The public op on two models: KL divergence per sequence, and both log-probs, in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_prefopt.checks import require_device, require_floating, require_shape
from fused_prefopt.ops.call import (
    LogpOptions,
    head_tensors,
    read_call,
    read_head,
    refuse_forward_mode,
)
from fused_prefopt.ops.registered_kl import head_kl
from fused_prefopt.ops.vocab_shard import local_part
from fused_prefopt.types import AnyHead, LMHead


@dataclass(frozen=True)
class SequenceKl:
    """How far a policy is from its reference on each sequence, as `sequence_kl` returns it.

    Attributes:
        kl: (S,) fp32 (float64 for float64 inputs) ``Σ_t KL(reference || policy)`` over the labelled
            tokens, in nats, differentiable; 0 for a sequence without labels.
        policy: (S,) summed log-probs of the labels under the policy, in nats, differentiable.
        reference: (S,) the same under the reference, a constant.
        lengths: (S,) int64, number of labelled tokens.
    """

    kl: Tensor
    policy: Tensor
    reference: Tensor
    lengths: Tensor


def sequence_kl(
    hidden: Tensor,
    head: AnyHead,
    ref_hidden: Tensor,
    ref_head: AnyHead,
    labels: Tensor,
    *,
    shift: bool = True,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    num_labels: int | None = None,
    ignore_index: int = -100,
    workspace_mb: float | None = None,
    engine: str = "auto",
) -> SequenceKl:
    """KL divergence of a policy from its reference over the labelled tokens of each sequence.

    ``kl[s] = Σ_t Σ_v q_tv (log q_tv − log p_tv)`` with the reference's probabilities q and the
    policy's p at the rows that carry a label. Both heads' logits are built tile by tile and never
    kept: no (tokens, vocabulary) tensor, two matmuls forward, and four backward, whatever the
    workspace. Differentiable once with respect to the policy's hidden, weight and bias, through
    `kl` and through `policy`; the reference is a constant.

    Both heads compute in the dtype of `hidden`, or autocast's; they may differ in hidden size,
    bias, softcap, scale, temperature and low-rank terms, not in vocabulary.

    Args:
        hidden: (S, T, D) last hidden states of the policy, or packed (N, D).
        head: the policy's LM head, or its bare weight (V, D).
        ref_hidden: (S, T, D') or (N, D') of the reference.
        ref_head: the reference's LM head, or its bare weight (V, D').
        labels: (S, T) or (N,) integer token ids, `ignore_index` where there is no label.
        shift, sequence_ids, num_sequences, num_labels, ignore_index: as in `sequence_logps`.
        workspace_mb: budget in MiB for everything but statistics and gradients.
        engine: `auto`, `torch`, `cublas` or `triton`, as in `sequence_logps`; the last two are one
            here: the library's matmuls, and one Triton kernel for each pass over both logits.

    Returns:
        kl, policy, reference and lengths, each (S,).

    Raises:
        ValueError: an argument's shape, dtype, device or value is wrong; the two vocabularies
            differ; a head is sharded over ranks; a label is outside the vocabulary (a device-side
            assert on CUDA).

    Source: TDPO (Zeng et al. 2024, arXiv:2404.11999), eq. 12.
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
    head = read_head(head)
    call = read_call(hidden, head, labels, options)
    reference = _reference(hidden, ref_hidden, ref_head, head.vocab)
    if call.shard.group:
        raise ValueError("head: sequence_kl takes whole heads, got one sharded over ranks")
    with torch.no_grad():
        others = head_tensors(ref_hidden, reference)
        refuse_forward_mode(others)
        others = others.detached()
    scalars = [
        value
        for side in (call.math, reference)
        for value in (side.softcap or 0.0, side.logit_scale, side.temperature)
    ]
    rows = labels.numel() if call.count < 0 else call.count
    outputs = call.checked(
        head_kl(
            *call.tensors,
            *others,
            call.layout.targets,
            call.layout.sequence_ids,
            call.layout.num_sequences,
            ignore_index,
            call.count,
            call.vocab,
            scalars,
            call.math.dtype,
            call.engine,
            call.workspace(workspace_mb, rows, False),
        )
    )
    return SequenceKl(*outputs[:4])


def _reference(hidden: Tensor, ref_hidden: Tensor, ref_head: AnyHead, vocab: int) -> LMHead:
    """The reference's head on this rank, checked against the policy's."""
    head = read_head(ref_head, "ref_head")
    if head.vocab != vocab:
        raise ValueError(
            f"ref_head: got {head.vocab} vocabulary entries, wanted the {vocab} of `head`"
        )
    head, shard = local_part(head)
    if shard.group:
        raise ValueError("ref_head: sequence_kl takes whole heads, got one sharded over ranks")
    require_floating("ref_hidden", ref_hidden)
    require_shape("ref_hidden", ref_hidden, (*hidden.shape[:-1], head.weight.shape[1]))
    require_device("ref_hidden", ref_hidden, hidden.device)
    require_device("ref_head", head.weight, hidden.device)
    return head
