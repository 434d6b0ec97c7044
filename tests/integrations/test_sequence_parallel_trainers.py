"""Trainers whose ranks share sequences (accelerate's `cp_size`) against one process.

Four processes: sequences over all of them, and two data ranks of two each. The attention is one
that gathers, in float64, under the name of `sdpa`; accelerate's and torch's context managers, and
the order in which they deal tokens out, are the real ones. Torch's ring itself, which computes in
fp32, goes round on the CPU with kernels of its own (`ring_kernels`), its layers run again in the
backward pass. One file of more than 450 lines: all cases run in the same processes, as starting
them takes longer than most.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, PartialState
from gathered_attention import gathered_attention
from processes import forked
from ring_kernels import ring_kernels
from tiny_models import pair_features, tiny_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from trainers import (
    TIMES,
    assert_bit_equal,
    build,
    held_out,
    in_order,
    lora,
    pairs,
    points,
    state_of,
)
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, shard_of
from fused_prefopt.integrations.sequence_attention import RingAttention
from fused_prefopt.integrations.sequence_parallel import SharedBatches
from fused_prefopt.integrations.transformers import attach, past_wrappers

ParallelismConfig = pytest.importorskip("accelerate.parallelism_config").ParallelismConfig
pytest.importorskip("trl")
pytest.importorskip("peft")
pytestmark = pytest.mark.slow

WORLD, BATCH = 4, 4
# Ranks that share sequences; the others are data ranks.
SIZES = (4, 2)


def parallel(size: int) -> dict[str, Any]:
    """Options of a trainer on so many ranks for each sequence, 1 for one process."""
    options = {"optim": "sgd", "learning_rate": 1e-2, "max_steps": 2}
    if size == 1:
        return options | {"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH}
    ranks, each = WORLD // size, BATCH * size // WORLD
    config = ParallelismConfig(cp_size=size, dp_shard_size=ranks)
    options |= {"parallelism_config": config, "ddp_backend": "gloo"}
    return options | {"per_device_train_batch_size": each, "per_device_eval_batch_size": each}


def model(seed: int = 0) -> Any:
    return tiny_llama(seed, attn_implementation="sdpa").double()


def adapted() -> Any:
    return lora(3, target_modules=["q_proj", "lm_head"], lora_dropout=0.0).double()


def grouped() -> Any:
    """A model whose two heads share their keys, with an adapter: the reference is without it."""
    base = tiny_llama(num_key_value_heads=1, attn_implementation="sdpa")
    return lora(3, model=base, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)


def weighted() -> list[dict[str, Any]]:
    """Pairs whose tokens have weights, with gold completions."""
    golds = pair_features(16, seed=5)
    return [
        row
        | {"gold_ids": gold["chosen_ids"]}
        | {
            f"{side}_token_weights": [0.5 + (i + place) % 3 for place in range(len(row[ids]))]
            for side, ids in (("chosen", "chosen_ids"), ("rejected", "rejected_ids"))
        }
        for i, (row, gold) in enumerate(zip(pair_features(16), golds, strict=True))
    ]


def short(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every fourth batch has sequences of three tokens alone: most ranks have none with a label."""
    one = {"prompt_ids": [3], "chosen_ids": [5, 7], "rejected_ids": [8]}
    return [row | one if i < BATCH else row for i, row in enumerate(rows)]


