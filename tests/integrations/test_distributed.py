"""Two processes against one with the whole batch: DDP, FSDP2, tensor parallelism, trainers.

All of it in one pair of processes, and so in one file: most of the time is theirs to start. Each
section has a process group of its own, so that what breaks in one leaves the others alone.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from tiny_models import list_features, pair_features, point_features, tiny_llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from trainers import (
    OF_TRL,
    TEXT,
    TIMES,
    assert_bit_equal,
    build,
    dataset,
    in_order,
    let_gradients_be_finite,
    lora,
    pairs,
    points,
    spawned,
    spoil_losses,
    state_of,
)

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.integrations import nonfinite
from fused_prefopt.integrations.transformers import attach, past_wrappers, preference_outputs
from fused_prefopt.models.model_call import exact_loss
from fused_prefopt.reference import add_reference_logps

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow

PAIRS = 8
HALF = torch.bfloat16
# The pool takes all of the past: a sample would depend on the order of the ranks in the queue.
LOSSES = {"simpo": {}, "gamma-simpo": {"queue_size": 16, "sample_size": 16}}
Wrap = Callable[[nn.Module], nn.Module]


def features(rank: int | None) -> list[dict]:
    """All pairs, or a rank's half; padded alike, so that nothing but the split differs."""
    every = pair_features(PAIRS)
    return every if rank is None else every[rank::2]


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(*units: str | tuple[str, ...], policy: MixedPrecisionPolicy | None = None) -> Wrap:
    """Shard these submodules as units of their own, a tuple as one together, then the root."""
    mixed = {} if policy is None else {"mp_policy": policy}

    def shard(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (2,))
        for unit in units:
            if isinstance(unit, str):
                fully_shard(model.get_submodule(unit), mesh=mesh, **mixed)
            else:
                # As accelerate does with the last layers.
                tail = [model.get_submodule(name) for name in unit]
                fully_shard(tail, mesh=mesh, reshard_after_forward=False, **mixed)
        return fully_shard(model, mesh=mesh, **mixed)

    return shard


BODY, HEAD = "base_model.model.model", "base_model.model.lm_head"
TIED = ("model.layers.0", ("model.norm", "model.embed_tokens", "lm_head"))
ENGINES: dict[str, Wrap] = {
    "ddp": ddp,
    "fsdp, head in the root": fsdp("model.layers.0", "model.layers.1"),
    "fsdp, head of its own": fsdp("model.layers.0", "lm_head"),
    "fsdp, frozen body": fsdp("lm_head"),
    "fsdp, norm and head": fsdp("model.layers.0", ("model.norm", "lm_head")),
    "fsdp, tied": fsdp(*TIED),
}
# The policy without its adapter is the reference, in a pass of its own inside the forward.
ADAPTED: dict[str, Wrap] = {
    "adapted, ddp": ddp,
    "adapted, fsdp, head of its own": fsdp(f"{BODY}.layers.0", HEAD),
    "adapted, fsdp, norm and head": fsdp(f"{BODY}.layers.0", (f"{BODY}.norm", HEAD)),
}
CASES = [(engine, name) for engine in ENGINES for name in LOSSES]
CASES += [(engine, name) for engine in ADAPTED for name in ("dpo", "tdpo1")]
# Its last term spans the batch of both ranks, and the first remembers.
CASES += [(engine, "beta-simpo + 0.5 simpo + sft") for engine in ("ddp", "fsdp, head of its own")]


