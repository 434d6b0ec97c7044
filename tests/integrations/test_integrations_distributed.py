"""Two processes under DDP and FSDP2 against one process with the whole batch, in float64."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import pair_features, tiny_llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_prefopt as fp
from fused_prefopt.data import PairCollator
from fused_prefopt.integrations.transformers import attach

peft = pytest.importorskip("peft")
PAIRS = 8
# The pool takes all of the past: a sample would depend on the order of the ranks in the queue.
LOSSES = {"simpo": {}, "gamma-simpo": {"queue_size": 16, "sample_size": 16}}


def features(rank: int | None) -> list[dict]:
    """All pairs, or a rank's half; padded alike, so that nothing but the split differs."""
    every = pair_features(PAIRS)
    return every if rank is None else every[rank::2]


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(*units: str | tuple[str, ...]) -> Callable[[nn.Module], nn.Module]:
    """Shard these submodules as units of their own, a tuple as one together, then the root."""

    def shard(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (2,))
        for unit in units:
            if isinstance(unit, str):
                fully_shard(model.get_submodule(unit), mesh=mesh)
            else:
                # As accelerate does with the last layers.
                tail = [model.get_submodule(name) for name in unit]
                fully_shard(tail, mesh=mesh, reshard_after_forward=False)
        fully_shard(model, mesh=mesh)
        return model

    return shard


ENGINES = {
    "ddp": ddp,
    "fsdp, head in the root": fsdp("model.layers.0", "model.layers.1"),
    "fsdp, head of its own": fsdp("model.layers.0", "lm_head"),
    "fsdp, frozen body": fsdp("lm_head"),
    "fsdp, norm and head": fsdp("model.layers.0", ("model.norm", "lm_head")),
    "fsdp, tied": fsdp("model.layers.0", ("model.norm", "model.embed_tokens", "lm_head")),
}


def step(model: nn.Module, wrapped: nn.Module, name: str, rank: int | None, **options: str) -> dict:
    """Loss, metrics and all gradients of two steps without an update."""
    attachment = attach(model, fp.PreferenceLoss(name, **LOSSES.get(name, {})), **options)
    batch = PairCollator(0)(features(rank))
    for _ in range(2):
        wrapped.zero_grad()
        loss = wrapped(**batch)["loss"]
        loss.backward()
    gradients = {}
    for key, value in model.named_parameters():
        if value.grad is not None:
            grad = value.grad
            gradients[key] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return {"loss": loss.detach(), "metrics": attachment.pop_metrics("train"), **gradients}


def build(engine: str) -> nn.Module:
    model = tiny_llama(tie_word_embeddings=engine == "fsdp, tied").double()
    if engine == "fsdp, frozen body":
        for key, value in model.named_parameters():
            value.requires_grad_("lm_head" in key)
    return model


def adapted() -> nn.Module:
    """A model with an adapter whose terms are not zero."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    torch.manual_seed(3)
    return peft.get_peft_model(tiny_llama(), config).double()


BODY = "base_model.model.model"
HEAD = "base_model.model.lm_head"


# The policy without its adapter is the reference, in a pass of its own inside the forward.
ADAPTED = {
    "ddp": ddp,
    "fsdp, head of its own": fsdp(f"{BODY}.layers.0", HEAD),
    "fsdp, norm and head": fsdp(f"{BODY}.layers.0", (f"{BODY}.norm", HEAD)),
}
BESIDE = ("dpo", "tdpo1")


def _work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    results = {}
    for engine, wrap in ENGINES.items():
        for name in LOSSES:
            model = build(engine)
            wrapped = wrap(model)
            results[engine, name] = step(model, wrapped, name, rank)
    for engine, wrap in ADAPTED.items():
        for name in BESIDE:
            model = adapted()
            results[engine, name] = step(model, wrap(model), name, rank, reference="adapter")
    torch.save(results, f"{folder}/{rank}.pt")
    # A DDP model that outlives its process group may wait for the other rank for ever.
    del model, wrapped
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_equal_one(ranks, engine, name):
    model = build(engine)
    require_same(ranks, step(model, model, name, None), (engine, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("engine", ADAPTED)
def test_a_policy_is_its_own_reference_on_two_processes(ranks, engine, name):
    model = adapted()
    require_same(ranks, step(model, model, name, None, reference="adapter"), (engine, name))


def require_same(ranks: list[dict], whole: dict, key: tuple[str, str]) -> None:
    """The two ranks' step is that of one process with the whole batch."""
    first, second = (rank[key] for rank in ranks)
    assert first["metrics"] == second["metrics"]
    for key, value in whole["metrics"].items():
        assert first["metrics"][key] == pytest.approx(value, rel=1e-9, abs=1e-9), key
    mean = (first["loss"] + second["loss"]) / 2
    torch.testing.assert_close(mean, whole["loss"], rtol=1e-9, atol=0)
    gradients = whole.keys() - {"loss", "metrics"}
    assert gradients == first.keys() - {"loss", "metrics"}
    assert any("lm_head" in name or "embed_tokens" in name for name in gradients)
    for key in gradients:
        for rank in (first, second):
            distance = (rank[key] - whole[key]).norm()
            assert distance <= 1e-9 * whole[key].norm(), (key, distance)
