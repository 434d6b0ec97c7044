"""Pairs with their prompt once in a row, against the plain layout."""

from __future__ import annotations

import pytest
import torch
from tiny_models import pair_features, tiny_llama
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM
from truth import relative

import fused_prefopt as fp
from fused_prefopt.data import PairCollator
from fused_prefopt.integrations.transformers import attach, preference_outputs
from fused_prefopt.types import LossOutput


def llama(attention: str):
    return tiny_llama(attn_implementation=attention)


def gemma2(attention: str, window: int = 64):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=window,
        attn_implementation=attention,
    )
    return Gemma2ForCausalLM(config)


def computed(model, collator, features, name="simpo") -> tuple[LossOutput, dict]:
    model.zero_grad()
    result = preference_outputs(model, fp.PreferenceLoss(name), collator(features))
    result.loss.backward()
    return result, {key: value.grad.clone() for key, value in model.named_parameters()}


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize(
    ("build", "attention"), [(llama, "eager"), (llama, "sdpa"), (gemma2, "eager")]
)
def test_values_and_gradients_are_those_of_the_plain_layout(build, attention, multiple):
    model, features = build(attention).double(), pair_features(7)
    collator = PairCollator(0, pad_to_multiple_of=multiple, shared_prompt=True)
    ours, gradients = computed(model, collator, features)
    plain, wanted = computed(model, PairCollator(0), features)
    # The model's norms, rotations and softmax are fp32 in any dtype.
    torch.testing.assert_close(ours.losses, plain.losses, rtol=1e-6, atol=0)
    for name, value in wanted.items():
        assert relative(gradients[name], value) <= 1e-6, name
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


def test_without_a_prompt_nothing_predicts_a_first_token():
    model, features = llama("sdpa").double(), pair_features(4)
    for feature in features:
        feature["prompt_ids"] = []
        feature["chosen_ids"] += [3]
        feature["rejected_ids"] += [4]
    ours, _ = computed(model, PairCollator(0, shared_prompt=True), features)
    plain, _ = computed(model, PairCollator(0), features)
    torch.testing.assert_close(ours.losses, plain.losses, rtol=1e-6, atol=0)


def test_the_columns_of_the_features_come_along():
    features = pair_features(4)
    for feature in features:
        feature |= {"ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0}
    model = llama("sdpa").double()
    ours, _ = computed(model, PairCollator(0, shared_prompt=True), features, "odpo")
    plain, _ = computed(model, PairCollator(0), features, "odpo")
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
    config = MistralConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=4,
    )
    with pytest.raises(ValueError, match="sliding window of 4"):
        preference_outputs(MistralForCausalLM(config), loss_fn, batch)
    model = llama("sdpa")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        preference_outputs(model, loss_fn, batch)
    with pytest.raises(ValueError, match="shared_prompt: got True with padding_free"):
        PairCollator(0, padding_free=True, shared_prompt=True)
