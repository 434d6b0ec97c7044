"""DeepSpeed's ZeRO-3 on two processes against one process with the whole batch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import pair_features, tiny_llama
from torch import nn
from trainers import lora

import fused_prefopt as fp
from fused_prefopt.data import PairCollator
from fused_prefopt.integrations.transformers import attach, past_wrappers

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "zero_allow_untested_optimizer": True,
    # No parameter is too small to be partitioned.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def build(case: str) -> nn.Module:
    model = tiny_llama()
    if case == "frozen body":
        for name, value in model.named_parameters():
            value.requires_grad_("lm_head" in name)
    if case == "adapter on the head":
        model = lora(1, target_modules=["q_proj", "lm_head"], lora_dropout=0.0)
    attach(model, fp.PreferenceLoss("simpo"))
    return model


CASES = ("all", "frozen body", "adapter on the head")


def batch_of(rank: int | None) -> dict:
    every = pair_features(8)
    return PairCollator(0)(every if rank is None else every[rank::2])


def _work(rank: int, folder: str) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    results = {}
    for case in CASES:
        model = build(case)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
        partitioned = all(value.numel() == 0 for value in model.parameters())
        loss = engine(**past_wrappers(batch_of(rank)))["loss"]
        engine.backward(loss)
        gradients = {
            name: safe_get_full_grad(value)
            for name, value in model.named_parameters()
            if value.requires_grad
        }
        results[case] = {"loss": loss.detach(), "partitioned": partitioned, "gradients": gradients}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(ranks, case):
    model = build(case)
    whole = model(**batch_of(None))["loss"]
    whole.backward()
    first, second = (rank[case] for rank in ranks)
    assert first["partitioned"] and second["partitioned"]
    mean = (first["loss"] + second["loss"]) / 2
    torch.testing.assert_close(mean, whole.detach(), rtol=1e-5, atol=0)
    wanted = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert first["gradients"].keys() == wanted.keys() and wanted
    for name, gradient in wanted.items():
        distance = (first["gradients"][name] - gradient).norm()
        assert distance <= 1e-5 * gradient.norm(), (name, distance)
