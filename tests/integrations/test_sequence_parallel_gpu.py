"""On two GPUs: torch's ring attention under FSDP2 (accelerate's `cp_size`) against one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import pair_features, tiny_llama
from trainers import TIMES, build, in_order, spawned

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
# The kernels of torch's ring have no float64.
TOLERANCE = 1e-4


def trained(folder: Path, ranks: int) -> dict[str, Any]:
    """Logs and weights of a run whose sequences are shared by so many ranks."""
    from accelerate import ParallelismConfig

    options: dict[str, Any] = {"use_cpu": False, "optim": "sgd", "learning_rate": 1e-2}
    options |= {"max_steps": 3, "loss": "alpha-dpo", "log_tokens": True}
    if ranks > 1:
        units = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
        options |= {"fsdp": True, "fsdp_config": units, "ddp_backend": "nccl"}
        options["parallelism_config"] = ParallelismConfig(cp_size=ranks)
    sdpa = {"attn_implementation": "sdpa"}
    options |= {"model": tiny_llama(**sdpa), "reference": tiny_llama(5, **sdpa)}
    given = {"eval_dataset": pair_features(8, seed=3)}
    run = in_order(build("transformers", folder, pair_features(16), given=given, **options))
    run.train()
    run.evaluate()
    weights = {}
    for name, value in run.model.named_parameters():
        value = value.detach()
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        weights[name] = whole.cpu()
    return {"log": run.state.log_history, "weights": weights}


def _work(rank: int, port: int, folder: str) -> None:
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= where | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.cuda.set_device(rank)
    torch.save(trained(Path(folder) / "out", 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ring_attention_trains_as_one_process(tmp_path, monkeypatch):
    found = spawned(_work, tmp_path)
    # One process would spread batches over all the GPUs that it sees.
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 1)
    wanted = trained(tmp_path / "one", 1)
    for each in found:
        assert len(each["log"]) == len(wanted["log"])
        for one, other in zip(wanted["log"], each["log"], strict=True):
            assert one.keys() == other.keys()
            for name in one.keys() - TIMES:
                assert other[name] == pytest.approx(one[name], rel=TOLERANCE, abs=TOLERANCE), name
        for name, value in wanted["weights"].items():
            torch.testing.assert_close(each["weights"][name], value, rtol=TOLERANCE, atol=TOLERANCE)
