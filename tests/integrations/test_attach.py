"""A loss inside a model's forward: values of the model's own logits, references, copies."""

from __future__ import annotations

import copy

import pytest
import torch
from model_families import assert_gradients, gradients, own_kl, own_logits, own_sums
from tiny_models import pair_features, point_features, tiny_llama
from torch import nn
from trainers import lora

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.integrations.attach import Reference, _move, place
from fused_prefopt.integrations.transformers import attach, preference_outputs
from fused_prefopt.models.batch import completion_logps, logps_through
from fused_prefopt.models.model_call import has_front
from fused_prefopt.reference import add_reference_logps

META = torch.device("meta")
BATCH = PairCollator(0)(pair_features(4))
INPUTS = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")


@pytest.mark.parametrize("padding_free", [False, True])
def test_loss_of_a_batch_equals_the_models_own_logits(padding_free):
    model, features = tiny_llama().double(), pair_features(8)
    features = add_reference_logps(tiny_llama(7), features, PairCollator(0), progress=False)
    batch, loss_fn = PairCollator(0)(features), fp.PreferenceLoss("dpo")
    given = PairCollator(0, padding_free=padding_free)(features)
    result = preference_outputs(model, loss_fn, given)
    found = gradients(model, result.loss)
    reference = torch.cat([batch[name] for name in REFERENCES]).double()
    delta = 0.1 * (own_sums(model, batch) - reference)
    truth = -nn.functional.logsigmoid(delta[:8] - delta[8:]).mean()
    torch.testing.assert_close(result.loss, truth, rtol=1e-6, atol=0)
    assert_gradients(found, gradients(model, truth), 1e-5)


def test_dro_takes_the_prompts_own_log_ratio_from_the_same_pass():
    model, reference = tiny_llama().double(), tiny_llama(7).double()
    features, collator = point_features(6), PointCollator(0)
    rows = add_reference_logps(reference, features, collator, progress=False)
    loss_fn, batch = fp.PreferenceLoss("dro", beta=0.5, log_z0=1.0), collator(features)
    result = preference_outputs(model, loss_fn, collator(rows))
    ratio, prompt_ratio = (
        own_sums(model, batch, part) - own_sums(reference, batch, part)
        for part in ("completion", "prompt")
    )
    truth = (batch["rewards"] - 0.5 * ratio - 0.5 * (prompt_ratio + 1.0)).square()
    torch.testing.assert_close(result.losses, truth, rtol=1e-5, atol=1e-7)
    # So it does beside a reference at hand.
    single = tiny_llama()
    attach(single, loss_fn, reference=tiny_llama(7))
    found = single(**batch)["loss"]
    torch.testing.assert_close(found.double(), result.loss.double(), rtol=1e-5, atol=0)


def test_other_batches_go_the_models_own_way_and_detach_restores_it():
    model, ids = tiny_llama(), torch.arange(1, 9)[None]
    before = model(input_ids=ids).logits
    attachment = attach(model, fp.PreferenceLoss("simpo"))
    assert torch.equal(model(input_ids=ids).logits, before)
    assert set(model(**BATCH)) == {"loss"}
    attachment.detach()
    assert torch.equal(model(**BATCH).logits, tiny_llama()(**INPUTS).logits)


def test_statistics_freeze_in_evaluation():
    model = tiny_llama()
    margins = attach(model, fp.PreferenceLoss("gamma-simpo")).loss_fn.statistics.margins
    model.eval()
    model(**BATCH)
    assert margins.isnan().all()
    model.train()
    model(**BATCH)
    assert margins.isfinite().sum() == 4


@pytest.mark.parametrize("source", ["adapter", "model"])
@pytest.mark.parametrize("padding_free", [False, True])
def test_reference_log_probs_of_a_batch_that_has_none(source, padding_free):
    features, base = pair_features(4), tiny_llama() if source == "adapter" else tiny_llama(7)
    given = add_reference_logps(base, features, PairCollator(0), progress=False)
    collator, model = PairCollator(0, padding_free=padding_free), lora()
    wanted = preference_outputs(model.eval(), fp.PreferenceLoss("dpo"), collator(given))
    reference = "adapter" if source == "adapter" else base
    attachment = attach(model, fp.PreferenceLoss("dpo"), reference=reference)
    result = model(**collator(features))["loss"]
    torch.testing.assert_close(result, wanted.loss, rtol=1e-5, atol=0)
    assert attachment.pop_metrics("eval")["kl/chosen"] != 0
    # The reference is in eval mode: only the policy has the adapter's dropout.
    model.train()
    found = gradients(model, model(**collator(features))["loss"])
    assert found and all("lora" in name for name in found)
    metrics = attachment.pop_metrics("train")
    reference_sum = torch.tensor([feature["ref_chosen_logps"] for feature in given]).mean()
    found = metrics["logps/chosen"] - metrics["kl/chosen"]
    assert found == pytest.approx(reference_sum.item(), rel=1e-5)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("source", ["adapter", "model"])
