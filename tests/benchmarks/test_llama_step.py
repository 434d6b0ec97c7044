"""The model of a step: by hand, against transformers' own layer and FSDP2's code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

transformers = pytest.importorskip("transformers")
pytest.importorskip("triton")

from collective_bytes import Collectives  # noqa: E402
from live_bytes import LiveBytes, held_attention  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaDecoderLayer  # noqa: E402

from benchmarks.device import MACHINES  # noqa: E402
from benchmarks.llama_step import (  # noqa: E402
    BESIDE,
    FULL,
    LLAMAS,
    LORA,
    HeadBytes,
    Layout,
    Llama,
    Recipe,
    backbone_seconds,
    layer_bytes,
    moved,
    step_bytes,
    usable,
)
from benchmarks.recording import record  # noqa: E402

A100 = MACHINES[0]
transformers.AttentionInterface.register("held", held_attention)


def config_of(model: Llama) -> Any:
    return transformers.LlamaConfig(
        vocab_size=model.vocab,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_size,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="held",
    )


@pytest.mark.parametrize(
    ("model", "parameters"),
    [*zip(LLAMAS, (8_030_261_248, 70_553_706_496, 405_853_388_800), strict=True)],
    ids=lambda value: getattr(value, "name", None),
)
def test_parameters_are_those_that_are_published(model: Llama, parameters: int) -> None:
    assert model.parameters == parameters
    with torch.device("meta"):
        built = transformers.LlamaForCausalLM(config_of(model))
    assert sum(each.numel() for each in built.parameters()) == parameters
    linear = [m for m in built.model.layers[0].modules() if isinstance(m, torch.nn.Linear)]
    rank_one = sum(each.in_features + each.out_features for each in linear)
    assert model.adapter(16) == 16 * model.layers * rank_one


# D 4, 6 inside, 2 heads of 2 over 1 of keys: 16 + 8 + 8 + 16 + 24 + 24 + 24 and 8 of the norms.
SMALL = Llama("small", 3, 4, 6, 2, kv_heads=1, head_size=2, vocab=10)


def test_bytes_of_a_small_step_by_hand() -> None:
    assert (SMALL.layer, SMALL.head, SMALL.parameters) == (128, 40, 3 * 128 + 2 * 40 + 4)
    layout = Layout(dp=1, cp=2, tp=2)
    found = step_bytes(SMALL, BESIDE, layout, 8, HeadBytes(100))
    # 8 tokens on a rank. Its states are 16 bytes of a quarter of 468, the reference's are 2, and
    # half of its head is left gathered.
    assert (found.states, found.reference) == (16 * 117, 2 * 117 + 40)
    assert found.checkpoints == 3 * 2 * 8 * 4 // 2
    # Half of the head's 40 bf16 weights and of the next layer's 128; of each token half of
    # (4 + 2) D of the norm; all of the hidden states.
    assert found.at_head == 40 + 128 + 8 * 6 * 4 // 2 + 2 * 8 * 4 + 100
    # Of a token half of: 14 D, 12 of 6, 4 of queries and keys, 4 of 2 heads; and all of 4 D.
    kept = 8 * (14 * 4 + 12 * 6 + 4 * 4 + 4 * 2 + 4 * 2) // 2 + 8 * 4 * 4
    assert layer_bytes(SMALL, 8, 2) == kept
    # The gradient that comes in and one of a weight; half of the layer twice, and what is reduced.
    assert found.at_layer == 2 * 8 * 4 + kept + 4 * 6 + 3 * 128
    fixed = 18 * 117 + 40 + 96
    assert found.moments == {"head": fixed + found.at_head, "layers": fixed + found.at_layer}
    assert (found.ended_by, found.peak) == ("layers", fixed + found.at_layer)
    # The whole head for half of the tokens: 80 bytes of it, and half of the hidden states.
    whole = step_bytes(SMALL, BESIDE, layout, 8, HeadBytes(2000, whole=True))
    assert whole.head == 80 + 2 * 8 * 4 // 2 + 2000
    assert whole.at_head == 40 + 128 + 96 + whole.head
    assert whole.ended_by == "head"
    # Frozen weights of 2 bytes; an adapter of 16 on (in + out) of seven products, no gradient.
    adapter = 3 * 16 * (8 + 6 + 6 + 8 + 10 + 10 + 10)
    frozen = step_bytes(SMALL, LORA, layout, 8, HeadBytes(0))
    assert frozen.states == (2 * 468 + 16 * adapter) // 4 and frozen.reference == 0
    # Of the norms 4 bytes fewer: nothing is kept for their weights' gradients.
    assert frozen.at_layer == 2 * 8 * 4 + kept - 8 * 4 * 4 // 2 + 2 * 128
    # A mesh of one casts the unit that runs; there is no buffer of it, and no next one.
    alone = step_bytes(SMALL, LORA, Layout(), 8, HeadBytes(0))
    assert alone.at_head == 2 * 40 + 16 * 4 * 4 + 2 * 16 * 4
    assert alone.at_layer == 2 * 16 * 4 + layer_bytes(SMALL, 16, 1, trains=False) + 2 * 128


def test_what_a_gpu_may_take_and_how_long_its_layers_do() -> None:
    assert usable(A100) == int(0.9 * A100.memory)
    # 8 FLOPs of each token and weight, 6 of the last product's; attention of two causal sequences,
    # 4.5 forwards.
    linear = 16 * 3 * (8 * 96 + 6 * 24) / 0.8
    attention = 4.5 * 2 * (4 * 8 * 8 / 2) * 3 * 4 / 0.66
    seconds = backbone_seconds(SMALL, FULL, Layout(), 8, A100)
    assert seconds == pytest.approx((linear + attention) / 312e12)
    halves = backbone_seconds(SMALL, FULL, Layout(cp=2, tp=2), 8, A100)
    assert halves == pytest.approx(seconds / 4)
    frozen = backbone_seconds(SMALL, LORA, Layout(), 8, A100)
    linear = 16 * 3 * 6 * 120 / 0.8
    assert frozen == pytest.approx((linear + attention) / 312e12)


def test_bytes_that_move_by_hand() -> None:
    found = moved(SMALL, FULL, Layout(2, 2, 2), 8)
    # Three quarters of half of: layers and embedding twice, head and a norm, and all gradients.
    assert found.fsdp == 2 * ((2 * (3 * 128 + 40) + 44) + 468) // 2 * 3 // 4
    # 8 tokens: eleven collectives of each layer, with LoRA twelve; half from the other rank.
    assert found.tp == 11 * 3 * 2 * 8 * 4 // 2
    assert moved(SMALL, LORA, Layout(2, 2, 2), 8).tp == 12 * 3 * 2 * 8 * 4 // 2
    # Keys and values of half of the heads, three times from one other rank; their fp32 gradients
    # there and back.
    assert found.cp == 3 * 8 * (2 * 2) // 2 * (3 * 2 + 2 * 4)
    assert found.vocabulary == 12 * 8 + 2 * 4 * 8 * 4 // 2
    # 512 fp64 numbers around a ring of two, forward and backward.
    assert found.sequences == 2 * 512 * 8
    assert (found.statistics, found.whole) == (4, 2 * 2 * 40 // 2)
    alone = moved(SMALL, LORA, Layout(), 8)
    assert set(vars(alone).values()) == {0}


# What trains, and the model: LoRA on the smallest.
LAYERS = [*((FULL, model) for model in LLAMAS), (LORA, LLAMAS[0])]


@pytest.mark.parametrize(("recipe", "model"), LAYERS, ids=lambda value: value.name)
def test_a_layer_holds_and_multiplies_what_transformers_own_does(
    recipe: Recipe, model: Llama
) -> None:
    """The real layer, checkpointed, recorded on tensors without data, at full size."""
    length, trains = 2**17, recipe.rank is None
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config_of(model), 0)
        if recipe.rank is not None:
            peft = pytest.importorskip("peft")
            layer.requires_grad_(False)
            adapter = peft.LoraConfig(r=recipe.rank, target_modules=".*_proj")
            peft.inject_adapter_in_model(adapter, layer)
        layer.to(torch.bfloat16)
        hidden = torch.empty(2, length, model.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        gradient = torch.empty_like(hidden)
        rotation = torch.empty(1, length, model.head_size, dtype=torch.bfloat16)

    def step() -> None:
        rotated = (rotation, rotation)
        out = checkpoint(layer, hidden, position_embeddings=rotated, use_reentrant=False)
        out.backward(gradient)
        hidden.grad = None
        layer.zero_grad()

    recording = record(step, 0, A100)
    # One gradient of a weight is alive at the peak, which the model counts with all others.
    found = recording.peak - 2 * model.hidden_size * model.intermediate_size * trains
    assert found == pytest.approx(layer_bytes(model, 2 * length, 1, trains), rel=1e-3)
    # All products but the adapter's, which have its rank as a size.
    sizes = [event.size for event in recording.events if event.size and min(event.size) > 16]
    products = sum(2 * prod(size) for size in sizes)
    seconds = backbone_seconds(replace(model, layers=1), recipe, Layout(), length, A100)
    attention = 4.5 * 4 * length * length * model.queries / 0.66
    assert products / 0.8 + attention == pytest.approx(seconds * A100.peak, rel=1e-6)


RANKS = 8


@pytest.fixture(scope="module")
def ranks() -> Iterator[None]:
    """This process is one of eight, whose others say nothing and are waited for by nobody."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    dist.destroy_process_group()


