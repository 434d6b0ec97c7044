"""Deep copies of models that a loss is attached to, or that answer with log-probs."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from test_integrations_transformers import arguments, lora
from tiny_models import pair_features, tiny_llama

import fused_prefopt as fp
from fused_prefopt.data import PairCollator
from fused_prefopt.integrations.collated import completion_logps
from fused_prefopt.integrations.fronted_forward import has_front, put_in_front, take_away
from fused_prefopt.integrations.reference_pass import logps_through
from fused_prefopt.integrations.transformers import PreferenceTrainer, attach, preference_outputs

BATCH = PairCollator(0)(pair_features(4))
INPUTS = {name: BATCH[name] for name in ("input_ids", "attention_mask")}


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


def test_the_next_rounds_reference_is_a_copy_of_the_trained_model(tmp_path):
    features = pair_features(8)

    def trainer(model, reference):
        return PreferenceTrainer(
            model,
            arguments(tmp_path, max_steps=2),
            train_dataset=features,
            data_collator=PairCollator(0),
            loss_fn=fp.PreferenceLoss("dpo"),
            reference=reference,
        )

    first = trainer(tiny_llama(), tiny_llama(7))
    first.train()
    reference = copy.deepcopy(first.model)
    kept = {name: value.clone() for name, value in reference.state_dict().items()}
    second = trainer(first.model, reference)
    second.train()
    rewards = [row["rewards/chosen"] for row in second.state.log_history if "loss" in row]
    assert abs(rewards[0]) < 1e-5 < abs(rewards[1])
    assert all(torch.equal(value, kept[name]) for name, value in reference.state_dict().items())


@pytest.mark.slow
def test_a_copy_of_a_model_that_trl_has_patched_twice(tmp_path):
    pytest.importorskip("trl")
    from test_integrations_trl import dataset, options, trainer

    from fused_prefopt.integrations.trl import FusedDPOConfig, FusedDPOTrainer

    model, reference, config = tiny_llama(), tiny_llama(5), FusedDPOConfig(**options(tmp_path))
    for _ in range(2):
        run = trainer(FusedDPOTrainer, config, dataset(), model=model, ref_model=reference)
        batch = next(iter(run.get_train_dataloader()))
        twin = copy.deepcopy(run.model)
        wanted = torch.cat(run.compute_ref_log_probs(run.model, batch))
        spoil(run.model)
        assert torch.equal(torch.cat(run.compute_ref_log_probs(twin, batch)), wanted)
        assert not torch.equal(torch.cat(run.compute_ref_log_probs(run.model, batch)), wanted)
        reference = twin


def test_forwards_in_front_of_each_other():
    model, calls = tiny_llama(), []

    def named(name):
        def run(model, own, args, kwargs):
            calls.append(name)
            return own(*args, **kwargs)

        return run

    signature = inspect.signature(model.forward)
    assert not has_front(model)
    places = [put_in_front(model, named(name)) for name in "ab"]
    assert has_front(model) and inspect.signature(model.forward) == signature
    twin = copy.deepcopy(model)
    assert twin.forward.__self__ is twin and has_front(twin)
    wanted = tiny_llama()(**INPUTS).logits
    assert torch.equal(model(**INPUTS).logits, wanted) and calls == ["b", "a"]
    take_away(model, places[1])
    assert torch.equal(model(**INPUTS).logits, wanted) and calls == ["b", "a", "a"]
    take_away(model, places[0])
    assert torch.equal(model(**INPUTS).logits, wanted) and len(calls) == 3
    assert not has_front(model) and "forward" not in vars(model)
    assert torch.equal(twin(**INPUTS).logits, wanted) and len(calls) == 5


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