# Kind of trainer, its data, and what each run is given.
Make = Callable[[], dict[str, Any]]
CASES: dict[str, tuple[str, Callable[[], Any], Make]] = {
    "statistics": (
        "transformers",
        lambda: short(pair_features(16)),
        lambda: {
            "loss": "alpha-dpo",
            "reference": model(5),
            "log_tokens": True,
            "given": {"eval_dataset": pair_features(8, seed=3)},
            "include_num_input_tokens_seen": "non_padding",
        },
    ),
    "queue": (
        "attached",
        lambda: pair_features(16),
        lambda: {
            "loss": "gamma-simpo",
            "loss_kwargs": {"queue_size": 16, "sample_size": 16},
            "gradient_accumulation_steps": 2,
            "max_steps": 2,
        },
    ),
    "uneven": (
        # The last of its steps has three pairs, of which one data rank has one.
        "transformers",
        lambda: pair_features(15),
        lambda: {
            "loss": "alpha-dpo",
            "reference": model(5),
            "gradient_accumulation_steps": 3,
            "accelerator_config": {"even_batches": False},
            "given": {"eval_dataset": pair_features(11, seed=3)},
        },
    ),
    "gold and token weights": ("transformers", weighted, lambda: {"loss": "tpo"}),
    "both heads": (
        "transformers",
        lambda: pair_features(16),
        lambda: {"model": adapted(), "reference": "adapter", "loss": "tdpo2"},
    ),
    "cached": (
        "transformers",
        lambda: pair_features(16),
        lambda: {
            "reference": model(5),
            "given": {"reference_cache": "cache", "eval_dataset": pair_features(8, seed=3)},
        },
    ),
    "dpo": (
        "dpo",
        lambda: pairs(16),
        lambda: {
            "loss": "dpo",
            "reference": model(5),
            "ld_alpha": 0.5,
            "given": {"eval_dataset": pairs(8)},
        },
    ),
    "precomputed": (
        "dpo",
        lambda: pairs(16),
        lambda: {"reference": model(5), "precompute_ref_log_probs": True},
    ),
    "kto": (
        "kto",
        lambda: points(16),
        lambda: {
            "reference": model(5),
            "train_sampling_strategy": "sequential",
            # Its last batch is smaller: it counts as much less, not once for each rank.
            "given": {"eval_dataset": held_out("kto")},
        },
    ),
    "kto, precomputed": (
        "kto",
        lambda: points(16),
        lambda: {
            "reference": model(5),
            "precompute_ref_log_probs": True,
            "train_sampling_strategy": "sequential",
        },
    ),
    "ring of fp32": (
        "transformers",
        lambda: short(pair_features(16)),
        lambda: {
            "model": tiny_llama(attn_implementation="sdpa"),
            "reference": tiny_llama(5, attn_implementation="sdpa"),
            "loss": "alpha-dpo",
            "gradient_checkpointing": True,
            "given": {"eval_dataset": pair_features(8, seed=3)},
        },
    ),
    "ring of grouped keys": (
        "dpo",
        lambda: pairs(16),
        lambda: {
            "model": grouped(),
            "gradient_checkpointing": True,
            "given": {"eval_dataset": pairs(8)},
        },
    ),
}
# Whose attention is torch's ring: by which kernel.
RINGS = {"ring of fp32": "efficient", "ring of grouped keys": "flash"}
RING_TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
# Of them also under FSDP2, where processes of a CPU are taken for accelerators.
SHARDED = ("statistics", "both heads", "dpo", *RINGS)
FSDP2 = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
}
# Of KTO's data each batch's completions are set behind one another's prompts: one size of batches.
SIZES_OF = {
    **dict.fromkeys(("queue", "uneven", "cached", "precomputed"), (2,)),
    **dict.fromkeys(
        ("statistics", "gold and token weights", "dpo", "kto", "kto, precomputed"), (4,)
    ),
    **dict.fromkeys(("both heads", *RINGS), ()),
}


def trained(case: str, size: int, folder: Path, **more: Any) -> dict[str, Any]:
    """Logs, weights and the loss's state after a few steps."""
    kind, data, make = CASES[case]
    options = parallel(size) | {"model": model()} | make() | more
    given = options.pop("given", {})
    if "reference_cache" in given:
        given["reference_cache"] = str(folder / f"cache-{size}")
    with attention(case, size):
        run = build(kind, folder / f"{case}-{size}", data(), given=given, **options)
        if not kind.endswith("kto"):
            run = in_order(run)
        run.train()
        if "eval_dataset" in given:
            run.evaluate()
    columns = [name for name in run.train_dataset[0] if name.startswith("ref_")]
    return {
        "log": run.state.log_history,
        "weights": {name: whole(value) for name, value in run.model.named_parameters()},
        "state": run.attachment.loss_fn.state_dict(),
        "references": {name: [row[name] for row in run.train_dataset] for name in columns},
        "seen": run.state.num_input_tokens_seen,
    }


def attention(case: str, size: int) -> Any:
    """Context in which `sdpa` is of sequences that so many ranks share."""
    if size == 1:
        return nullcontext()
    if case in RINGS:
        AttentionInterface.register("sdpa", sdpa_attention_forward)
        return ring_kernels(RINGS[case])
    gathered_attention("sdpa", _groups()[size], "balanced")
    return nullcontext()


def whole(value: Any) -> torch.Tensor:
    """A weight, which may be sharded."""
    value = value.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def resumed(folder: Path) -> dict[str, Any]:
    """A run of four steps, and one that goes on from its second."""
    attention("resumed", 2)
    runs = {}
    for name, start in (("whole", None), ("rest", str(folder / "checkpoint-2"))):
        options = parallel(2) | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        options |= {"optim": "adamw_torch", "loss": "alpha-dpo", "reference": model(5)}
        run = build("transformers", folder, pair_features(16), model=model(), **options)
        run.train(resume_from_checkpoint=start)
        runs[name] = state_of(run) | run.attachment.loss_fn.state_dict()
    return runs


