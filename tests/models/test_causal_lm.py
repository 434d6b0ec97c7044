"""Families of language models: head, loss and all gradients against the model's own logits path."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from model_families import (
    FAMILIES,
    IMAGE,
    SIZES,
    assert_gradients,
    assert_same,
    family,
    fused,
    pairs,
)
from partitioned import Partitioned
from torch import nn
from truth import largest_error

import fused_prefopt as fp
from fused_prefopt.integrations.transformers import attach
from fused_prefopt.models.causal_lm import backbone_of, last_hidden
from fused_prefopt.models.head_check import check_head
from fused_prefopt.models.model_call import unwrapped

PATHS = ("auto", "local", "recompute")
# Softcap, scale and whether there is a bias, of heads that are not (None, 1.0, False).
HEADS = {
    "gemma2": (3.0, 1.0, False),
    "gemma3": (3.0, 1.0, False),
    "recurrent gemma": (2.0, 1.0, False),
    "cohere": (None, 0.25, False),
    "cohere2": (None, 0.25, False),
    "granite": (None, 0.25, False),
    "granite-moe": (None, 0.25, False),
    "hyperclovax": (None, 0.25, False),
    "falcon h1": (None, 0.5, False),
    "phi": (None, 1.0, True),
    "gptj": (None, 1.0, True),
    "ctrl": (None, 1.0, True),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_all_gradients_are_those_of_the_models_own_logits(name):
    model = family(name)
    assert_same(model, pairs())
    head = check_head(model)
    assert head.weight is model.get_output_embeddings().weight and head.valid_vocab is None
    found = (head.softcap, head.logit_scale, head.bias is not None)
    assert found == HEADS.get(name, (None, 1.0, False))


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "phi", "mixtral", "llava"])
def test_families_wrapped_by_peft(name):
    peft = pytest.importorskip("peft")
    settings = {"r": 2, "init_lora_weights": False}
    config = peft.LoraConfig(target_modules=r".*(q_proj|v_proj)", **settings)
    model = peft.get_peft_model(family(name), config).double().eval()
    assert_same(model, pairs())
    check_head(model)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["gemma2", "ctrl"])
def test_every_path_of_a_head_that_trains(name, path):
    assert_same(family(name), pairs(), path=path)


def test_images_reach_the_backbone():
    model, batch = family("llava"), pairs()
    generator = torch.Generator().manual_seed(0)
    sequences = batch["input_ids"].shape[0]
    ids = torch.full((sequences, 4), IMAGE)  # patches of one image in front of each sequence
    ones = torch.ones_like(ids)
    batch = {
        "input_ids": torch.cat((ids, batch["input_ids"]), 1),
        "attention_mask": torch.cat((ones, batch["attention_mask"]), 1),
        "completion_mask": torch.cat((0 * ones, batch["completion_mask"]), 1),
        "pixel_values": torch.randn(sequences, 3, 8, 8, generator=generator).double(),
    }
    assert_same(model, batch)
    assert any("vision" in name for name in fused(model, batch)[1])


@pytest.mark.parametrize("text", [{"model_type": "cohere"}, {"model_type": "gemma2"}])
def test_a_multimodal_model_that_leaves_its_text_configs_scales_alone(text):
    config_class, options = FAMILIES["llava"]
    scales = {"logit_scale": 0.25, "final_logit_softcapping": 3.0}
    config = getattr(transformers, config_class)(
        **options | {"text_config": options["text_config"] | scales | text}
    )
    model = transformers.AutoModelForImageTextToText.from_config(config).double().eval()
    nn.init.normal_(model.lm_head.weight)
    head = check_head(model)
    assert (head.logit_scale, head.softcap) == (1.0, None)
    assert_same(model, pairs())


def test_a_vocabulary_padded_beyond_the_config_and_resized_embeddings():
    model, batch = family("llama"), pairs()
    wanted = model(input_ids=batch["input_ids"]).logits
    padded = nn.Linear(32, 104, bias=False, dtype=torch.float64)
    with torch.no_grad():
        padded.weight[:101] = model.lm_head.weight
    model.lm_head = padded
    head = fp.LMHead.of(model)
    assert head.valid_vocab == 101
    labels = batch["input_ids"]
    hidden = last_hidden(model, {name: batch[name] for name in ("input_ids", "completion_mask")})
    truth = wanted[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None])[..., 0]
    assert largest_error(fp.token_logps(hidden, head, labels)[:, 1:], truth) <= 1e-10
    model = family("llama")
    model.resize_token_embeddings(104, mean_resizing=False)
    head = fp.LMHead.of(model)
    assert head.vocab == 104 and head.valid_vocab is None
    assert_same(model, batch)


def test_wrappers_are_seen_through():
    model, wrapped = family("llama"), nn.Module()
    wrapped.module = model
    assert unwrapped(wrapped) is model
    for each in (wrapped, torch.compile(wrapped)):
        assert fp.LMHead.of(each).weight is model.lm_head.weight
    assert backbone_of(torch.compile(model)) is model.model


def with_head(head):
    model = family("llama")
    model.lm_head = head
    return model


def transformed(kind, **options):
    """A model with a layer between backbone and output embedding."""
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"this transformers has no {kind}Config")
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_attention_heads")}
    config = getattr(transformers, f"{kind}Config")(**sizes, num_hidden_layers=1, **options)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def integers():
    model = family("llama")
    values = torch.ones(101, 32, dtype=torch.int8)
    model.lm_head.weight = nn.Parameter(values, requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: family("llama").model, "LlamaModel has no output embedding"),
        (nn.ReLU, "ReLU has no output embedding"),
        (integers, "int8, wanted a floating dtype"),
        (lambda: with_head(nn.Sequential(nn.Linear(32, 101))), "its head is a Sequential"),
        (
            lambda: with_head(nn.Linear(32, 50, bias=False)),
            "its head has 50 rows, its config a vocabulary of 101",
        ),
        (
            lambda: with_head(nn.Linear(32, 101, bias=False, device="meta")),
            r"weight of the head: got shape \(101, 32\) on the meta",
        ),
        (
            lambda: transformed("Roberta", is_decoder=True),
            r"\(lm_head.dense.weight, .*before its output embedding",
        ),
        (
            lambda: transformed("ModernBertDecoder", intermediate_size=24, pad_token_id=0),
            "before its output embedding",
        ),
    ],
)
def test_a_head_that_is_not_one_whole_matmul_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        fp.LMHead.of(make())


def test_a_batch_without_tokens_is_an_error():
    with pytest.raises(ValueError, match="input_ids: got none in 'inputs_embeds', needs token ids"):
        last_hidden(family("llama"), {"inputs_embeds": torch.ones(1, 2, 32)})


# A head whose weights are elsewhere: gathered by hooks around its own modules, or an error


def lora_on_the_head(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "lm_head"])
    return peft.get_peft_model(model, config).double().eval()


def copied_head(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return peft.get_peft_model(model, config).double().eval()


def frozen_head(model):
    model.lm_head.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("wrap", [lambda model: model, frozen_head, lora_on_the_head, copied_head])
def test_a_partitioned_head_is_gathered_by_its_own_modules_hooks(wrap, path):
    model, batch = wrap(family("granite")), pairs()
    loss, wanted, _ = fused(copy.deepcopy(model), batch)
    parts = Partitioned(model)
    got_loss, got, _ = fused(model, batch, fp.PreferenceLoss("simpo", path=path))
    torch.testing.assert_close(got_loss, loss, rtol=1e-12, atol=0)
    assert_gradients(got, wanted)
    assert parts.whole


def test_a_partitioned_head_is_not_read_outside():
    model = family("llama")
    Partitioned(model)
    with pytest.raises(ValueError, match=r"weight of the head: got shape \(0,\), needs the whole"):
        fp.LMHead.of(model)
    model = lora_on_the_head(family("llama"))
    layer = model.get_output_embeddings()
    layer.lora_B["default"].weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"lora_B of the head: got shape \(0,\)"):
        fp.LMHead.of(model)


def test_an_error_inside_the_head_gives_the_forwards_back():
    model = lora_on_the_head(family("llama"))
    layer, hidden = model.get_output_embeddings(), torch.ones(1, 2, 32).double()
    before = layer(hidden)

    def fails(*_, **__):
        raise RuntimeError("inside")

    loss_fn = fp.PreferenceLoss("simpo")
    loss_fn.forward = fails
    attach(model, loss_fn)
    with pytest.raises(RuntimeError, match="inside"):
        model(**pairs())
    assert torch.equal(layer(hidden), before)
