"""Trainers on adapters that learn a prompt: TRL's own beside ours, checkpoints, references."""

from __future__ import annotations

import copy

import pytest
import torch

import fused_prefopt as fp

peft = pytest.importorskip("peft")
pytest.importorskip("trl")

from learned_prompts import KINDS, adapter, own_loss, own_sums  # noqa: E402
from model_families import gradients  # noqa: E402
from test_integrations_points import rows  # noqa: E402
from test_integrations_points import trainer as points_trainer  # noqa: E402
from test_integrations_transformers import arguments  # noqa: E402
from test_integrations_trl import TIMES, dataset, history, options, trainer  # noqa: E402
from test_resume import assert_bit_equal, outcome  # noqa: E402
from tiny_models import pair_features, tiny_llama  # noqa: E402
from transformers import Trainer  # noqa: E402
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer  # noqa: E402

from fused_prefopt.data import PairCollator  # noqa: E402
from fused_prefopt.integrations.transformers import PreferenceTrainer, attach  # noqa: E402
from fused_prefopt.integrations.trl import (  # noqa: E402
    FusedDPOConfig,
    FusedDPOTrainer,
    FusedKTOConfig,
    FusedKTOTrainer,
)
from fused_prefopt.reference import add_reference_logps  # noqa: E402

STEPS = 5


def vivid():
    """A tiny Llama whose weights are large enough for a prompt to matter."""
    model = tiny_llama()
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 2:
                value.mul_(10)
    return model


def prompted(kind, seed=0):
    torch.manual_seed(seed)
    return peft.get_peft_model(vivid(), adapter(kind))


def assert_same_curves(theirs, ours, ties=0):
    """The same numbers at every step; in the first `ties` rounding decides the accuracies."""
    for run in (theirs, ours):
        run.train()
        run.evaluate()
    names = {name for row in theirs.state.log_history for name in row} - TIMES
    assert {"entropy", "logits/chosen", "eval_loss", "rewards/chosen", "grad_norm"} < names
    for name in names:
        one, other = history(theirs, name), history(ours, name)
        assert len(other) == len(one), name
        if name == "rewards/accuracies":
            one, other = one[ties:], other[ties:]
        assert other == pytest.approx(one, rel=1e-4, abs=1e-4), name
    gains = history(ours, "rewards/chosen") + history(ours, "rewards/rejected")
    assert max(map(abs, gains)) > 1e-2


def dpo_run(kind, config, folder, name, existing, **changes):
    """A run of some steps, of a new adapter or of one that is there already."""
    given = options(folder, max_steps=STEPS, learning_rate=0.1, **changes)
    more = {"log_tokens": True} if config is FusedDPOConfig else {}
    torch.manual_seed(0)
    model = prompted(name) if existing else vivid()
    if not existing:
        torch.manual_seed(0)
    return trainer(
        kind,
        config(**given, **more),
        dataset(),
        model=model,
        eval_dataset=dataset(6),
        peft_config=None if existing else adapter(name),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "existing", "changes"),
    [
        ("prompt", False, {}),
        ("encoder", False, {}),
        ("prefix", False, {}),
        ("projected prefix", False, {}),
        # TRL keeps a copy of the adapter, by the name "ref", to compare with.
        ("prompt", True, {}),
        ("encoder", True, {}),
        ("prefix", True, {}),
        ("prompt", False, {"precompute_ref_log_probs": True}),
        ("prefix", True, {"precompute_ref_log_probs": True}),
        ("prefix", False, {"ld_alpha": 0.3}),
        ("prompt", False, {"gradient_checkpointing": True}),
    ],
    ids=str,
)
def test_the_curves_of_trls_own_dpo(tmp_path, name, existing, changes):
    theirs = dpo_run(DPOTrainer, DPOConfig, tmp_path, name, existing, **changes)
    ours = dpo_run(FusedDPOTrainer, FusedDPOConfig, tmp_path, name, existing, **changes)
    assert ("ref" in ours.model.peft_config) == existing
    # The policy starts as its own reference.
    assert_same_curves(theirs, ours, ties=int(existing))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prompt", "prefix"])
