"""PEFT's LoRA on the head itself, against the adapted model's own logits."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import eager_sums, pair_features, tiny_llama
from torch import nn
from truth import relative

import fused_prefopt as fp
from fused_prefopt.data import PairCollator
from fused_prefopt.integrations.transformers import attach, preference_outputs

peft = pytest.importorskip("peft")


def adapted(**options) -> nn.Module:
    """A tiny Llama in float64 with LoRA on its head; B is not 0."""
    settings = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, "target_modules": ["lm_head"]}
    config = peft.LoraConfig(**settings | options)
    return peft.get_peft_model(tiny_llama(), config).double()


def eager_loss(model: nn.Module, features: list[dict]) -> torch.Tensor:
    """SimPO through the model's own logits."""
    sums = [
        eager_sums(model, features, f"{side}_ids", "completion") for side in ("chosen", "rejected")
    ]
    lengths = [
        torch.tensor([len(feature[f"{side}_ids"]) for feature in features])
        for side in ("chosen", "rejected")
    ]
    return (
        fp.PreferenceLoss("simpo")
        .from_logps(fp.LogpBatch(torch.cat(sums), torch.cat(lengths)))
        .loss
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["q_proj", "lm_head"]},
        {"use_rslora": True},
        {"r": 1, "lora_alpha": 1},
    ],
    ids=["head", "head and body", "rank-stabilised", "rank 1"],
)
def test_loss_and_all_gradients_equal_the_models_own_logits(options):
    model, features = adapted(**options), pair_features(6)
    other = copy.deepcopy(model)
    result = preference_outputs(model, fp.PreferenceLoss("simpo"), PairCollator(0)(features))
    result.loss.backward()
    truth = eager_loss(other, features)
    truth.backward()
    torch.testing.assert_close(result.loss, truth, rtol=1e-6, atol=0)
    trained = {name: value for name, value in other.named_parameters() if value.requires_grad}
    assert any("lm_head.lora_B" in name for name in trained)
    for name, value in model.named_parameters():
        assert (value.grad is not None) == (name in trained), name
        if name in trained:
            assert relative(value.grad, trained[name].grad) <= 1e-6, name


def test_the_weight_stays_frozen_and_uncopied():
    model = adapted()
    head = fp.LMHead.of(model)
    layer = model.get_output_embeddings()
    assert head.weight is layer.base_layer.weight and not head.weight.requires_grad
    (term,) = head.low_rank
    assert term.b is layer.lora_B["default"].weight and term.scaling == pytest.approx(5 / 3)


def test_adapters_off_leave_the_reference():
    model, features = adapted(), pair_features(4)
    with model.disable_adapter():
        assert fp.LMHead.of(model).low_rank == ()
        ours = preference_outputs(model, fp.PreferenceLoss("simpo"), PairCollator(0)(features))
        torch.testing.assert_close(ours.loss, eager_loss(model, features), rtol=1e-6, atol=0)
    assert len(fp.LMHead.of(model).low_rank) == 1


def test_several_active_adapters_and_switching():
    model, features = adapted(), pair_features(4)
    config = {"r": 2, "init_lora_weights": False, "target_modules": ["lm_head"]}
    model.add_adapter("second", peft.LoraConfig(**config))
    model.double()
    for active, count in (("second", 1), (["default", "second"], 2)):
        model.base_model.set_adapter(active)
        assert len(fp.LMHead.of(model).low_rank) == count
        ours = preference_outputs(model, fp.PreferenceLoss("simpo"), PairCollator(0)(features))
        torch.testing.assert_close(ours.loss, eager_loss(model, features), rtol=1e-6, atol=0)


def test_merged_adapters_are_in_the_weight():
    model, features = adapted(), pair_features(4)
    before = preference_outputs(model, fp.PreferenceLoss("simpo"), PairCollator(0)(features)).loss
    model.merge_adapter()
    assert fp.LMHead.of(model).low_rank == ()
    after = preference_outputs(model, fp.PreferenceLoss("simpo"), PairCollator(0)(features)).loss
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)
    with model.disable_adapter(), pytest.raises(ValueError, match="merged into its head"):
        fp.LMHead.of(model)


def test_dropout_follows_the_mode():
    model = adapted(lora_dropout=0.3)
    assert fp.LMHead.of(model.train()).low_rank[0].dropout == 0.3
    assert fp.LMHead.of(model.eval()).low_rank[0].dropout == 0.0


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_other_adapters_on_the_head_are_refused(options):
    with pytest.raises(ValueError, match="'default' on its head is not plain LoRA"):
        fp.LMHead.of(adapted(**options))


def test_an_attached_model_trains():
    model = adapted().float()
    attach(model, fp.PreferenceLoss("simpo"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    batch, losses = PairCollator(0)(pair_features(6)), []
    for _ in range(8):
        loss = model(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
