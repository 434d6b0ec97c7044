"""Attention over tokens that ranks share, on any device: each has the keys and values of all.

What Ulysses and ring attention compute on GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface

from fused_prefopt.data import token_places


class _Gather(torch.autograd.Function):
    """(…) → (ranks, …); the gradient of a rank's part is what all ranks have for it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, values, group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


def gathered_attention(name: str, group: dist.ProcessGroup, order: str) -> str:
    """Register an `attn_implementation` for models whose batches are shards; returns its name.

    Args:
        name: of it.
        group: ranks that share the sequences.
        order: of `shard_of`.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        position_ids: Tensor,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """(S, heads, T, d) → (S, T, heads, d), a token seeing those before it in its sequence."""
        assert attention_mask is None, "a shard's mask is of its own tokens alone"
        length = query.shape[2] * ranks
        own = token_places(length, rank, ranks, order)
        every = torch.cat([token_places(length, each, ranks, order) for each in range(ranks)])
        back = every.argsort()
        # Of grouped queries each has its keys.
        shared = query.shape[1] // key.shape[1]
        both = _Gather.apply(torch.stack((key, value)).repeat_interleave(shared, 2), group)
        keys, values = torch.cat(both.unbind(), 3)[..., back, :]
        positions = torch.cat(_Gather.apply(position_ids.contiguous(), group).unbind(), 1)[:, back]
        sequences = (positions == 0).cumsum(1)
        assert torch.equal(positions[:, own], position_ids)
        together = sequences[:, own, None] == sequences[:, None]
        seen = (together & (own[:, None] >= torch.arange(length)))[:, None]
        scores = (query @ keys.mT * scaling).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ values).transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attention)
    return name
