"""Trainers under DeepSpeed's Ulysses (accelerate's `sp_size`) and ZeRO against one process.

Two processes that share sequences, in the environment that has DeepSpeed.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import forked
from tiny_models import pair_features, tiny_llama
from trainers import TIMES, assert_bit_equal, build, in_order, lora, pairs, points

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

BATCH = 4
# Stage of ZeRO, kind of trainer, its options. DeepSpeed computes nothing in float64.
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    # Its layers run again in the backward pass.
    "all, statistics": (
        2,
        "transformers",
        {"loss": "alpha-dpo", "log_tokens": True, "gradient_checkpointing": True},
    ),
    "partitioned": (3, "transformers", {"loss": "simpo", "gradient_accumulation_steps": 2}),
    "reference": (3, "dpo", {"loss": "dpo"}),
    "adapter": (2, "transformers", {"loss": "tdpo1", "reference": "adapter"}),
    "mismatched": (1, "kto", {"train_sampling_strategy": "sequential"}),
    "cached": (2, "transformers", {"loss": "dpo"}),
}
GROUPED = ("all, statistics", "partitioned")
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
    sdpa: dict[str, Any] = {"attn_implementation": "sdpa"}
    # Of grouped keys there are fewer heads than ranks.
    model = tiny_llama(**sdpa, num_key_value_heads=1 if case in GROUPED else None)
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


def _work(rank: int, folder: Path, case: str, resume: bool) -> dict[str, Any]:
    import deepspeed

    where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    where |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "DS_ACCELERATOR": "cpu"}
    os.environ |= where
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    return trained(case, folder, 2, resume)


def on_two(folder: Path, case: str, resume: bool = False) -> list[dict[str, Any]]:
    """Each rank's run. A process has DeepSpeed's groups once, so these are new ones."""
    left = folder / ("resumed" if resume else "ranks")
    left.mkdir()
    return forked(partial(_work, folder=folder, case=case, resume=resume), 2, left)


@pytest.mark.parametrize("case", CASES)
def test_ranks_that_share_sequences_train_as_one_process(case, tmp_path):
    wanted = trained(case, tmp_path, 1)
    for found in on_two(tmp_path, case):
        assert len(found["log"]) == len(wanted["log"])
        for one, other in zip(wanted["log"], found["log"], strict=True):
            assert one.keys() == other.keys()
            for name in one.keys() - TIMES:
                # Not clipped, the norm tells how large the gradients are.
                assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), name
        for part in ("weights", "state"):
            assert found[part].keys() == wanted[part].keys()
            for name, value in wanted[part].items():
                torch.testing.assert_close(found[part][name], value, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_is_bit_equal(tmp_path):
    # It resumes within an epoch: batches are passed over.
    whole = on_two(tmp_path, "all, statistics")
    rest = on_two(tmp_path, "all, statistics", resume=True)
    for one, other in zip(whole, rest, strict=True):
        for part in ("weights", "state"):
            assert_bit_equal(other[part], one[part], part)
        assert float(one["state"]["statistics.weight"]) > 0
