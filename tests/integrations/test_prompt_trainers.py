"""Trainers on adapters that learn a prompt: TRL's own beside ours, checkpoints, references."""

from __future__ import annotations

import copy

import pytest
import torch
from learned_prompts import KINDS, adapter, vivid_llama
from model_families import gradients, own_loss, own_sums
from tiny_models import pair_features
from trainers import (
    assert_bit_equal,
    assert_same_logs,
    beside,
    build,
    held_out,
    history,
    state_of,
)

import fused_prefopt as fp
from fused_prefopt.data import PairCollator
from fused_prefopt.reference import add_reference_logps

peft = pytest.importorskip("peft")
pytest.importorskip("trl")

pytestmark = pytest.mark.slow
LOSS = {"alpha": 0.3, "beta": 2.0, "gamma": 0.5}


def prompted(kind):
    torch.manual_seed(0)
    return peft.get_peft_model(vivid_llama(), adapter(kind))


@pytest.mark.parametrize(
    ("kind", "name", "existing", "changes"),
    [
        ("dpo", "encoder", False, {}),
        ("dpo", "projected prefix", False, {}),
        # TRL keeps a copy of the adapter, by the name "ref", to compare with.
        ("dpo", "prompt", True, {}),
        ("dpo", "prefix", True, {}),
        ("dpo", "prompt", False, {"precompute_ref_log_probs": True}),
        ("dpo", "prefix", True, {"precompute_ref_log_probs": True}),
        ("dpo", "prefix", False, {"ld_alpha": 0.3}),
        ("dpo", "prompt", False, {"gradient_checkpointing": True}),
        ("kto", "prompt", False, {}),
        ("kto", "prefix", False, {"precompute_ref_log_probs": True}),
    ],
    ids=str,
)
def test_the_curves_are_trls(tmp_path, kind, name, existing, changes):
    def make():
        given = {"eval_dataset": held_out(kind)}
        given |= {} if existing else {"peft_config": adapter(name)}
        return {"model": prompted(name) if existing else vivid_llama(), "given": given}

    options = {"max_steps": 4, "learning_rate": 0.1} | changes
    theirs, ours = beside(kind, tmp_path, make, **options)
    assert ("ref" in ours.model.peft_config) == existing
    for run in (theirs, ours):
        run.evaluate()
    # The policy starts as its own reference.
    names = assert_same_logs(theirs, ours, ties=int(existing))
    assert {"entropy", "logits/chosen", "eval_loss", "rewards/chosen", "grad_norm"} < names
    gains = history(ours, "rewards/chosen") + history(ours, "rewards/rejected")
    assert max(map(abs, gains)) > 1e-2
    if kind == "kto":
        assert len(history(ours, "kl")) == 4


def test_gradient_checkpointing_of_a_prefix_is_refused(tmp_path):
    given = {"peft_config": adapter("prefix")}
    run = build("dpo", tmp_path, given=given, gradient_checkpointing=True)
    with pytest.raises(ValueError, match="needs gradient_checkpointing=False"):
        run.train()


def preference_run(folder, kind, on="transformers", loss_fn=None, **options):
    loss_fn = loss_fn or fp.PreferenceLoss("alpha-dpo", **LOSS)
    given = {"loss": loss_fn, "reference": "adapter", "per_device_eval_batch_size": 8}
    given["given"] = {"eval_dataset": pair_features(6, seed=3)}
    return build(on, folder, model=prompted(kind), **given, **{"learning_rate": 0.1} | options)


