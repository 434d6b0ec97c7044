"""Attention over ranks that runs on a CPU: every rank gathers all keys, values and places.

torch's ring attention has CUDA kernels alone. This stands in its place under transformers' name
for `sdpa`: accelerate's and torch's context managers, and the cut that they make, stay the real.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.distributed.nn.functional import all_reduce
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def gathered(values: torch.Tensor, group: Any) -> torch.Tensor:
    """Every rank's (S, heads, T, size) behind one another, differentiable on gloo."""
    places = [torch.zeros_like(values) for _ in range(dist.get_world_size(group))]
    places[dist.get_rank(group)] = values
    return all_reduce(torch.cat(places, 2), group=group)


def attend_over_ranks() -> None:
    """From now on let models with `sdpa` attend over accelerate's `cp` ranks, by position_ids."""

    def attend(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **options: Any
    ) -> tuple[torch.Tensor, None]:
        # As accelerate's hooks leave them.
        assert mask is None and options["is_causal"]
        group = AcceleratorState().device_mesh["cp"].get_group()
        own = options["position_ids"].expand(len(query), -1)
        every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, own.contiguous(), group=group)
        key, value = gathered(key, group), gathered(value, group)
        groups = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
        seen = own[:, None, :, None] >= torch.cat(every, 1)[:, None, None, :]
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