def refused(folder: Path) -> dict[str, str]:
    """What the trainers say of what cannot be cut."""
    peft = pytest.importorskip("peft")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    packs = {"data_collator": PairCollator(0, padding_free=True)}
    shares = {"data_collator": PairCollator(0, shared_prompt=True)}
    slides = tiny_llama(attn_implementation="sdpa")
    slides.config.sliding_window = 4
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "packed": ("transformers", {"given": packs}),
        "shared": ("transformers", {"given": shares}),
        "packed, trl": ("dpo", {"padding_free": True}),
        "prompt": ("transformers", {"model": peft.get_peft_model(tiny_llama(), prompt)}),
        "eager": ("transformers", {"model": tiny_llama(attn_implementation="eager")}),
        "window": ("transformers", {"model": slides}),
        "reference": (
            "transformers",
            {"loss": "dpo", "reference": tiny_llama(attn_implementation="eager")},
        ),
        "dealt out": ("kto", {"loss": "kto", "accelerator_config": {"dispatch_batches": True}}),
    }
    found = {}
    for name, (kind, options) in cases.items():
        data = {"dpo": pairs, "kto": points}.get(kind, pair_features)(16)
        try:
            build(kind, folder / name, data, **parallel(4) | {"loss": "simpo"} | options)
        except ValueError as error:
            found[name] = str(error)
    run = build("transformers", folder / "left", pair_features(16), loss="simpo", **parallel(4))
    batch = PairCollator(0)(pair_features(2))
    try:
        run.shared.shard(batch | {"attention_mask": batch["attention_mask"].flip(1)})
    except ValueError as error:
        found["left"] = str(error)
    rows = pair_features(BATCH, seed=dist.get_rank())
    run.get_train_dataloader = lambda: DataLoader(rows, BATCH, collate_fn=PairCollator(0))
    try:
        run.train()
    except ValueError as error:
        found["unlike"] = str(error)
    return found


def looped(place: int | None) -> dict[str, Any]:
    """Gradients of a loop of one's own, as the docs have it: of one of two data ranks, or of both.

    There the mean over all ranks, which data parallelism takes.
    """
    sdpa = {"attn_implementation": "sdpa"}
    policy, reference = tiny_llama(**sdpa), tiny_llama(5, **sdpa)
    policy.train()
    policy.gradient_checkpointing_enable()
    attachment = attach(policy, fp.PreferenceLoss("alpha-dpo"), reference=reference)
    rows = pair_features(8)
    if place is None:
        policy(**past_wrappers(PairCollator(0)(rows)))["loss"].backward()
        return {name: value.grad for name, value in policy.named_parameters()}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "cp"))
    attachment.loss_fn.process_group = mesh["dp_shard"].get_group()
    attachment.sequence_group = mesh["cp"].get_group()
    ring = RingAttention(mesh["cp"])
    for each in (policy, reference):
        ring.take(each)
    batch = PairCollator(0)(rows[4 * place : 4 * place + 4])
    number = mesh["cp"].get_local_rank()
    shard = shard_of(batch, number, 2, order=ring.order, multiple_of=ring.multiple_of)
    with attention("ring of fp32", 2), ring.running():
        policy(**past_wrappers(shard))["loss"].backward()
    found = {name: value.grad for name, value in policy.named_parameters()}
    for value in found.values():
        dist.all_reduce(value)
    return {name: value / WORLD for name, value in found.items()}


def batch_of(place: int | None) -> fp.LogpBatch:
    """Log-probs of the pairs of one of two data ranks, or of both."""
    torch.manual_seed(1)
    policy, lengths = -torch.rand(2, 8).double() * 20, torch.full((2, 8), 7.0).double()
    part = slice(None) if place is None else slice(4 * place, 4 * place + 4)
    return fp.LogpBatch(policy[:, part].flatten(), lengths[:, part].flatten())


