"""A head whose weights are elsewhere: gathered by hooks around its own modules, or an error."""

from __future__ import annotations

import copy

import pytest
import torch

import fused_prefopt as fp

pytest.importorskip("transformers")

from model_families import assert_gradients, family, fused, pairs
from partitioned import Partitioned

from fused_prefopt.integrations.causal_lm import through_head

PATHS = ("auto", "local", "recompute")


def lora_on_the_head(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "lm_head"])
    return peft.get_peft_model(model, config).double().eval()


def copied_head(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return peft.get_peft_model(model, config).double().eval()


def trained_head(model):
    return model


def frozen_head(model):
    model.lm_head.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("wrap", [trained_head, frozen_head, lora_on_the_head, copied_head])
def test_a_partitioned_head_is_gathered_by_its_own_modules_hooks(wrap, path):
    model, batch = wrap(family("granite")), pairs()
    loss, wanted, _ = fused(copy.deepcopy(model), batch)
    parts = Partitioned(model)
    got_loss, got, _ = fused(model, batch, path=path)
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

    def fails(*_):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        through_head(model, hidden, fails)
    assert torch.equal(layer(hidden), before)