def whole(value: torch.Tensor) -> torch.Tensor:
    """A gradient that may be sharded."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def model_of(engine: str) -> nn.Module:
    """The float64 model that an engine wraps; the terms of an adapter are not zero."""
    if engine in ADAPTED:
        options = {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.0}
        return lora(3, **options).double()
    model = tiny_llama(tie_word_embeddings=engine == "fsdp, tied").double()
    for key, value in model.named_parameters():
        value.requires_grad_(engine != "fsdp, frozen body" or "lm_head" in key)
    return model


def step(engine: str, name: str, wrap: Wrap, rank: int | None) -> dict:
    """Loss, metrics and all gradients of two steps without an update."""
    model = model_of(engine)
    wrapped = wrap(model)
    options = {"reference": "adapter"} if engine in ADAPTED else {}
    attachment = attach(model, fp.PreferenceLoss(name, **LOSSES.get(name, {})), **options)
    batch = PairCollator(0)(features(rank))
    for _ in range(2):
        wrapped.zero_grad()
        loss = wrapped(**batch)["loss"]
        loss.backward()
    values = dict(model.named_parameters())
    gradients = {key: whole(each.grad) for key, each in values.items() if each.grad is not None}
    metrics = attachment.pop_metrics("train")
    return {"loss": loss.detach(), "metrics": metrics, "gradients": gradients}


# bf16 as accelerate gives it to FSDP2, past whose root everything is rounded

POLICY = MixedPrecisionPolicy(param_dtype=HALF, reduce_dtype=torch.float32, output_dtype=HALF)
# Submodules that are a unit each, or together, beside the root.
LAYOUTS = {
    "head in the root": ("model.layers.0",),
    "head of its own": ("model.layers.0", "lm_head"),
    "norm and head": ("model.layers.0", ("model.norm", "lm_head")),
    "tied": TIED,
}
COLUMNS = {
    "pairs": ("ref_chosen_logps", "ref_rejected_logps"),
    "points": ("reference", "prompt_reference"),
}


def far_pairs(rank: int) -> list[dict]:
    """Pairs whose log-probs under the reference are far from what bf16 holds."""
    rows = [
        {**row, "ref_chosen_logps": -350.3 - i / 7, "ref_rejected_logps": -351.9 + i / 9}
        for i, row in enumerate(pair_features(PAIRS))
    ]
    return rows[rank::2]


def reference_columns(model: Callable[[], nn.Module]) -> dict[str, list[float]]:
    """Log-probs of pairs and of points under a new model each."""
    options = {"batch_size": 4, "progress": False}
    pairs = add_reference_logps(model(), pair_features(PAIRS), PairCollator(0), **options)
    points = add_reference_logps(model(), point_features(PAIRS), PointCollator(0), **options)
    rows = {"pairs": pairs, "points": points}
    return {name: [row[name] for row in rows[kind]] for kind in rows for name in COLUMNS[kind]}


def mixed_step(model: nn.Module, rank: int) -> dict:
    """Loss, metrics and gradients; the model may be sharded."""
    attachment = attach(model, fp.PreferenceLoss("dpo"))
    inputs = past_wrappers(PairCollator(0)(far_pairs(rank)))
    returned = model(**inputs)["loss"]
    loss = exact_loss(returned, inputs)
    loss.backward()
    return {
        "dtypes": (loss.dtype, returned.dtype),
        "loss": loss.detach(),
        "metrics": attachment.pop_metrics("train"),
        "gradients": {name: whole(value.grad) for name, value in model.named_parameters()},
    }


def in_half(layout: str) -> nn.Module:
    """The model as FSDP2 computes it: parameters in bf16, buffers as they are."""
    model = tiny_llama(tie_word_embeddings=layout == "tied")
    for value in model.parameters():
        value.data = value.data.to(HALF)
    return model


def mixed(layout: str, rank: int) -> dict:
    wrap = fsdp(*LAYOUTS[layout], policy=POLICY)

    def sharded() -> nn.Module:
        return wrap(tiny_llama(tie_word_embeddings=layout == "tied"))

    return {"columns": reference_columns(sharded), **mixed_step(sharded(), rank)}


# transformers' own tensor parallelism


def parallel_step(model: nn.Module) -> dict[str, torch.Tensor]:
    """The loss of a batch and the gradient of every parameter."""
    batch = PairCollator(0)(pair_features(6))
    loss = preference_outputs(model, fp.PreferenceLoss("simpo"), batch).loss
    loss.backward()
    found = {name: whole(value.grad) for name, value in model.named_parameters()}
    return {"loss": loss.detach(), **found}


def peaked() -> nn.Module:
    """A model whose distributions are not flat."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def parallel(folder: str) -> dict[str, torch.Tensor] | None:
    if not hasattr(transformers, "distributed"):
        return None
    config = transformers.distributed.DistributedConfig(tp_plan="auto")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        f"{folder}/model", distributed_config=config
    )
    assert len(model.lm_head.weight.to_local()) in (30, 31)
    return parallel_step(model)


