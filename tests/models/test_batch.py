"""Batches in other layouts: sequences packed in one row, prompts shared by pairs."""

from __future__ import annotations

import pytest
import torch
import transformers
from model_families import assert_gradients, family, gradients
from tiny_models import VOCAB, pair_features, tiny_llama

import fused_prefopt as fp
from fused_prefopt.data import PairCollator
from fused_prefopt.integrations.transformers import attach, preference_outputs
from fused_prefopt.models.batch import completion_logps
from fused_prefopt.models.layout_check import require_separate_sequences
from fused_prefopt.reference import add_reference_logps

IDS = torch.zeros(1, 1, dtype=torch.int64)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
FEW = {"vocab_size": VOCAB, "hidden_size": 16}
HYBRID = SIZES | {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
# Config class and options of models whose sequences run into one another in a row.
LEAKING = {
    "linear attention": ("Qwen3NextConfig", HYBRID),
    "convolution": ("Lfm2Config", SIZES | {"layer_types": ["conv", "full_attention"]}),
    "state space": ("MambaConfig", FEW | {"state_size": 4, "num_hidden_layers": 2}),
    "ALiBi": ("BloomConfig", FEW | {"n_layer": 2, "n_head": 2}),
    "ALiBi by an option": (
        "FalconConfig",
        FEW | {"num_hidden_layers": 2, "num_attention_heads": 2, "alibi": True},
    ),
    "a mask without positions": (
        "OPTConfig",
        FEW
        | {"ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"word_embed_proj_dim": 16, "max_position_embeddings": 64},
    ),
}


def built(kind, options):
    if not hasattr(transformers, kind):
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for value in model.parameters():
        # As far from zero as trained weights.
        torch.nn.init.normal_(value, mean=float(value.dim() == 1), std=0.3)
    return model


def passes_of(model):
    """Counts the backbone's forward passes from now on."""
    passes = []
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    return passes


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "gpt-neox", "phi", "mixtral"])
def test_packed_sequences_have_the_losses_of_padded_ones(name):
    model, features, loss_fn = family(name), pair_features(5), fp.PreferenceLoss("simpo")
    padded, packed = (
        preference_outputs(model, loss_fn, PairCollator(0, padding_free=free)(features))
        for free in (False, True)
    )
    # The models' norms, rotations and softmax are fp32 in any dtype.
    torch.testing.assert_close(packed.losses, padded.losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", LEAKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_sequences_run_into_one_another_is_refused(name, dtype):
    model, features = built(*LEAKING[name]).to(dtype), pair_features(4)
    loss_fn = fp.PreferenceLoss("simpo")
    message = f"padding_free: got a {type(model).__name__} with .* whose packed sequences see one"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            preference_outputs(model, loss_fn, PairCollator(0, padding_free=True)(features))
    with pytest.raises(ValueError, match=message):
        add_reference_logps(model, features, PairCollator(0, padding_free=True), progress=False)
    assert preference_outputs(model, loss_fn, PairCollator(0)(features)).loss.isfinite()


@pytest.mark.parametrize("name", ["llama4, text half", "qwen2-vl"])
def test_a_model_is_refused_where_its_packed_losses_are_others(name, monkeypatch):
    # Which release of transformers keeps these models' sequences apart differs: of Qwen2-VL later
    # ones want three rows of positions beside the one that tells sequences apart.
    model, features, loss_fn = family(name), pair_features(5), fp.PreferenceLoss("simpo")
    padded = preference_outputs(model, loss_fn, PairCollator(0)(features)).losses
    with monkeypatch.context() as untried:
        where = f"{completion_logps.__module__}.require_separate_sequences"
        untried.setattr(where, lambda *_: None)
        batch = PairCollator(0, padding_free=True)(features)
        packed = preference_outputs(model, loss_fn, batch).losses
    # The models' norms, rotations and softmax are fp32 in any dtype.
    if torch.allclose(packed, padded, rtol=1e-5, atol=0):
        require_separate_sequences(model, IDS)
    else:
        with pytest.raises(ValueError, match="whose packed sequences see one another"):
            require_separate_sequences(model, IDS)


RWKV = FEW | {"num_hidden_layers": 2, "attention_hidden_size": 16}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (("RwkvConfig", RWKV), "whose two sides of a pair see each other"),
        (LEAKING["ALiBi"], r"takes no attention mask of \(1, 1, 4, 4\)"),
    ],
)
def test_a_model_is_refused_whose_sides_of_a_pair_see_each_other(config, said):
    """Neither config tells of its recurrent layers, or of positions of its own."""
    model, features = built(*config), pair_features(2)
    with pytest.raises(ValueError, match=f"^shared_prompt: got a .*{said}"):
        completion_logps(model, PairCollator(0, shared_prompt=True)(features))


