"""`LMHead.of`: the head of real Hugging Face models, wrapped and adapted ones too."""

from __future__ import annotations

import copy

import pytest
import torch
from truth import aligned, largest_error, relative

from fused_prefopt import LMHead, sequence_logps, token_logps
from fused_prefopt.integrations.causal_lm import backbone_of, unwrapped

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 61, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
GEMMA = {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
RECURRENT = {
    "num_hidden_layers": 3,
    "logits_soft_cap": 2.0,
    "lru_width": 16,
    "attention_window_size": 8,
}
# Name → config class, its options, and what the head must be: softcap, logit_scale, bias.
MODELS = {
    "llama": ("LlamaConfig", SIZES, (None, 1.0, False)),
    "qwen2": ("Qwen2Config", SIZES | {"tie_word_embeddings": True}, (None, 1.0, False)),
    "gemma2": ("Gemma2Config", SIZES | GEMMA, (3.0, 1.0, False)),
    "gemma2 without a softcap": (
        "Gemma2Config",
        SIZES | GEMMA | {"final_logit_softcapping": None},
        (None, 1.0, False),
    ),
    "cohere": ("CohereConfig", SIZES | {"logit_scale": 0.25}, (None, 0.25, False)),
    "granite": ("GraniteConfig", SIZES | {"logits_scaling": 4.0}, (None, 0.25, False)),
    "recurrent gemma": ("RecurrentGemmaConfig", SIZES | RECURRENT, (2.0, 1.0, False)),
    "falcon h1": (
        "FalconH1Config",
        SIZES | {"lm_head_multiplier": 0.5, "mamba_d_ssm": 16, "mamba_n_heads": 2},
        (None, 0.5, False),
    ),
    "gpt2": ("GPT2Config", GPT2, (None, 1.0, False)),
    "phi": ("PhiConfig", SIZES, (None, 1.0, True)),
    "hyperclovax": ("HyperCLOVAXConfig", SIZES | {"logits_scaling": 0.25}, (None, 0.25, False)),
}


def tiny(name: str) -> torch.nn.Module:
    """A random float64 model in eval mode, with logits of some size."""
    config_class, options, _ = MODELS[name]
    if not hasattr(transformers, config_class):
        pytest.skip(f"this transformers has no {config_class}")
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    head = model.get_output_embeddings()
    torch.nn.init.normal_(head.weight)
    if getattr(head, "bias", None) is not None:
        torch.nn.init.normal_(head.bias)
    return model


def batch(size: int = 3, length: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 61, (size, length), generator=generator)
    return ids, ids.masked_fill(torch.arange(length) < 2, -100)


def of_model(model, ids, labels):
    """Token log-probs by the model's own logits."""
    logits = model(input_ids=ids, use_cache=False).logits
    return aligned(logits.double().log_softmax(-1), labels)


def fused(model, ids, labels):
    hidden = backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    return token_logps(hidden, LMHead.of(model), labels)


def assert_same_logps(model, tolerance=1e-10):
    ids, labels = batch()
    assert largest_error(fused(model, ids, labels), of_model(model, ids, labels)) <= tolerance


@pytest.mark.parametrize("name", MODELS)
def test_logps_are_those_of_the_model(name):
    model = tiny(name)
    softcap, scale, bias = MODELS[name][2]
    head = LMHead.of(model)
    assert (head.softcap, head.logit_scale, head.bias is not None) == (softcap, scale, bias)
    assert head.weight is model.get_output_embeddings().weight
    assert head.valid_vocab is None
    assert_same_logps(model)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_model(name):
    ids, labels = batch()
    model = tiny(name)
    other = copy.deepcopy(model)
    fused(model, ids, labels).sum().backward()
    of_model(other, ids, labels).sum().backward()
    wanted = dict(other.named_parameters())
    for parameter, value in model.named_parameters():
        truth = wanted[parameter].grad
        assert (value.grad is None) == (truth is None), parameter
        if truth is not None and truth.norm() > 1e-9:
            assert relative(value.grad, truth) <= 1e-8, parameter


def test_a_vocabulary_padded_beyond_the_config():
    model = tiny("llama")
    padded = torch.nn.Linear(16, 64, bias=False, dtype=torch.float64)
    with torch.no_grad():
        padded.weight[:61] = model.lm_head.weight
    ids, labels = batch()
    wanted = of_model(model, ids, labels)
    model.lm_head = padded
    assert LMHead.of(model).valid_vocab == 61
    assert largest_error(fused(model, ids, labels), wanted) <= 1e-10


def test_resized_embeddings_are_all_vocabulary():
    model = tiny("llama")
    model.resize_token_embeddings(64, mean_resizing=False)
    head = LMHead.of(model)
    assert head.vocab == 64 and head.valid_vocab is None
    assert_same_logps(model)


def test_wrappers_are_seen_through():
    model = tiny("llama")
    wrapped = torch.nn.Module()
    wrapped.module = model
    assert unwrapped(wrapped) is model
    assert LMHead.of(wrapped).weight is model.lm_head.weight
    assert LMHead.of(torch.compile(wrapped)).weight is model.lm_head.weight
    assert backbone_of(torch.compile(model)) is model.model


def lora(model, **options):
    peft = pytest.importorskip("peft")
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(**settings | options)).double()