def sharded(shape: Llama, shards: int) -> Any:
    """A model, sharded as accelerate does."""
    model = transformers.LlamaForCausalLM(config_of(shape)).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    mesh = init_device_mesh("cpu", (RANKS // shards, shards), mesh_dim_names=("dp", "fsdp"))["fsdp"]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    for layer in model.model.layers:
        fully_shard(layer, **options, reshard_after_forward=True)
    fully_shard(model.model.embed_tokens, **options, reshard_after_forward=True)
    fully_shard([model.model.norm, model.lm_head], **options, reshard_after_forward=False)
    fully_shard(model, **options)
    return model


def shares(values: Any) -> list[torch.Tensor]:
    """The rank's own, but for an optimizer's counters."""
    return [each.to_local().detach() for each in values if each.dim()]


def eager_peak(shape: Llama, length: int) -> int:
    """Bytes of an eager head by itself, its gradients among them."""
    hidden = torch.zeros(2, length, shape.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(shape.vocab, shape.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    live = LiveBytes([hidden.detach(), weight.detach()])
    before = live.now
    with live:
        (hidden @ weight.t()).float().log_softmax(-1)[..., 0].sum().backward()
    return live.peak - before


# Ranks that share the weights; the vocabulary; which moment has the most.
SETTINGS = [(RANKS, 512, "layers"), (RANKS, 4096, "head"), (1, 4096, "head")]


@pytest.mark.parametrize(("shards", "vocab", "moment"), SETTINGS)
def test_a_step_under_fsdp2_holds_and_moves_what_the_model_says(
    shards: int, vocab: int, moment: str, ranks: None
) -> None:
    """FSDP2's own code on a CPU with transformers' Llama, and an eager head of all rows."""
    length, layout = 512, Layout(dp=shards)
    shape = Llama("test", 6, 256, 1024, 4, kv_heads=2, head_size=64, vocab=vocab)
    model = sharded(shape, shards)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.zeros(2, length, dtype=torch.int64)

    def step() -> None:
        model(ids).logits.float().log_softmax(-1)[..., 0].sum().backward()

    # The first step makes moments and gradients, which stay.
    with Collectives() as collectives:
        step()
    optimizer.step()
    moments = [value for each in optimizer.state.values() for value in each.values()]
    gradients = [each.grad for each in model.parameters()]
    live = LiveBytes(shares([*model.parameters(), *gradients, *moments]))
    assert live.now == pytest.approx(16 * shape.parameters / shards, rel=1e-4)
    with live:
        step()
    head = HeadBytes(eager_peak(shape, length))
    found = step_bytes(shape, FULL, layout, length, head)
    assert found.ended_by == moment
    assert live.peak == pytest.approx(found.peak, rel=0.03)
    # From each other rank as much as this one gives, and sums of its share from a ring.
    given = collectives.given
    received = given["allgather_base"] * (shards - 1)
    received += given["reduce_scatter_base"] * (shards - 1) // shards
    assert received == moved(shape, FULL, layout, length).fsdp

    # After a second model's forward its head is still gathered, beside its shard.
    second = sharded(shape, shards).eval().requires_grad_(False)
    live = LiveBytes(shares(second.parameters()))
    before = live.now
    with torch.no_grad(), live:
        second(ids)
    model_says = step_bytes(shape, BESIDE, layout, length, head).reference
    left = model_says - 2 * shape.parameters // shards
    # And the last norm, and the buffers of the rotation.
    assert left <= live.now - before <= left + 2 * 256 + 4 * 10_000
