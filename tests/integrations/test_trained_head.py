"""Checkpoints without a language model's head are no policies and no references."""

from __future__ import annotations

import pytest
import torch
from test_integrations_transformers import arguments, lora, pairs_with_reference
from tiny_models import VOCAB, pair_features, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2Model,
    LlamaForSequenceClassification,
    LlamaModel,
    Trainer,
)

import fused_prefopt as fp
from fused_prefopt.data import PairCollator
from fused_prefopt.integrations.head_check import require_trained_head
from fused_prefopt.integrations.transformers import PreferenceTrainer, attach

OTHERS = {
    "LlamaModel": LlamaModel,
    "LlamaForSequenceClassification": LlamaForSequenceClassification,
}


def loaded(folder, make, **options):
    """A model saved as another class and loaded as a causal one."""
    config = tiny_llama(pad_token_id=0, **options).config
    config.architectures = None
    make(config).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def refusal(name, folder, argument="model"):
    return (
        rf"^{argument}: got a checkpoint \({folder}\) of a {name}, which has no head of a"
        r" LlamaForCausalLM, so this one's is random; needs a causal language model's checkpoint,"
        r" or, where the head is trained after all, config.architectures=\['LlamaForCausalLM'\]$"
    )


@pytest.mark.parametrize("name", OTHERS)
def test_a_random_head_is_refused(tmp_path, name):
    model, wanted = loaded(tmp_path, OTHERS[name]), refusal(name, tmp_path)
    with pytest.raises(ValueError, match=wanted):
        require_trained_head(model)
    with pytest.raises(ValueError, match=wanted):
        attach(model, fp.PreferenceLoss("simpo"))
    given = {"args": arguments(tmp_path), "train_dataset": pairs_with_reference()}
    given |= {"data_collator": PairCollator(0)}
    with pytest.raises(ValueError, match=wanted):
        PreferenceTrainer(model, loss_fn=fp.PreferenceLoss("dpo"), **given)
    with pytest.raises(ValueError, match=wanted):
        attach(Trainer(model, **given), fp.PreferenceLoss("dpo"))
    with pytest.raises(ValueError, match=refusal(name, tmp_path, "reference")):
        attach(tiny_llama(), fp.PreferenceLoss("dpo"), reference=model)
    # The message's own way out.
    model.config.architectures = ["LlamaForCausalLM"]
    attach(model, fp.PreferenceLoss("simpo"))


def test_so_it_is_below_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(loaded(tmp_path, LlamaModel), config)
    with pytest.raises(ValueError, match=refusal("LlamaModel", tmp_path)):
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
    attach(model, fp.PreferenceLoss("simpo"))
    model.save_pretrained(tmp_path / "first")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert again.config._name_or_path and torch.equal(again.lm_head.weight, model.lm_head.weight)
    trainer = PreferenceTrainer(
        again,
        arguments(tmp_path),
        train_dataset=pair_features(8),
        data_collator=PairCollator(0),
        loss_fn=fp.PreferenceLoss("simpo"),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "second"))
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert torch.equal(last.lm_head.weight, again.lm_head.weight)
    attach(last, fp.PreferenceLoss("simpo"))


@pytest.mark.parametrize(
    "architecture",
    ["GPT2LMHeadModel", "LlamaForCausalLM", "LlavaForConditionalGeneration", "BaichuanForCausalLM"],
)
def test_other_classes_with_a_head_are_taken(architecture):
    model = tiny_llama()
    model.config._name_or_path, model.config.architectures = "some/model", [architecture]
    require_trained_head(model)


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_trls_trainers_refuse_it_too(tmp_path, kind):
    pytest.importorskip("trl")
    from data_tokenizer import tiny_tokenizer
    from test_integrations_trl import options
    from test_integrations_trl_checks import KINDS

    make, config, data = KINDS[kind]
    base = loaded(tmp_path / "base", LlamaModel)
    given = {"args": config(**options(tmp_path)), "train_dataset": data()}
    given["processing_class"] = tiny_tokenizer()
    wanted = refusal("LlamaModel", tmp_path / "base")
    with pytest.raises(ValueError, match=wanted):
        make(base, ref_model=tiny_llama(), **given)
    with pytest.raises(ValueError, match=refusal("LlamaModel", tmp_path / "base", "ref_model")):
        make(tiny_llama(), ref_model=base, **given)
    tiny_llama().save_pretrained(tmp_path / "causal")
    run = make(str(tmp_path / "causal"), ref_model=tiny_llama(), **given)
    assert torch.equal(run.model.lm_head.weight, tiny_llama().lm_head.weight)


@pytest.mark.parametrize("name", OTHERS)
def test_trls_dpo_given_a_folders_name_refuses_it(tmp_path, name):
    pytest.importorskip("trl")
    from data_tokenizer import tiny_tokenizer
    from test_integrations_trl import dataset, options

    from fused_prefopt.integrations.trl import FusedDPOConfig, FusedDPOTrainer

    loaded(tmp_path / "other", OTHERS[name])
    wanted = f" of a {name}, which has no language model's head; needs a causal language model's"
    with pytest.raises(ValueError, match=wanted):
        FusedDPOTrainer(
            str(tmp_path / "other"),
            ref_model=tiny_llama(),
            args=FusedDPOConfig(**options(tmp_path)),
            train_dataset=dataset(),
            processing_class=tiny_tokenizer(),
        )


def test_a_name_is_looked_up_as_trl_loads_it(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from data_tokenizer import tiny_tokenizer
    from test_integrations_trl import dataset, options

    from fused_prefopt.integrations import trl_parts
    from fused_prefopt.integrations.trl import FusedDPOConfig, FusedDPOTrainer

    seen = []
    monkeypatch.setattr(
        trl_parts, "require_causal_checkpoint", lambda name, **given: seen.append((name, given))
    )
    folder = str(tmp_path / "causal")
    tiny_llama().save_pretrained(folder)
    loading = {"revision": "main", "dtype": "float32", "device_map": None}
    FusedDPOTrainer(
        folder,
        ref_model=tiny_llama(),
        args=FusedDPOConfig(**options(tmp_path), model_init_kwargs=loading, trust_remote_code=True),
        train_dataset=dataset(),
        processing_class=tiny_tokenizer(),
    )
    assert seen == [(folder, {"revision": "main", "trust_remote_code": True})]