EVERY = {"save_strategy": "steps", "save_steps": 1}
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_resuming_is_bit_equal(tmp_path, kind):
    whole = preference_run(tmp_path, kind, max_steps=4, **EVERY)
    whole.train()
    again = preference_run(tmp_path, kind, max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(history(whole, "loss")) == 4
    assert history(whole, "loss") == history(again, "loss")
    assert_bit_equal(state_of(whole), state_of(again))


@pytest.mark.parametrize(
    ("kind", "name"), [("prompt", "dpo"), ("prefix", "dpo"), ("prefix", "alpha-dpo")]
)
def test_the_best_checkpoint_is_the_best_evaluated(tmp_path, kind, name):
    """With the statistics that its loss had there."""
    options = {"learning_rate": 1.0, "max_steps": 4, "loss_fn": fp.PreferenceLoss(name)}
    run = preference_run(tmp_path, kind, **options, **EVERY, **BEST)
    run.train()
    losses = history(run, "eval_loss")
    assert len(losses) == 4
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize("kind", ["encoder", "projected prefix"])
def test_a_prompt_that_checkpoints_do_not_hold_whole_is_not_loaded_into_its_layers(tmp_path, kind):
    """PEFT saves what comes out of the layers, and loads it as what goes in."""
    preference_run(tmp_path, kind, max_steps=1, **EVERY).train()
    with pytest.raises(ValueError, match="resume_from_checkpoint: got an adapter whose prompt"):
        preference_run(tmp_path, kind).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with pytest.raises(ValueError, match="load_best_model_at_end: got an adapter whose prompt"):
        preference_run(tmp_path, kind, **EVERY, **BEST).train()


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_prompt_is_the_trained_one(tmp_path, kind):
    whole = preference_run(tmp_path / "run", kind, max_steps=6)
    start = copy.deepcopy(whole.model)
    whole.train()
    features = pair_features(5, seed=9)
    batch = PairCollator(0)(features)
    trained = own_sums(whole.model.eval(), batch).detach()
    assert (trained - own_sums(start.eval(), batch)).abs().max() > 0.1
    whole.save_model(str(tmp_path / "saved"))
    loaded = peft.PeftModel.from_pretrained(vivid_llama(), str(tmp_path / "saved")).eval()
    rows = add_reference_logps(loaded, features, PairCollator(0), progress=False)
    columns = ("ref_chosen_logps", "ref_rejected_logps")
    found = torch.tensor([row[name] for name in columns for row in rows])
    for sums in (own_sums(loaded, batch), found):
        torch.testing.assert_close(sums, trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on", ["transformers", "attached"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_the_first_step_and_the_evaluation_are_those_of_pefts_own_logits(tmp_path, kind, on):
    options = {"per_device_train_batch_size": 16, "optim": "sgd", "max_grad_norm": 0.0}
    run = preference_run(tmp_path, kind, on, **options)
    start, batch = copy.deepcopy(run.model).double(), PairCollator(0)(pair_features(16))
    reference = own_sums(vivid_llama().double(), batch).detach()
    truth = own_loss(start, batch, fp.PreferenceLoss("alpha-dpo", **LOSS), reference=reference)
    (wanted,) = gradients(start, truth).values()
    before = start.prompt_encoder["default"].embedding.weight.detach()
    run.train()
    assert history(run, "loss") == [pytest.approx(truth.item(), rel=1e-4)]
    moved = run.model.prompt_encoder["default"].embedding.weight.detach().double() - before
    torch.testing.assert_close(moved, -0.1 * wanted, rtol=1e-3, atol=1e-6)
    held_out = PairCollator(0)(pair_features(6, seed=3))
    sums = own_sums(run.model.double().eval(), held_out)
    run.model.float()
    evaluated = run.evaluate()
    assert evaluated["eval_logps/chosen"] == pytest.approx(sums[:6].mean().item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_cache_holds_the_log_probs_without_the_prompt(tmp_path, kind):
    given = {"reference_cache": tmp_path / "cache"}
    features, model = pair_features(6), prompted(kind)
    run = build("transformers", tmp_path, features, model=model, reference="adapter", given=given)
    wanted = own_sums(vivid_llama(), PairCollator(0)(features)).detach()
    names = ("ref_chosen_logps", "ref_rejected_logps")
    found = torch.tensor([row[name] for name in names for row in run.train_dataset])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    run.train()
    assert history(run, "loss")[0] != pytest.approx(0.693147, abs=1e-3)