@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("name", ["tdpo2", "alpha-dpo"])
def test_a_reference_at_hand_gives_the_divergence_of_the_tokens(name, source, padding_free):
    options = {"alpha-dpo": {"implicit_reference": "sequence_kl"}}.get(name, {})
    loss_fn, model = fp.PreferenceLoss(name, **options), lora().eval()
    base = tiny_llama() if source == "adapter" else tiny_llama(7)
    logits = own_logits(model, BATCH).double(), own_logits(base, BATCH).detach().double()
    fields = {"reference": own_sums(base.double(), BATCH).detach()}
    fields["sequence_kl"] = own_kl(*logits, BATCH)
    lengths = BATCH["completion_mask"][:, 1:].sum(1)
    policy = own_sums(model, BATCH).double()
    truth = loss_fn.eval().from_logps(fp.LogpBatch(policy, lengths, **fields)).loss
    wanted = gradients(model, truth)
    attach(model, loss_fn, reference="adapter" if source == "adapter" else base.float())
    result = model(**PairCollator(0, padding_free=padding_free)(pair_features(4)))["loss"]
    torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=0)
    assert_gradients(gradients(model, result), wanted, 1e-4)


# Models without values, references that are moved


def test_a_model_without_values_leaves_the_losses_statistics_alone():
    with META:
        model = tiny_llama()
    loss_fn = fp.PreferenceLoss("gamma-simpo")
    attach(model, loss_fn)
    assert all(value.device.type == "cpu" for value in loss_fn.buffers())
    whole = tiny_llama()
    model.to_empty(device="cpu").load_state_dict(whole.state_dict())
    for name, value in whole.named_buffers():
        model.get_buffer(name).copy_(value)
    model(**BATCH)
    assert loss_fn.statistics.margins.isfinite().sum() == 4


def test_a_loss_follows_the_hidden_states():
    loss_fn = fp.PreferenceLoss("gamma-simpo")
    _move(loss_fn, META)
    assert all(value.is_meta for value in loss_fn.buffers())
    with pytest.raises(ValueError, match="model: got one on mps, needs a device that has float64"):
        _move(loss_fn, torch.device("mps"))


def test_which_references_are_moved_to_an_accelerator():
    def devices(model):
        return {value.device.type for value in model.parameters()}

    class Special(nn.Parameter):
        """As quantised and flattened parameters are."""

    moved, kept = tiny_llama(), [tiny_llama() for _ in range(4)]
    for device in (META, torch.device("cpu")):
        place(moved, device)
        assert devices(moved) == {"meta"}
    next(kept[0].parameters()).ds_id = 3
    kept[1].hf_device_map = {"": "cpu"}
    kept[2].lm_head.weight = Special(kept[2].lm_head.weight.data)
    kept[3].lm_head.to(META)
    for model in kept:
        before = [value.device for value in model.parameters()]
        place(model, META)
        assert [value.device for value in model.parameters()] == before


def test_a_reference_is_moved_to_its_first_batch(monkeypatch):
    seen = []
    where = f"{Reference.__module__}.place"
    monkeypatch.setattr(where, lambda model, device: seen.append((model, device)))
    model, reference = tiny_llama(), tiny_llama(7)
    attach(model, fp.PreferenceLoss("dpo"), reference=reference)
    assert not seen
    for _ in range(2):
        model(**BATCH)
    adapted = lora()
    attach(adapted, fp.PreferenceLoss("dpo"), reference="adapter")
    adapted(**BATCH)
    assert seen == [(reference, torch.device("cpu"))]


# Deep copies of models that a loss is attached to, or that answer with log-probs


@torch.no_grad()
def spoil(model):
    for value in model.parameters():
        value.mul_(1.3)


def sums(model):
    return logps_through(model, BATCH)["completion"]


@pytest.mark.parametrize("kind", ["whole", "adapted"])
def test_a_copy_computes_with_its_own_weights(kind):
    model = (tiny_llama() if kind == "whole" else lora()).eval()
    attach(model, fp.PreferenceLoss("simpo"))
    twin = copy.deepcopy(model)
    logits, logps = model(**INPUTS).logits, sums(model)
    loss = model(**BATCH)["loss"]
    for other in (twin, copy.deepcopy(twin)):
        spoil(model)
        assert not torch.equal(sums(model), logps)
        assert torch.equal(other(**INPUTS).logits, logits)
        assert torch.equal(sums(other), logps)
        assert torch.equal(other(**BATCH)["loss"], loss)
    spoil(twin)
    other = preference_outputs(twin, fp.PreferenceLoss("simpo").eval(), BATCH).loss
    assert torch.equal(twin(**BATCH)["loss"], other) and not torch.equal(other, loss)


def test_a_copy_of_a_model_that_answers():
    model = tiny_llama()
    before = sums(model)
    twin = copy.deepcopy(model)
    spoil(model)
    assert torch.equal(sums(twin), before)
    assert torch.equal(sums(model), completion_logps(model, BATCH)["completion"])


def test_accelerates_autocast_around_a_front_is_still_one():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model = tiny_llama()
    attach(model, fp.PreferenceLoss("simpo"))
    AcceleratorState._reset_state(reset_partial_state=True)
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert prepared is model and has_front(model)
    before = sums(model)
    assert len(vars(model)["_forwards_behind"]) == 1
    twin = copy.deepcopy(model)
    spoil(model)
    assert torch.equal(sums(twin), before)