def on_copies(rank: int) -> dict[str, Any]:
    """What a loss has seen whose ranks are two by two tensor-parallel, as its trainer tells it."""
    trainer = SimpleNamespace(accelerator=SimpleNamespace(), get_tp_size=lambda: 2)
    shared = SharedBatches.of(trainer)
    loss_fn = fp.PreferenceLoss("gamma-simpo", queue_size=16, sample_size=16)
    shared.tell(SimpleNamespace(loss_fn=loss_fn))
    for _ in range(2):
        loss = loss_fn.from_logps(batch_of(rank // 2)).loss
    return {"loss": loss, "state": loss_fn.state_dict(), "first": shared.is_first} | {
        "repeats": shared.repeats
    }


@functools.cache
def _groups() -> dict[int, Any]:
    """By their number the ranks that share this one's sequences."""
    return {size: dist.new_subgroups(size)[0] for size in SIZES}


def _work(rank: int, folder: Path) -> dict[Any, Any]:
    where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= where | {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    validate = ParallelismConfig._validate_accelerator
    # It wants FSDP2 or a device, as which accelerate takes no process on a CPU.
    ParallelismConfig._validate_accelerator = lambda *_: None
    results: dict[Any, Any] = {
        (case, size): trained(case, size, folder) for case in CASES for size in SIZES_OF[case]
    }
    results |= {
        "resumed": resumed(folder / "resumed"),
        "refused": refused(folder),
        "tp": on_copies(rank),
        "loop": looped(rank // 2),
    }
    ParallelismConfig._validate_accelerator, own = validate, AcceleratorState.__init__

    def take_for_accelerators(self: Any, *args: Any, **kwargs: Any) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        own(self, *args, **kwargs)

    AcceleratorState.__init__ = take_for_accelerators
    for case in SHARDED:
        results[case, "fsdp2"] = trained(case, 2, folder, **FSDP2)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return forked(functools.partial(_work, folder=folder), WORLD, folder)


@pytest.mark.parametrize("case", CASES)
def test_ranks_that_share_sequences_train_as_one_process(ranks, case, tmp_path):
    wanted, unlike = trained(case, 1, tmp_path), TIMES | {"train_tokens_per_second"}
    ring = case in RINGS
    near, logged = (RING_TOLERANCE, 1e-5) if ring else ({"rtol": 1e-9, "atol": 1e-12}, 1e-6)
    for size in (*SIZES_OF[case], *(["fsdp2"] if case in SHARDED else [])):
        for found in (rank[case, size] for rank in ranks):
            assert len(found["log"]) == len(wanted["log"])
            for one, other in zip(wanted["log"], found["log"], strict=True):
                assert one.keys() == other.keys()
                for name in one.keys() - unlike:
                    # A trainer keeps its loss in fp32.
                    close = pytest.approx(one[name], rel=logged, abs=logged if ring else 1e-9)
                    assert other[name] == close, (size, name)
            for part in ("weights", "state"):
                assert found[part].keys() == wanted[part].keys()
                for name, value in wanted[part].items():
                    torch.testing.assert_close(found[part][name], value, **near)
            assert found["references"].keys() == wanted["references"].keys()
            for name, values in wanted["references"].items():
                assert found["references"][name] == pytest.approx(values, rel=1e-6), name

            assert found["seen"] == wanted["seen"]


def test_a_loop_of_ones_own_has_the_gradients_of_one_process(ranks):
    wanted = looped(None)
    for found in (rank["loop"] for rank in ranks):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, **RING_TOLERANCE)


def test_a_resumed_run_is_bit_equal(ranks):
    for runs in (rank["resumed"] for rank in ranks):
        assert_bit_equal(runs["rest"], runs["whole"])


def test_statistics_see_pairs_once_that_tensor_parallel_ranks_share(ranks):
    loss_fn = fp.PreferenceLoss("gamma-simpo", queue_size=16, sample_size=16)
    for _ in range(2):
        wanted = loss_fn.from_logps(batch_of(None)).loss
    found = [rank["tp"] for rank in ranks]
    assert [each["first"] for each in found] == [True, False, True, False]
    # As many ranks have counted each token.
    assert {each["repeats"] for each in found} == {2}
    torch.testing.assert_close((found[0]["loss"] + found[2]["loss"]) / 2, wanted)
    for each in found:
        torch.testing.assert_close(each["state"], dict(loss_fn.state_dict()))


def test_what_cannot_be_cut_is_refused_by_name(ranks):
    wanted = {
        "packed": "packs sequences or shares prompts",
        "shared": "packs sequences or shares prompts",
        "packed, trl": "packs sequences or shares prompts",
        "prompt": "learns a prompt",
        "eager": "'eager', wanted 'sdpa'",
        "window": "layers of sliding_attention",
        "reference": "'eager', wanted 'sdpa'",
        "left": "padding in front of tokens",
        "dealt out": "got dispatch_batches=True",
        "unlike": "got different batches on ranks that share sequences",
    }
    for found in (rank["refused"] for rank in ranks):
        assert found.keys() == wanted.keys()
        for name, words in wanted.items():
            assert words in found[name], name
