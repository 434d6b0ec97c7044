"""Families of language models: loss and all gradients against the model's own logits path."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fused_prefopt as fp

transformers = pytest.importorskip("transformers")

from model_families import FAMILIES, IMAGE, assert_same, family, fused, pairs  # noqa: E402

from fused_prefopt.integrations.causal_lm import (  # noqa: E402
    last_hidden,
)
from fused_prefopt.integrations.head_check import check_head  # noqa: E402

PATHS = ("auto", "local", "recompute")


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_all_gradients_are_those_of_the_models_own_logits(name):
    model = family(name)
    assert_same(model, pairs())
    assert check_head(model).weight is model.get_output_embeddings().weight


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


def test_the_router_loss_is_part_of_the_loss_and_logged():
    model, batch = family("qwen3-moe"), pairs()
    balance = model(**{k: v for k, v in batch.items() if k != "completion_mask"}).aux_loss
    loss, _, metrics = fused(model, batch)
    assert metrics["aux_loss"] == pytest.approx(balance.item(), rel=1e-9) and balance > 1
    model.config.output_router_logits = False
    alone, _, metrics = fused(model, batch)
    assert "aux_loss" not in metrics
    torch.testing.assert_close(loss - alone, 0.3 * balance.double(), rtol=1e-6, atol=0)


def test_a_router_loss_of_other_arguments_is_an_error(monkeypatch):
    def unusual(gate_logits, num_experts, num_keys, top_k=2, attention_mask=None):
        raise AssertionError("called")

    model = family("mixtral")
    monkeypatch.setattr(f"{type(model).__module__}.load_balancing_loss_func", unusual)
    with pytest.raises(ValueError, match="router loss of MixtralForCausalLM takes .*num_keys"):
        fused(model, pairs())


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


def test_an_offloaded_head_is_an_error():
    model = family("llama")
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match=r"weight of the head: got shape \(101, 32\) on the meta"):
        fp.LMHead.of(model)


def test_a_part_of_a_head_is_an_error():
    model = family("llama")
    model.lm_head = nn.Linear(32, 50, bias=False)
    with pytest.raises(ValueError, match="its head has 50 rows, its config a vocabulary of 101"):
        fp.LMHead.of(model)


def test_check_head_finds_what_the_head_does_not_describe():
    model = family("granite")
    check_head(model)
    model.train()
    model.model.norm.eval()
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + 0.01 * logits**2)
    with pytest.raises(ValueError, match="GraniteForCausalLM does more than `LMHead` describes"):
        check_head(model)
    assert model.training and model.model.training and not model.model.norm.training


def test_a_layer_between_backbone_and_output_embedding_is_an_error():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.RobertaConfig(vocab_size=101, is_decoder=True, **sizes)
    model = transformers.RobertaForCausalLM(config)
    with pytest.raises(ValueError, match=r"\(lm_head.dense.weight, .*before its output embedding"):
        fp.LMHead.of(model)


def test_a_batch_without_tokens_is_an_error():
    with pytest.raises(ValueError, match="input_ids: got none in 'inputs_embeds', needs token ids"):
        last_hidden(family("llama"), {"inputs_embeds": torch.ones(1, 2, 32)})