# Trainers


def decided(rank: int, folder: str) -> dict:
    """What runs do of which one rank alone has a loss that is not finite."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options |= {"loss": "alpha-dpo", "learning_rate": 1e-2, "ddp_backend": "gloo"}
    results = {}
    for option, steps in (("stop", 3), ("skip", 3), ("ignore", 3), ("clean", 2)):
        kind = "stop" if option == "clean" else option
        trainer = build("transformers", folder, on_nonfinite=kind, max_steps=steps, **options)
        # One rank alone has the loss, and no rank its gradient.
        let_gradients_be_finite(trainer.model)
        if rank == 1 and option != "clean":
            spoil_losses(trainer, {5})
        raised = None
        try:
            trainer.train()
        except FloatingPointError as error:
            raised = str(error)
        rows = trainer.state.log_history
        results[option] = {"raised": raised, "rows": rows, "state": state_of(trainer)}
    mesh = init_device_mesh("cpu", (2,))
    sharded = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
    values = torch.tensor([1.0, 2.0, 3.0, math.inf])
    sharded.grad = distribute_tensor(values, mesh, [Shard(0)])
    return {"runs": results, "shard": nonfinite._worst_gradient([sharded]).item()}


def logged(kind: str, folder: str) -> list[dict]:
    texts = [
        {"prompt": TEXT[i % 5], "chosen": " " + TEXT[(i * 3) % 7], "rejected": " sat on" * i}
        for i in range(1, 17)
    ]
    options = {"max_steps": 2, "ddp_backend": "gloo", "per_device_train_batch_size": 2}
    if not kind.startswith("trl-"):
        options["log_tokens"] = True
    data = dataset(texts) if kind.endswith("dpo") else points()
    trainer = build(kind, folder, data, reference=tiny_llama(5), **options)
    trainer.train()
    return trainer.state.log_history


def all_steps(rank: int) -> dict:
    wraps = ENGINES | ADAPTED
    return {(engine, name): step(engine, name, wraps[engine], rank) for engine, name in CASES}


def all_logs(folder: str) -> dict | None:
    if importlib.util.find_spec("trl") is None:
        return None
    return {kind: logged(kind, folder) for each in OF_TRL for kind in (each, f"trl-{each}")}


# None of a stream's batches may be dealt out by rows, which would part the two sides of pairs.
IN_LAYOUTS = {"padded": {}, "packed": {"padding_free": True}, "shared": {"shared_prompt": True}}


def in_layout(layout: str, streams: bool, folder: str) -> list[dict]:
    """Logs of a trainer on TRL's rows, weighted ones, whose numbers leave a batch incomplete."""
    options: dict[str, Any] = {"max_steps": 3, "ddp_backend": "gloo", "optim": "sgd"}
    options |= {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 2}
    rows = pairs(10, weight=[(0.5, 2.0, 0.0, 1.0)[i % 4] for i in range(10)])
    data = rows.to_iterable_dataset() if streams else rows
    given = {"eval_dataset": pairs(5)}
    run = build(
        "dpo",
        folder,
        data,
        model=tiny_llama().double(),
        given=given,
        **options | IN_LAYOUTS[layout],
    )
    run.train()
    run.evaluate()
    return run.state.log_history


def all_layouts(folder: str) -> dict | None:
    if importlib.util.find_spec("trl") is None:
        return None
    return {
        (layout, streams): in_layout(layout, streams, folder)
        for layout in IN_LAYOUTS
        for streams in (False, True)
    }


# Of lists each rank has as many, but neither as many completions nor pairs, nor one sum of weights.


