"""What a head does beyond `LMHead`, and checkpoints that have none of a language model."""

from __future__ import annotations

import pytest
import torch
from model_families import family
from tiny_models import VOCAB, tiny_llama
from trainers import lora
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2Model,
    LlamaForSequenceClassification,
    LlamaModel,
)

import fused_prefopt as fp
from fused_prefopt.integrations.transformers import attach
from fused_prefopt.models.head_check import check_head, require_trained_head


def test_check_head_finds_what_the_head_does_not_describe():
    model = family("granite")
    check_head(model)
    model.train()
    model.model.norm.eval()
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + 0.01 * logits**2)
    with pytest.raises(ValueError, match="GraniteForCausalLM does more than `LMHead` describes"):
        check_head(model)
    assert model.training and model.model.training and not model.model.norm.training


def loaded(folder, make, **options):
    """A model saved as another class and loaded as a causal one."""
    config = tiny_llama(pad_token_id=0, **options).config
    config.architectures = None
    make(config).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("make", [LlamaModel, LlamaForSequenceClassification])
def test_a_random_head_is_refused(tmp_path, make):
    model = loaded(tmp_path, make)
    wanted = (
        rf"^{{}}: got a checkpoint \({tmp_path}\) of a {make.__name__}, which has no head of a"
        r" LlamaForCausalLM, so this one's is random; needs a causal language model's checkpoint,"
        r" or, where the head is trained after all, config.architectures=\['LlamaForCausalLM'\]$"
    )
    with pytest.raises(ValueError, match=wanted.format("model")):
        require_trained_head(model)
    with pytest.raises(ValueError, match=wanted.format("model")):
        attach(model, fp.PreferenceLoss("simpo"))
    with pytest.raises(ValueError, match=wanted.format("reference")):
        attach(tiny_llama(), fp.PreferenceLoss("dpo"), reference=model)
    # The message's own way out.
    model.config.architectures = ["LlamaForCausalLM"]
    attach(model, fp.PreferenceLoss("simpo"))


def test_so_it_is_below_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(loaded(tmp_path, LlamaModel), config)
    with pytest.raises(ValueError, match=r"^model: got a checkpoint .* of a LlamaModel, which has"):
        attach(model, fp.PreferenceLoss("simpo"))
    require_trained_head(lora())


def test_a_head_that_is_the_input_embedding_is_trained(tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=VOCAB)
    GPT2Model(config).save_pretrained(tmp_path / "gpt2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    assert model.config.architectures == ["GPT2Model"]
    attach(model, fp.PreferenceLoss("simpo"))
    require_trained_head(loaded(tmp_path / "llama", LlamaModel, tie_word_embeddings=True))
    # Tied by hand: the config does not say so.
    model = loaded(tmp_path / "by hand", LlamaModel)
    model.lm_head.weight = model.model.embed_tokens.weight
    require_trained_head(model)


def test_causal_models_are_taken_new_saved_and_loaded_again(tmp_path):
    model = tiny_llama()
    for name in ("first", "second"):
        attach(model, fp.PreferenceLoss("simpo"))
        model.save_pretrained(tmp_path / name)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert again.config._name_or_path
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)
        model = again
    attach(model, fp.PreferenceLoss("simpo"))


@pytest.mark.parametrize(
    "architecture",
    ["GPT2LMHeadModel", "LlamaForCausalLM", "LlavaForConditionalGeneration", "BaichuanForCausalLM"],
)
def test_other_classes_with_a_head_are_taken(architecture):
    model = tiny_llama()
    model.config._name_or_path, model.config.architectures = "some/model", [architecture]
    require_trained_head(model)
