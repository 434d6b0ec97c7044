"""Trainers of a model whose weights two ranks share (`tp_plan`) against one process."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from processes import forked
from tiny_models import pair_features, tiny_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from trainers import TIMES, build, state_of

import fused_prefopt as fp
from fused_prefopt.data import PairCollator
from fused_prefopt.integrations.transformers import attach, past_wrappers

ParallelismConfig = pytest.importorskip("accelerate.parallelism_config").ParallelismConfig
DistributedConfig = pytest.importorskip("transformers.distributed").DistributedConfig
pytest.importorskip("trl")
pytestmark = pytest.mark.slow

# Kind of trainer, and what a run is given, where a model comes from a number by `load`.
CASES: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "statistics": (
        "transformers",
        lambda load: {
            "loss": "alpha-dpo",
            "reference": load(5),
            "log_tokens": True,
            "given": {"eval_dataset": pair_features(6, seed=3)},
        },
    ),
    "both heads": ("transformers", lambda load: {"loss": "tdpo2", "reference": load(5)}),
    "queue": (
        "dpo",
        lambda load: {"loss": "gamma-simpo", "loss_kwargs": {"queue_size": 16, "sample_size": 16}},
    ),
    "cached": (
        "dpo",
        lambda load: {"loss": "dpo", "reference": load(5), "precompute_ref_log_probs": True},
    ),
    "coupled": ("dpo", lambda load: {"loss": "beta-dpo", "reference": load(5)}),
}


def saved(folder: Path, seed: int) -> str:
    return f"{folder}/model-{seed}"


def trained(case: str, folder: Path, load: Callable[[int], Any], **options: Any) -> dict[str, Any]:
    """State and logs of a run of two steps, and what it says of a data set that is kept apart."""
    kind, make = CASES[case]
    options |= {"max_steps": 2, "optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.5}
    options |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    trainer = build(
        kind,
        folder / f"{case}-{dist.is_initialized()}",
        None,
        model=load(0),
        **make(load),
        **options,
    )
    trainer.train()
    rows = [*trainer.state.log_history, trainer.evaluate() if trainer.eval_dataset else {}]
    state = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in state_of(trainer).items()
    }
    return {"state": state, "rows": rows}


def _work(rank: int, folder: Path) -> dict[str, Any]:
    where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= where | {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    # It wants FSDP2 or a device, as which accelerate takes no process on a CPU.
    ParallelismConfig._validate_accelerator = lambda *_: None

    def load(seed: int) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            saved(folder, seed),
            dtype=torch.float64,
            distributed_config=DistributedConfig(tp_plan="auto"),
        )

    assert len(load(0).lm_head.weight.to_local()) in (30, 31)
    found = {case: trained(case, folder, load, ddp_backend="gloo") for case in CASES}
    model = tiny_llama()
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model.lm_head, mesh, ColwiseParallel(output_layouts=Replicate()))
    attach(model, fp.PreferenceLoss("simpo"))
    with pytest.raises(ValueError) as error:
        model(**past_wrappers(PairCollator(0)(pair_features(2))))
    return found | {"refused": str(error.value)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("models")
    for seed in (0, 5):
        tiny_llama(seed).double().save_pretrained(saved(found, seed))
    return found


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return forked(functools.partial(_work, folder=folder), 2, folder)


def test_a_head_that_only_gives_logits_is_refused_by_name(ranks):
    for found in ranks:
        assert "model: got a head of `parallelize_module`" in found["refused"]


@pytest.mark.parametrize("case", CASES)
def test_ranks_that_share_weights_train_as_one_process(ranks, folder, case):
    wanted = trained(case, folder, lambda seed: tiny_llama(seed).double())
    for found in (rank[case] for rank in ranks):
        assert found["state"].keys() == wanted["state"].keys()
        for name, value in wanted["state"].items():
            torch.testing.assert_close(found["state"][name], value, rtol=1e-9, atol=1e-12)
        assert len(found["rows"]) == len(wanted["rows"])
        for one, other in zip(wanted["rows"], found["rows"], strict=True):
            assert one.keys() == other.keys()
            for name in one.keys() - TIMES:
                # A trainer keeps its loss in fp32.
                assert other[name] == pytest.approx(one[name], rel=1e-6, abs=1e-9), name
