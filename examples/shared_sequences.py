"""A loop whose ranks share sequences: two batches at a time, each spread over half of the ranks.

    torchrun --nproc-per-node 4 examples/shared_sequences.py  # on CPUs, or on 4 GPUs

Each rank has a part of every sequence's tokens. Attention must see all of them: here each rank
gathers keys and values, which is short and runs anywhere; where sequences are long, Ulysses or ring
attention take its place (`fused_prefopt.integrations.sequence_attention`). All that the loss takes
is the group, and labels that were shifted before the cut.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

import fused_prefopt as fp
from fused_prefopt import data
from fused_prefopt.distributed import gather_with_gradient
from fused_prefopt.integrations.transformers import attach, past_wrappers

VOCAB, PAIRS = 64, 4
# Balanced, as ring attention wants it. Any order will do, if model and labels have the same.
ORDER = "balanced"


def main() -> None:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group()
    losses = train(steps=20, device=device)
    if dist.get_rank() == 0:
        print("\n".join(f"step {step + 1}: {loss:.4f}" for step, loss in enumerate(losses)))
    dist.destroy_process_group()


def train(steps: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[float]:
    """The loss of each step, a mean over the batches of all ranks."""
    mesh = init_device_mesh(device.type, (2, dist.get_world_size() // 2), mesh_dim_names=("d", "s"))
    batches, shards = mesh["d"], mesh["s"]
    share_attention("gathered", shards.get_group())
    model = untrained("gathered").to(device, dtype)
    # γ-SimPO remembers margins: `process_group` says whose pairs differ, so that each counts once.
    loss_fn = fp.PreferenceLoss("gamma-simpo")
    loss_fn.process_group = batches.get_group()
    attachment = attach(model, loss_fn)
    attachment.sequence_group = shards.get_group()
    # Over all ranks: their mean is the gradient of the mean loss, no factor belongs anywhere.
    wrapped = DistributedDataParallel(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    collator, losses = data.PairCollator(pad_token_id=0), []
    for step in range(steps):
        batch = collator(pairs(2 * step + batches.get_local_rank()))
        shard = data.shard_of(batch, shards.get_local_rank(), shards.size(), order=ORDER)
        loss = wrapped(**past_wrappers(placed(shard, device)))["loss"]
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        mean = loss.detach() / batches.size()
        dist.all_reduce(mean, group=batches.get_group())
        losses.append(mean.item())
    return losses


def share_attention(name: str, group: dist.ProcessGroup) -> None:
    """Register an `attn_implementation` whose tokens see those of all ranks of a group."""

    def gathered(values: Tensor, dim: int) -> Tensor:
        every = gather_with_gradient(values.contiguous(), group)
        return torch.cat(every.chunk(dist.get_world_size(group)), dim)

    def attention(
        _: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any
    ) -> tuple[Tensor, None]:
        """Heads (S, H, T, d) → (S, T, H, d), each token seeing itself and those before it."""
        own = options["position_ids"]
        earlier = gathered(own, 1)[:, None, None] <= own[:, None, :, None]
        keys, values = gathered(key, 2), gathered(value, 2)
        out = F.scaled_dot_product_attention(query, keys, values, earlier, enable_gqa=True)
        return out.transpose(1, 2), None

    AttentionInterface.register(name, attention)


def untrained(attention: str) -> LlamaForCausalLM:
    """A small Llama, the same on every rank."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config)


def pairs(seed: int) -> list[dict[str, list[int]]]:
    """Prompts of numbers, and how to go on: by counting up, not down."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for start, size in torch.randint(8, 24, (PAIRS, 2), generator=draw).tolist():
        up = list(range(start, start + size))
        rows.append({"prompt_ids": up, "chosen_ids": [up[-1] + 1], "rejected_ids": up[::-1][:3]})
    return rows


def placed(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on a device."""
    return {k: each.to(device) if isinstance(each, Tensor) else each for k, each in batch.items()}


if __name__ == "__main__":
    main()