def on_lists(kind: str, folder: str, size: int, **more: Any) -> dict:
    """Logs and weights of a trainer on weighted lists, this many of them a batch of a process."""
    options: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": size}
    options |= {"optim": "sgd", "learning_rate": 1e-2, "log_tokens": True} | more
    weights = [(0.5, 2.0, 0.0, 1.0)[index % 4] for index in range(8)]
    rows = [row | {"weight": w} for row, w in zip(list_features(8), weights, strict=True)]
    data = rows if kind == "transformers" else dataset(rows)
    reference = tiny_llama(5).double()
    given = {"model": tiny_llama().double(), "reference": reference, "loss": "dpo"}
    run = in_order(build(kind, folder, data, **given, **options))
    run.train()
    trained = {name: value.detach() for name, value in run.model.named_parameters()}
    return {"log": run.state.log_history[:-1], "weights": trained}


def all_lists(folder: str) -> dict:
    kinds = KINDS_ON_LISTS if importlib.util.find_spec("trl") else KINDS_ON_LISTS[:1]
    return {kind: on_lists(kind, folder, 2, ddp_backend="gloo") for kind in kinds}


KINDS_ON_LISTS = ("transformers", *OF_TRL)
SECTIONS: dict[str, Callable[[int, str], Any]] = {
    "steps": lambda rank, _: all_steps(rank),
    "mixed": lambda rank, _: {layout: mixed(layout, rank) for layout in LAYOUTS},
    "parallel": lambda _, folder: parallel(folder),
    "decided": decided,
    "logs": lambda _, folder: all_logs(folder),
    "layouts": lambda _, folder: all_layouts(folder),
    "lists": lambda _, folder: all_lists(folder),
}