@pytest.mark.parametrize("precompute", [False, True])
def test_the_curves_of_trls_own_kto(tmp_path, name, precompute):
    runs = []
    for kind, config in ((KTOTrainer, KTOConfig), (FusedKTOTrainer, FusedKTOConfig)):
        changes = {"max_steps": STEPS, "learning_rate": 0.1}
        given = options(tmp_path, precompute_ref_log_probs=precompute, **changes)
        more = {"log_tokens": True} if config is FusedKTOConfig else {}
        torch.manual_seed(0)
        run = points_trainer(
            kind,
            config(**given, **more),
            model=vivid(),
            peft_config=adapter(name),
            eval_dataset=rows(10, label=[True, False] * 5),
        )
        runs.append(run)
    assert_same_curves(*runs)
    assert len(history(runs[1], "kl")) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_dro_compares_prompts_without_the_learned_one(tmp_path, name, precompute):
    given = options(tmp_path, max_steps=1, precompute_ref_log_probs=precompute)
    config = FusedKTOConfig(**given, loss="dro", loss_kwargs={"beta": 0.5, "log_z0": 1.0})
    torch.manual_seed(0)
    run = points_trainer(FusedKTOTrainer, config, model=vivid(), peft_config=adapter(name))
    batch = next(iter(run.get_train_dataloader()))
    found = run._reference_fields(run.model, batch)
    base = vivid().double()
    for field, part in (("reference", "completion"), ("prompt_reference", "prompt")):
        wanted = own_sums(base, batch, part).detach()
        torch.testing.assert_close(found[field].double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_gradient_checkpointing_of_a_prefix_is_refused(tmp_path):
    run = dpo_run(
        FusedDPOTrainer, FusedDPOConfig, tmp_path, "prefix", False, gradient_checkpointing=True
    )
    with pytest.raises(ValueError, match="needs gradient_checkpointing=False"):
        run.train()


def preference_run(folder, kind, source="adapter", **options):
    given = {"max_steps": 6, "per_device_train_batch_size": 4, "optim": "adamw_torch"}
    return PreferenceTrainer(
        prompted(kind),
        arguments(folder, **given | options),
        train_dataset=pair_features(16),
        eval_dataset=pair_features(6, seed=3),
        loss_fn=fp.PreferenceLoss("alpha-dpo", alpha=0.3, beta=2.0, gamma=0.5),
        reference=source,
    )


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_resuming_is_bit_equal(tmp_path, kind):
    whole = preference_run(tmp_path / "run", kind, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = preference_run(tmp_path / "run", kind)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert len(history(whole, "loss")) == 6
    assert_bit_equal(outcome(whole), outcome(resumed))


@pytest.mark.parametrize("kind", ["encoder", "projected prefix"])
def test_a_prompt_that_checkpoints_do_not_hold_whole_is_not_loaded_into_its_layers(tmp_path, kind):
    """PEFT saves what comes out of the layers, and loads it as what goes in."""
    every = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    preference_run(tmp_path, kind, **every).train()
    with pytest.raises(ValueError, match="resume_from_checkpoint: got an adapter whose prompt"):
        preference_run(tmp_path, kind).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ValueError, match="load_best_model_at_end: got an adapter whose prompt"):
        preference_run(tmp_path, kind, **every, **best).train()


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_the_best_checkpoint_is_the_best_evaluated(tmp_path, kind):
    every = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "learning_rate": 1.0}
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    run = preference_run(tmp_path, kind, **every, **best)
    run.train()
    losses = history(run, "eval_loss")
    assert len(losses) == 3
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_prompt_is_the_trained_one(tmp_path, kind):
    whole = preference_run(tmp_path / "run", kind)
    start = copy.deepcopy(whole.model)
    whole.train()
    batch = PairCollator(0)(pair_features(5, seed=9))
    trained = own_sums(whole.model.eval(), batch).detach()
    assert (trained - own_sums(start.eval(), batch)).abs().max() > 0.1
    whole.save_model(str(tmp_path / "saved"))
    loaded = peft.PeftModel.from_pretrained(vivid(), str(tmp_path / "saved")).eval()
    torch.testing.assert_close(own_sums(loaded, batch), trained, rtol=1e-5, atol=1e-5)
    rows = [*loaded_logps(loaded, pair_features(5, seed=9))]
    torch.testing.assert_close(torch.tensor(rows), trained, rtol=1e-5, atol=1e-5)


def loaded_logps(model, features):
    found = add_reference_logps(model, features, PairCollator(0), progress=False)
    return (row[name] for name in ("ref_chosen_logps", "ref_rejected_logps") for row in found)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_the_first_step_and_the_evaluation_are_those_of_pefts_own_logits(tmp_path, kind):
    run = preference_run(tmp_path, kind, per_device_train_batch_size=16, max_steps=1, optim="sgd")
    start = copy.deepcopy(run.model).double()
    loss_fn = fp.PreferenceLoss("alpha-dpo", alpha=0.3, beta=2.0, gamma=0.5)
    batch = PairCollator(0)(pair_features(16))
    reference = own_sums(vivid().double(), batch).detach()
    truth = own_loss(start, batch, loss_fn, reference=reference)
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
    features = pair_features(6)
    run = PreferenceTrainer(
        prompted(kind),
        arguments(tmp_path / "run"),
        train_dataset=features,
        loss_fn=fp.PreferenceLoss("dpo"),
        reference="adapter",
        reference_cache=tmp_path / "cache",
    )
    wanted = own_sums(vivid(), PairCollator(0)(features)).detach()
    names = ("ref_chosen_logps", "ref_rejected_logps")
    found = torch.tensor([row[name] for name in names for row in run.train_dataset])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    run.train()
    assert history(run, "loss")[0] != pytest.approx(0.693147, abs=1e-3)


def test_a_plain_trainer_with_an_attached_loss(tmp_path):
    run = Trainer(
        prompted("prompt"),
        arguments(tmp_path, max_steps=2),
        train_dataset=pair_features(8),
        data_collator=PairCollator(0),
    )
    attach(run, fp.PreferenceLoss("dpo"), reference="adapter")
    run.train()
    assert len(history(run, "rewards/margins")) == 2
    assert history(run, "rewards/margins")[1] > history(run, "rewards/margins")[0]
