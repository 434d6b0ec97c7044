"""Models that see images, in float64 against their own logits: every parameter, every input."""

from __future__ import annotations

import pytest
import torch
import transformers
from model_families import (
    assert_gradients,
    fused,
    gradients,
    own_loss,
    own_sums,
    pairs,
)
from tiny_images import FAMILIES, image_pairs, processor, vision_model
from torch import nn

import fused_prefopt as fp
from fused_prefopt.integrations.transformers import attach
from fused_prefopt.models.batch import completion_logps

collators = pytest.importorskip("trl.trainer.dpo_trainer")


def collated(name, count=3):
    """A batch as TRL's collator makes it."""
    collator = collators.DataCollatorForVisionPreference(processor(name))
    return dict(collator(list(image_pairs(name, count))))


@pytest.mark.parametrize(
    ("name", "text"),
    [(name, {}) for name in FAMILIES] + [("gemma3", {"final_logit_softcapping": 2.0})],
    ids=str,
)
def test_loss_and_gradients_are_those_of_the_models_own_logits(name, text):
    """In training mode, with another model for the reference."""
    model, reference = (vision_model(name, seed, **text).double() for seed in (0, 5))
    batch, loss_fn = collated(name), fp.PreferenceLoss("dpo")
    truth = own_loss(model, batch, loss_fn, reference=own_sums(reference, batch).detach())
    wanted = gradients(model, truth)
    loss, got, _ = fused(model, batch, loss_fn, reference=reference)
    torch.testing.assert_close(loss, truth, rtol=1e-9, atol=0)
    assert_gradients(got, wanted)
    towers = {name for name in wanted if "vis" in name}
    assert towers and all(wanted[name].any() for name in towers if name.endswith("weight"))
    sums = completion_logps(model, batch)["completion"]
    torch.testing.assert_close(sums, own_sums(model, batch).detach())


@pytest.mark.parametrize("left_out", ["pixel_values", "image_grid_thw", "token_type_ids"])
def test_every_input_of_images_counts(left_out):
    """Without one of them the log-probs are others, or the model refuses."""
    name = "gemma3" if left_out == "token_type_ids" else "qwen2-vl"
    model, batch = vision_model(name).double().eval(), collated(name)
    whole = completion_logps(model, batch)["completion"]
    part = {each: value for each, value in batch.items() if each != left_out}
    try:
        assert not torch.allclose(completion_logps(model, part)["completion"], whole)
    except (ValueError, TypeError, AttributeError) as error:
        assert left_out == "image_grid_thw", error


@pytest.mark.parametrize(
    ("option", "fields"),
    [
        ("shared_prompt", {"segments": torch.zeros(2, 1, 4)}),
        ("padding_free", {"sequence_ids": torch.zeros(1, 8), "num_sequences": 2}),
    ],
)
def test_images_need_a_row_for_each_sequence(option, fields):
    model, batch = vision_model("llava"), collated("llava") | fields
    with pytest.raises(ValueError, match=rf"{option}: got images \(pixel_values\)"):
        completion_logps(model, batch)


def test_what_a_model_takes_and_its_backbone_is_not_given_is_refused():
    class Cropping(type(vision_model("llava"))):
        def forward(self, input_ids=None, num_crops=None, **kwargs):
            return super().forward(input_ids=input_ids, **kwargs)

    model, batch = vision_model("llava"), collated("llava")
    model.__class__ = Cropping
    assert completion_logps(model, batch | {"num_images": torch.ones(6)})
    attach(model, fp.PreferenceLoss("simpo"))
    with pytest.raises(ValueError, match="num_crops: got num_crops for a Cropping, needs what"):
        model(**batch, num_crops=torch.ones(6))


def test_a_model_that_puts_images_between_the_tokens_is_refused():
    """GIT puts an image's hidden states in front of those of the text."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.GitConfig(
        vision_config=vision, vocab_size=101, num_attention_heads=2, **sizes
    )
    model, batch = transformers.GitForCausalLM(config).double().eval(), pairs(1)
    nn.init.normal_(model.output.weight)
    torch.testing.assert_close(
        completion_logps(model, batch)["completion"], own_sums(model, batch).detach()
    )
    batch["pixel_values"] = torch.randn(2, 3, 8, 8).double()
    with pytest.raises(ValueError, match=r"model: got \d+ hidden states of a GitForCausalLM for"):
        completion_logps(model, batch)


def test_a_backbone_whose_attention_asks_for_labels_gets_them():
    """Before transformers 5 PaliGemma's completions see all that follows where there are none."""
    seen = []

    class Recording(type(vision_model("gemma3").model)):
        def forward(self, *args, labels=None, **kwargs):
            seen.append(labels)
            return super().forward(*args, **kwargs)

    model, batch = vision_model("gemma3"), collated("gemma3")
    model.model.__class__ = Recording
    completion_logps(model, batch)
    assert torch.equal(seen[0], batch["input_ids"].where(batch["completion_mask"] == 1, -100))
