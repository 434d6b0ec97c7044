"""transformers' own tensor parallelism on two processes against one process."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import pair_features, tiny_llama
from torch import nn

import fused_prefopt as fp
from fused_prefopt.data import PairCollator
from fused_prefopt.integrations.transformers import preference_outputs

transformers = pytest.importorskip("transformers")


def step(model: nn.Module) -> dict[str, torch.Tensor]:
    """The loss of a batch and the gradient of every parameter."""
    batch = PairCollator(0)(pair_features(6))
    loss = preference_outputs(model, fp.PreferenceLoss("simpo"), batch).loss
    loss.backward()
    found = {"loss": loss.detach()}
    for name, value in model.named_parameters():
        grad = value.grad
        found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def _work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= where | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo")
    config = transformers.distributed.DistributedConfig(tp_plan="auto")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        f"{folder}/model", distributed_config=config
    )
    assert len(model.lm_head.weight.to_local()) in (30, 31)
    torch.save(step(model), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_model_has_the_gradients_of_one_process(tmp_path):
    if not hasattr(transformers, "distributed"):
        pytest.skip("this transformers has no DistributedConfig")
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # distributions that are not flat
    model.save_pretrained(tmp_path / "model")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    mp.spawn(_work, args=(port, str(tmp_path)), nprocs=2)
    whole = step(model)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == whole.keys()
        for name, value in whole.items():
            assert (found[name] - value).norm() <= 1e-5 * value.norm(), name
