"""Kernels of attention that torch's ring knows, on a CPU: in eager torch, as those of CUDA answer.

Without them the ring itself, its order, its exchanges and its gradients, runs on GPUs alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Log-sum-exps of so many tokens at once are what the memory-efficient kernel gives.
_BLOCK = 32
_LIBRARY = torch.library.Library("aten", "IMPL")


@contextmanager
def ring_kernels(name: str) -> Iterator[None]:
    """`scaled_dot_product_attention` by one kernel, where it is called through its module.

    Args:
        name: "flash", what half precision gets, or "efficient", what fp32 gets.
    """
    own = F.scaled_dot_product_attention

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        assert attn_mask is None, "neither kernel goes round with a mask"
        given = query, key, value
        if name == "flash":
            op = torch.ops.aten._scaled_dot_product_flash_attention
            return op(*given, dropout_p, is_causal, scale=scale)[0]
        assert not enable_gqa, "the memory-efficient kernel has no grouped keys"
        op = torch.ops.aten._scaled_dot_product_efficient_attention
        trains = torch.is_grad_enabled() and any(each.requires_grad for each in given)
        return op(*given, None, trains, dropout_p, is_causal, scale=scale)[0]

    F.scaled_dot_product_attention = scaled_dot_product_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, float]:
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scale
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores, scale


def _attention(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    scores, _ = _scores(query, key, causal, scale)
    values = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    return scores.softmax(-1) @ values, scores.logsumexp(-1).float()


def _gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, ...]:
    """Of query, key and value, from statistics of whole rows as FlashAttention takes them."""
    scores, scale = _scores(query, key, causal, scale)
    shared = query.shape[1] // key.shape[1]
    values = value.repeat_interleave(shared, 1)
    probs = (scores - logsumexp[..., None]).exp()
    of_scores = probs * (grad @ values.mT - (grad * out).sum(-1, keepdim=True))
    of_query = of_scores @ key.repeat_interleave(shared, 1) * scale
    of_key, of_value = of_scores.mT @ query * scale, probs.mT @ grad
    grouped = (each.unflatten(1, (-1, shared)).sum(2) for each in (of_key, of_value))
    return of_query, *grouped


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    out, logsumexp = _attention(query, key, value, is_causal, scale)
    seeds = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    nothing = torch.empty(())
    return out, logsumexp, None, None, query.shape[2], key.shape[2], *seeds, nothing


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Any,
    cum_seq_k: Any,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    return _gradients(grad_out, query, key, value, out, logsumexp, is_causal, scale)


def _efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    out, logsumexp = _attention(query, key, value, is_causal, scale)
    filling = -query.shape[2] % _BLOCK if compute_log_sumexp else -query.shape[2]
    seed = torch.zeros((), dtype=torch.int64)
    return out, F.pad(logsumexp, (0, filling), value=torch.inf), seed, seed.clone()


def _efficient_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    dropout_p: float,
    grad_input_mask: list[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor | None, ...]:
    rows = logsumexp[..., : query.shape[2]]
    return *_gradients(grad_out, query, key, value, out, rows, is_causal, scale), None


for _name, _kernel in {
    "flash_attention": _flash,
    "flash_attention_backward": _flash_backward,
    "efficient_attention": _efficient,
    "efficient_attention_backward": _efficient_backward,
}.items():
    _LIBRARY.impl(f"_scaled_dot_product_{_name}", _kernel, "CPU")
