"""Trainers under DeepSpeed's Ulysses (accelerate's `sp_size`) and ZeRO against one process.

Two processes that share sequences, in the environment that has DeepSpeed.
"""

from __future__ import annotations

import gc
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import pair_features, tiny_llama
from trainers import build, in_order, lora, pairs, points

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

BATCH = 4
# Stage of ZeRO, kind of trainer, its options. DeepSpeed computes nothing in float64.
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "all, statistics": (2, "transformers", {"loss": "alpha-dpo", "log_tokens": True}),
    "partitioned": (3, "transformers", {"loss": "simpo", "gradient_accumulation_steps": 2}),
    "reference": (1, "dpo", {"loss": "dpo"}),
    "adapter": (2, "transformers", {"loss": "tdpo1", "reference": "adapter"}),
    "mismatched": (2, "kto", {"train_sampling_strategy": "sequential"}),
    "cached": (2, "transformers", {"loss": "dpo"}),
}
STEPS = 4


def trained(case: str, folder: Path, world: int, resume: bool = False) -> dict[str, Any]:
    stage, kind, own = CASES[case]
    options = {"optim": "sgd", "learning_rate": 1e-2, "max_steps": STEPS} | own
    options |= {"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH}
    options |= {"save_strategy": "steps", "save_steps": STEPS // 2}
    given: dict[str, Any] = {}
    if world > 1:
        from accelerate import ParallelismConfig
        from accelerate.utils import DeepSpeedSequenceParallelConfig

        zero: dict[str, Any] = {"stage": stage}
        if stage == 3:
            zero["stage3_param_persistence_threshold"] = 0
        config = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
        config |= {"zero_allow_untested_optimizer": True, "zero_optimization": zero}
        config |= {"gradient_clipping": "auto"}
        options |= {"deepspeed": config, "ddp_backend": "gloo"}
        attention = DeepSpeedSequenceParallelConfig(sp_attn_implementation="sdpa")
        options["parallelism_config"] = ParallelismConfig(sp_size=world, sp_handler=attention)
    sdpa = {"attn_implementation": "sdpa"}
    model = tiny_llama(**sdpa)
    if own.get("reference") == "adapter":
        model = lora(3, target_modules=["q_proj", "lm_head"], lora_dropout=0.0)
    elif kind != "transformers" or own["loss"] != "simpo":
        options["reference"] = tiny_llama(5, **sdpa)
    if kind == "transformers":
        data, given = pair_features(18), {"eval_dataset": pair_features(9, seed=3)}
    else:
        data = pairs(18) if kind == "dpo" else points(18, label=[True, False, False] * 6)
    if case == "cached":
        given["reference_cache"] = str(folder / f"cache-{world}")
    run = build(kind, folder / f"out-{world}", data, model=model, given=given, **options)
    if kind != "kto":
        run = in_order(run)
    checkpoint = str(folder / f"out-{world}" / f"checkpoint-{STEPS // 2}") if resume else None
    run.train(resume_from_checkpoint=checkpoint)
    if given:
        run.evaluate()
    return {
        "log": run.state.log_history,
        "weights": weights_of(run.model),
        "state": dict(run.attachment.loss_fn.state_dict()),
    }


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    values = dict(model.named_parameters())
    if not any(hasattr(value, "ds_id") for value in values.values()):
        return {name: value.detach().clone() for name, value in values.items()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(values.values())):
        return {name: value.detach().clone() for name, value in values.items()}


def _work(rank: int, port: int, folder: str, case: str, resume: bool) -> None:
    torch.set_num_threads(1)
    gc.freeze()
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, timeout=timedelta(minutes=2))
    torch.save(trained(case, Path(folder), 2, resume), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
