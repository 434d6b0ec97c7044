"""transformers' Trainer: accumulation, caches of references, defaults, checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_models import pair_features, point_features, tiny_llama
from trainers import arguments, build, history, lora, pairs_with_reference
from transformers import Trainer, TrainingArguments

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.integrations.transformers import PreferenceTrainer, attach, preference_outputs
from fused_prefopt.reference import add_reference_logps

# One plain step on everything.
PLAIN = {"per_device_train_batch_size": 8, "optim": "sgd", "max_grad_norm": 0.0}


def test_gradient_accumulation_is_exact(tmp_path):
    results = []
    for accumulation in (1, 2, 4):
        options = {"per_device_train_batch_size": 8 // accumulation}
        options |= {"gradient_accumulation_steps": accumulation}
        # Large, so that rounding the weights does not hide the gradient.
        given = PLAIN | options | {"learning_rate": 20.0}
        run = build("transformers", tmp_path, pairs_with_reference(), **given)
        run.train()
        results.append(run.model.state_dict())
    start = tiny_llama().state_dict()
    for other in results[1:]:
        for name, value in results[0].items():
            step = (value - start[name]).norm()
            assert step > 0, name
            assert (other[name] - value).norm() <= 2e-5 * step, name


@pytest.mark.parametrize("source", ["adapter", "the model itself", "another model"])
def test_a_cache_gives_the_data_sets_the_columns_of_the_reference(tmp_path, source):
    losses = []
    for folder in (None, tmp_path / "cache", tmp_path / "cache"):
        model = lora() if source == "adapter" else tiny_llama()
        references = {"adapter": "adapter", "the model itself": model}
        reference, features = references.get(source, tiny_llama(7)), pair_features(8)
        if folder is None:
            # Data that has the columns already.
            base = tiny_llama(7) if source == "another model" else tiny_llama()
            features = add_reference_logps(base, features, PairCollator(0), progress=False)
            reference = "precomputed"
        given = {"eval_dataset": {"all": features, "few": features[:4]}, "reference_cache": folder}
        options = {"model": model.eval(), "reference": reference, "given": given}
        run = build("transformers", tmp_path, features, **options)
        assert run.attachment.reference is None
        evaluated = run.evaluate()
        losses.append((evaluated["eval_all_loss"], evaluated["eval_few_rewards/margins"]))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert losses[1] == losses[2]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_precision_of_cached_references_is_the_trainings(tmp_path, monkeypatch):
    features = pair_features(8)
    for half in (True, False):
        # Older releases keep the first one's precision for all others, in both of these.
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        AcceleratorState._reset_state(reset_partial_state=True)
        options = PLAIN | {"bf16": half, "per_device_eval_batch_size": 8}
        runs = [
            build(
                "transformers", tmp_path, features, reference=tiny_llama(7), given=given, **options
            )
            for given in ({"reference_cache": tmp_path / "cache"}, {})
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            wanted = add_reference_logps(
                tiny_llama(7), features, PairCollator(0), batch_size=8, progress=False
            )
        assert runs[0].train_dataset == wanted
        for run in runs:
            run.train()
        # All pairs are in one batch, in another order: what the reference says in every step.
        for name in ("rewards/chosen", "rewards/rejected"):
            rewards = [history(run, name)[0] for run in runs]
            assert rewards[0] == pytest.approx(rewards[1], rel=1e-5, abs=1e-6), name


def test_a_loss_attached_to_a_plain_trainer_is_logged_and_evaluated(tmp_path):
    data = pairs_with_reference(8)
    given = {"eval_dataset": {"all": data, "few": data[:4]}}
    run = build("attached", tmp_path, data, loss="gamma-dpo", given=given, max_steps=2)
    assert isinstance(run, Trainer) and type(run).__name__ == "PreferenceTrainer"
    run.train()
    assert len(history(run, "rewards/margins")) == 2
    assert "test_rewards/margins" in run.predict(data).metrics
    found = run.evaluate()
    few = [row for row in run.state.log_history if "eval_few_loss" in row][-1]
    assert found["eval_few_logps/chosen"] == few["eval_few_logps/chosen"]
    # What `predict` saw has no part in it.
    truth = preference_outputs(run.model, run.attachment.loss_fn, PairCollator(0)(data[:4]))
    assert few["eval_few_logps/chosen"] == pytest.approx(truth.metrics["logps/chosen"].item())
    assert not any(name.startswith("rewards/") for name in few)


def test_the_best_checkpoint_can_be_chosen_by_a_metric(tmp_path):
    data = pairs_with_reference(8)
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "max_steps": 2}
    options |= {"metric_for_best_model": "eval_rewards/margins", "greater_is_better": True}
    run = build("transformers", tmp_path, data, given={"eval_dataset": data}, **options)
    run.train()
    margins = history(run, "eval_rewards/margins")
    assert run.state.best_metric == max(margins) and len(margins) == 2


def test_the_next_rounds_reference_is_a_copy_of_the_trained_model(tmp_path):
    options = PLAIN | {"learning_rate": 0.1, "max_steps": 2}
    first = build("transformers", tmp_path, reference=tiny_llama(7), **options)
    first.train()
    reference = copy.deepcopy(first.model)
    kept = {name: value.clone() for name, value in reference.state_dict().items()}
    second = build("transformers", tmp_path, model=first.model, reference=reference, **options)
    second.train()
    rewards = history(second, "rewards/chosen")
    assert abs(rewards[0]) < 1e-5 < abs(rewards[1])
    assert all(torch.equal(value, kept[name]) for name, value in reference.state_dict().items())


@pytest.mark.parametrize("kind", ["pairs", "points"])
def test_a_trainer_without_a_collator_and_settings_for_one(tmp_path, kind):
    collator, loss, features = PairCollator(0), "dpo", pairs_with_reference(8)
    if kind == "points":
        collator, loss = PointCollator(0), "dro"
        features = add_reference_logps(tiny_llama(7), point_features(8), collator, progress=False)
    settings = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "max_steps": 2}
    settings |= {"disable_tqdm": True, "logging_steps": 1}
    plain = TrainingArguments(output_dir=str(tmp_path), **settings)
    explicit = copy.copy(plain)
    explicit.remove_unused_columns, explicit.label_names = False, ["completion_mask"]
    losses = []
    for args, own in ((plain, None), (explicit, collator)):
        given = {"args": args, "data_collator": own}
        run = build("transformers", tmp_path, features, loss=loss, given=given)
        assert isinstance(run.data_collator, type(collator))
        run.train()
        losses.append(history(run, "loss"))
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_the_fields_of_a_collator_of_ones_own_are_its_affair(tmp_path):
    far = {"ref_chosen_logps": -3.0, "ref_rejected_logps": -2.0}

    def collator(features):
        return PairCollator(0)([{**row, **far} for row in features])

    run = build("transformers", tmp_path, pair_features(8), given={"data_collator": collator})
    assert run.train().training_loss > 0


def test_attach_to_a_trainer_without_data(tmp_path):
    attachment = attach(Trainer(tiny_llama(), arguments(tmp_path)), fp.PreferenceLoss("dpo"))
    assert attachment.reference is None


def test_other_batches_of_the_trainer_are_left_alone(tmp_path):
    args = arguments(tmp_path)
    run = PreferenceTrainer(tiny_llama(), args, loss_fn=fp.PreferenceLoss("simpo"))
    ids = torch.arange(1, 9)[None]
    found = run.compute_loss(run.model, {"input_ids": ids, "labels": ids})
    assert torch.equal(found, tiny_llama()(input_ids=ids, labels=ids).loss)