def _work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    # Every training collects; what imports have made is left out.
    gc.freeze()
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= where | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    store, found, failed = dist.FileStore(f"{folder}/store", 2), {}, {}
    group = {"timeout": timedelta(minutes=5), "rank": rank, "world_size": 2}
    for name, section in SECTIONS.items():
        dist.init_process_group("gloo", store=dist.PrefixStore(name, store), **group)
        try:
            found[name] = section(rank, folder)
            # A DDP model that outlives its process group may wait for the other rank for ever.
            gc.collect()
            dist.barrier()
        except Exception:
            failed[name] = traceback.format_exc()
        gc.collect()
        dist.destroy_process_group()
        # A rank whose other has failed comes when its collective has timed out.
        store.set(f"{name} {rank}", "done")
        store.wait([f"{name} 0", f"{name} 1"], 2 * group["timeout"])
    torch.save({"found": found, "failed": failed}, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Callable[[str], list[Any]]:
    """What each rank has found in a section; of a section that failed, its tracebacks."""
    folder = tmp_path_factory.mktemp("ranks")
    peaked().save_pretrained(folder / "model")
    every = spawned(_work, folder)

    def of(section: str) -> list[Any]:
        failed = [each["failed"][section] for each in every if section in each["failed"]]
        if failed:
            pytest.fail("\n".join(failed), pytrace=False)
        return [each["found"][section] for each in every]

    return of


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_two_processes_equal_one(ranks, engine, name):
    wanted = step(engine, name, lambda model: model, None)
    first, second = (rank[engine, name] for rank in ranks("steps"))
    assert first["metrics"] == second["metrics"]
    for key, value in wanted["metrics"].items():
        assert first["metrics"][key] == pytest.approx(value, rel=1e-9, abs=1e-9), key
    mean = (first["loss"] + second["loss"]) / 2
    torch.testing.assert_close(mean, wanted["loss"], rtol=1e-9, atol=0)
    assert any("lm_head" in key or "embed_tokens" in key for key in wanted["gradients"])
    for rank in (first, second):
        assert rank["gradients"].keys() == wanted["gradients"].keys()
        for key, value in wanted["gradients"].items():
            distance = (rank["gradients"][key] - value).norm()
            assert distance <= 1e-9 * value.norm(), (key, distance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_under_fsdps_mixed_precision(ranks, layout):
    first, second = (rank[layout] for rank in ranks("mixed"))
    for name, values in reference_columns(lambda: in_half(layout)).items():
        for found in (first, second):
            assert found["columns"][name] == pytest.approx(values, rel=1e-6)
        assert values != torch.tensor(values).to(HALF).tolist()
    halves = [mixed_step(in_half(layout), rank) for rank in range(2)]
    assert first["dtypes"] == (torch.float32, HALF)
    metrics = first["metrics"]
    assert metrics == second["metrics"]
    for side in ("chosen", "rejected"):
        rows = far_pairs(0) + far_pairs(1)
        reference = sum(row[f"ref_{side}_logps"] for row in rows) / PAIRS
        found = metrics[f"logps/{side}"] - metrics[f"kl/{side}"]
        assert found == pytest.approx(reference, rel=1e-6)
    for found, alone in zip((first, second), halves, strict=True):
        torch.testing.assert_close(found["loss"], alone["loss"], rtol=1e-6, atol=0)
    gradients = [alone["gradients"] for alone in halves]
    assert first["gradients"].keys() == gradients[0].keys()
    for name, found in first["gradients"].items():
        wanted = sum(each[name].float() for each in gradients) / 2
        # The dense model keeps its gradients in bf16.
        assert (found - wanted).norm() <= 0.01 * wanted.norm(), name


def test_a_tensor_parallel_model_has_the_gradients_of_one_process(ranks):
    found = ranks("parallel")
    if found[0] is None:
        pytest.skip("this transformers has no DistributedConfig")
    wanted = parallel_step(peaked())
    for rank in found:
        assert rank.keys() == wanted.keys()
        for name, value in wanted.items():
            assert (rank[name] - value).norm() <= 1e-5 * value.norm(), name


def test_all_ranks_do_what_one_ranks_loss_asks_for(ranks):
    # Each rank looks at its own shard; the sum over the ranks tells the others.
    found = ranks("decided")
    assert [rank["shard"] for rank in found] == [0, math.inf]
    clean = found[0]["runs"]["clean"]["state"]
    for rank in found:
        runs = rank["runs"]
        assert runs["stop"]["raised"].startswith("step 3: got a loss of nan, needs")
        for option in ("stop", "skip", "clean"):
            assert_bit_equal(runs[option]["state"], clean)
        losses = {name: [row.get("loss") for row in runs[name]["rows"]] for name in runs}
        assert losses["stop"][:2] == losses["skip"][:2] == losses["clean"][:2]
        assert math.isnan(losses["stop"][2]) and math.isnan(losses["ignore"][2])
        assert math.isfinite(losses["skip"][2])
        assert runs["skip"]["rows"][2]["skipped_steps"] == 1


@pytest.mark.parametrize("kind", OF_TRL)
def test_two_processes_log_what_trl_logs(ranks, kind):
    pytest.importorskip("trl")
    logs = ranks("logs")[0]
    theirs, ours = (logs[each] for each in (f"trl-{kind}", kind))
    assert len(theirs) == len(ours) == 3
    for one, other in zip(theirs, ours, strict=True):
        assert one.keys() <= other.keys()
        for name in one.keys() - TIMES:
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_two_processes_train_in_a_layout_as_on_padded_rows(ranks, layout, streams):
    pytest.importorskip("trl")
    for logs in ranks("layouts"):
        plain, ours = (logs[each, streams] for each in ("padded", layout))
        assert len(plain) == len(ours) == 5
        for one, other in zip(plain, ours, strict=True):
            assert one.keys() == other.keys()
            tokens = {"num_tokens", "eval_num_tokens"} if layout == "shared" else set()
            for name in one.keys() - TIMES - tokens:
                assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("kind", KINDS_ON_LISTS)
def test_two_processes_train_on_lists_as_one_does(ranks, tmp_path, kind):
    if kind in OF_TRL:
        pytest.importorskip("trl")
    wanted = on_lists(kind, str(tmp_path), 4)
    for found in (rank[kind] for rank in ranks("lists")):
        assert len(found["log"]) == len(wanted["log"]) == 2
        for one, other in zip(wanted["log"], found["log"], strict=True):
            assert one.keys() == other.keys()
            for name in one.keys() - TIMES:
                assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-7), name
        for name, value in wanted["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-8, atol=1e-10)