def test_lora_on_the_body_leaves_the_head_frozen_and_plans_stash():
    model = lora(tiny("llama"))
    ids, labels = batch()
    assert_same_logps(model)
    hidden = backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    out = sequence_logps(hidden, LMHead.of(model), labels)
    assert out.plan.path == "stash"
    other = copy.deepcopy(model)
    fused(model, ids, labels).sum().backward()
    of_model(other, ids, labels).sum().backward()
    wanted = {name: value.grad for name, value in other.named_parameters() if value.requires_grad}
    assert wanted and all("lora" in name for name in wanted)
    for name, value in model.named_parameters():
        if name in wanted:
            assert relative(value.grad, wanted[name]) <= 1e-8
    with model.disable_adapter():
        assert_same_logps(model)


@pytest.mark.parametrize("name", ["llama", "cohere", "phi"])
def test_modules_to_save_trains_its_copy_of_the_head(name):
    base = tiny(name)
    original = base.get_output_embeddings().weight
    model = lora(base, modules_to_save=["lm_head"])
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if "lm_head" in parameter and value.requires_grad:
                value.add_(torch.randn_like(value) * 0.1)
    head = LMHead.of(model)
    assert head.weight.requires_grad and head.weight is not original
    assert_same_logps(model)
    ids, labels = batch()
    fused(model, ids, labels).sum().backward()
    assert head.weight.grad.abs().sum() > 0
    with model.disable_adapter():
        assert LMHead.of(model).weight is original
        assert_same_logps(model)


def test_modules_to_save_of_another_active_adapter():
    peft = pytest.importorskip("peft")
    model = lora(tiny("llama"), modules_to_save=["lm_head"])
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    assert_same_logps(model)
    model.set_adapter("default")
    assert_same_logps(model)


def test_merged_lora_on_the_head_is_read():
    model = lora(tiny("llama"), target_modules=["q_proj", "lm_head"]).merge_and_unload()
    assert_same_logps(model)


def test_a_model_without_a_head_is_an_error():
    with pytest.raises(ValueError, match="LlamaModel has no output embedding"):
        LMHead.of(tiny("llama").model)
    with pytest.raises(ValueError, match="ReLU has no output embedding"):
        LMHead.of(torch.nn.ReLU())


def test_a_head_of_integers_is_an_error():
    model = tiny("llama")
    values = torch.ones(61, 16, dtype=torch.int8)
    model.lm_head.weight = torch.nn.Parameter(values, requires_grad=False)
    with pytest.raises(ValueError, match="int8, wanted a floating dtype"):
        LMHead.of(model)


def test_a_head_that_is_not_one_matmul_is_an_error():
    model = tiny("llama")
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 61))
    with pytest.raises(ValueError, match="its head is a Sequential"):
        LMHead.of(model)


def test_a_model_that_transforms_hidden_before_its_head_is_an_error():
    if not hasattr(transformers, "ModernBertDecoderConfig"):
        pytest.skip("this transformers has no ModernBertDecoderConfig")
    options = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    config = transformers.ModernBertDecoderConfig(
        **options, num_attention_heads=2, intermediate_size=24, pad_token_id=0
    )
    model = transformers.ModernBertDecoderForCausalLM(config)
    with pytest.raises(ValueError, match="before its output embedding"):
        LMHead.of(model)