def test_a_model_is_tried_once_for_each_attention_it_has():
    model = tiny_llama(attn_implementation="sdpa")
    passes = passes_of(model)
    for _ in range(2):
        require_separate_sequences(model, IDS)
    assert len(passes) == 2
    model.set_attn_implementation("eager")
    require_separate_sequences(model, IDS)
    assert len(passes) == 4


def test_the_trial_leaves_mode_randomness_and_gradients_alone():
    model = tiny_llama(attention_dropout=0.5).train()
    model.model.norm.eval()
    state = torch.random.get_rng_state()
    require_separate_sequences(model, IDS)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and model.model.layers[0].training and not model.model.norm.training


def test_autocasts_cache_does_not_keep_what_the_trial_has_cast():
    batch, loss_fn = (
        PairCollator(0, padding_free=True)(pair_features(4)),
        fp.PreferenceLoss("simpo"),
    )
    tried, fresh = tiny_llama(), tiny_llama()
    require_separate_sequences(tried, IDS)
    for model in (tried, fresh):
        with torch.autocast("cpu", torch.bfloat16):
            preference_outputs(model, loss_fn, batch).loss.backward()
    for (name, wanted), got in zip(tried.named_parameters(), fresh.parameters(), strict=True):
        assert wanted.grad is not None and torch.equal(got.grad, wanted.grad), name


# Pairs with their prompt once in a row, against the plain layout


def llama(attention: str):
    return tiny_llama(attn_implementation=attention)


def gemma2(attention: str, window: int = 64):
    torch.manual_seed(0)
    options = {"head_dim": 8, "sliding_window": window, "attn_implementation": attention}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, **options))


def computed(model, collator, features, name="simpo"):
    result = preference_outputs(model, fp.PreferenceLoss(name), collator(features))
    return result, gradients(model, result.loss)


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize(
    ("build", "attention"), [(llama, "eager"), (llama, "sdpa"), (gemma2, "eager")]
)
def test_values_and_gradients_are_those_of_the_plain_layout(build, attention, multiple):
    model, features = build(attention).double(), pair_features(7)
    collator = PairCollator(0, pad_to_multiple_of=multiple, shared_prompt=True)
    ours, found = computed(model, collator, features)
    plain, wanted = computed(model, PairCollator(0), features)
    # The model's norms, rotations and softmax are fp32 in any dtype.
    torch.testing.assert_close(ours.losses, plain.losses, rtol=1e-6, atol=0)
    assert_gradients(found, wanted, 1e-6)
    for name, value in plain.metrics.items():
        torch.testing.assert_close(ours.metrics[name], value, rtol=1e-6, atol=1e-6)


def test_the_prompt_goes_through_the_backbone_once():
    features = pair_features(5)
    batch = PairCollator(0, shared_prompt=True)(features)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    tokens = sum(len(feature[name]) for feature in features for name in names)
    assert int((batch["segments"] != 3).sum()) == tokens
    completions = sum(len(feature[name]) for feature in features for name in names[1:])
    assert len(batch["targets"]) == completions == int(batch["completion_mask"].sum())


@pytest.mark.parametrize("name", ["simpo", "odpo"])
def test_rows_without_a_prompt_or_with_columns_of_their_own(name):
    """Nothing predicts a first token behind no prompt; scores and references come along."""
    model, features = llama("sdpa").double(), pair_features(4)
    for feature in features:
        if name == "simpo":
            feature["prompt_ids"] = []
            feature["chosen_ids"] += [3]
            feature["rejected_ids"] += [4]
        else:
            feature |= {"ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0}
    ours, _ = computed(model, PairCollator(0, shared_prompt=True), features, name)
    plain, _ = computed(model, PairCollator(0), features, name)
    torch.testing.assert_close(ours.losses, plain.losses, rtol=1e-6, atol=0)


def test_attached_models_take_it():
    model = llama("sdpa")
    attach(model, fp.PreferenceLoss("simpo"))
    features = pair_features(4)
    ours = model(**PairCollator(0, shared_prompt=True)(features))["loss"]
    torch.testing.assert_close(ours, model(**PairCollator(0)(features))["loss"])


def test_attention_that_a_mask_does_not_decide_is_refused():
    batch = PairCollator(0, shared_prompt=True)(pair_features(4))
    loss_fn = fp.PreferenceLoss("simpo")
    with pytest.raises(ValueError, match="sliding window of 4"):
        preference_outputs(gemma2("eager", window=4), loss_fn, batch)
    mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=4))
    with pytest.raises(ValueError, match="sliding window of 4"):
        preference_outputs(mistral, loss_fn, batch)
    model = llama("sdpa")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        preference_outputs(model, loss_fn, batch)
    with pytest.raises(ValueError, match="shared_prompt: got True with padding_free"):
        PairCollator(0, padding_free=True, shared_prompt=True)
