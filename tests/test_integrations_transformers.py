"""transformers' Trainer: the loss inside `forward`, accumulation, metrics, resuming."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import eager_sums, pair_features, point_features, tiny_llama
from transformers import TrainingArguments

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.integrations.transformers import PreferenceTrainer, attach, preference_outputs
from fused_prefopt.reference import add_reference_logps


def arguments(folder, **options):
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["completion_mask"],
        "use_cpu": True,
        "logging_steps": 1,
    }
    return TrainingArguments(output_dir=str(folder), **(settings | options))


def pairs_with_reference(count=8):
    return add_reference_logps(tiny_llama(7), pair_features(count), PairCollator(0), progress=False)


@pytest.mark.parametrize("padding_free", [False, True])
def test_loss_of_a_batch_equals_the_models_own_logits(padding_free):
    model, features = tiny_llama().double(), pairs_with_reference()
    collator = PairCollator(0, padding_free=padding_free)
    result = preference_outputs(model, fp.PreferenceLoss("dpo"), collator(features))
    result.loss.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    policy = torch.cat(
        [
            eager_sums(model, features, f"{side}_ids", "completion")
            for side in ("chosen", "rejected")
        ]
    )
    reference = torch.tensor(
        [feature[f"ref_{side}_logps"] for side in ("chosen", "rejected") for feature in features],
        dtype=torch.float64,
    )
    delta = 0.1 * (policy - reference)
    truth = -torch.nn.functional.logsigmoid(delta[:8] - delta[8:]).mean()
    truth.backward()
    torch.testing.assert_close(result.loss, truth, rtol=1e-6, atol=0)
    for name, value in model.named_parameters():
        torch.testing.assert_close(gradients[name], value.grad, rtol=1e-5, atol=1e-9)


def test_dro_takes_the_prompts_own_log_ratio_from_the_same_pass():
    model, reference = tiny_llama().double(), tiny_llama(7).double()
    features = add_reference_logps(reference, point_features(6), PointCollator(0), progress=False)
    loss_fn = fp.PreferenceLoss("dro", beta=0.5, log_z0=1.0)
    result = preference_outputs(model, loss_fn, PointCollator(0)(features))
    with torch.no_grad():
        sums = {
            (who, part): eager_sums(each, features, "completion_ids", part)
            for who, each in (("policy", model), ("reference", reference))
            for part in ("completion", "prompt")
        }
    ratio, prompt_ratio = (
        sums["policy", part] - sums["reference", part] for part in ("completion", "prompt")
    )
    scores = torch.tensor([feature["reward"] for feature in features], dtype=torch.float64)
    truth = (scores - 0.5 * ratio - 0.5 * (prompt_ratio + 1.0)).square()
    torch.testing.assert_close(result.losses, truth, rtol=1e-5, atol=1e-7)


def test_other_batches_go_the_models_own_way_and_detach_restores_it():
    model = tiny_llama()
    ids = torch.arange(1, 9)[None]
    before = model(input_ids=ids).logits
    attachment = attach(model, fp.PreferenceLoss("simpo"))
    assert torch.equal(model(input_ids=ids).logits, before)
    batch = PairCollator(0)(pair_features(4))
    assert set(model(**batch)) == {"loss"}
    attachment.detach()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model(**batch).logits, tiny_llama()(**inputs).logits)


def test_gradient_accumulation_is_exact(tmp_path):
    features, results = pairs_with_reference(), []
    for accumulation in (1, 2, 4):
        model = tiny_llama()
        trainer = PreferenceTrainer(
            model,
            arguments(
                tmp_path,
                per_device_train_batch_size=8 // accumulation,
                gradient_accumulation_steps=accumulation,
                # One plain step: large, so that rounding the weights does not hide the gradient.
                learning_rate=20.0,
            ),
            train_dataset=features,
            data_collator=PairCollator(0),
            loss_fn=fp.PreferenceLoss("dpo"),
        )
        trainer.train()
        results.append(copy.deepcopy(model.state_dict()))
    start = tiny_llama().state_dict()
    for other in results[1:]:
        for name, value in results[0].items():
            step = (value - start[name]).norm()
            assert step > 0, name
            assert (other[name] - value).norm() <= 2e-5 * step, name


def test_metrics_are_logged_by_trls_names_and_mean_over_the_logged_steps(tmp_path):
    features = pairs_with_reference()
    trainer = PreferenceTrainer(
        tiny_llama(),
        arguments(tmp_path, max_steps=4, logging_steps=2, learning_rate=0.0),
        train_dataset=features,
        eval_dataset=features[:4],
        data_collator=PairCollator(0),
        loss_fn=fp.PreferenceLoss("dpo"),
    )
    trainer.train()
    evaluated = trainer.evaluate()
    model = tiny_llama()
    expected = preference_outputs(model, fp.PreferenceLoss("dpo"), PairCollator(0)(features))
    logged = trainer.state.log_history[0]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"):
        assert logged[name] == pytest.approx(expected.metrics[name].item(), rel=1e-4), name
    assert logged["rewards/accuracies"] == expected.metrics["rewards/accuracies"].item()
    few = preference_outputs(model, fp.PreferenceLoss("dpo"), PairCollator(0)(features[:4]))
    history = [row for row in trainer.state.log_history if "eval_rewards/margins" in row]
    assert history[0]["eval_rewards/margins"] == pytest.approx(
        few.metrics["rewards/margins"].item(), rel=1e-4
    )
    assert evaluated["eval_loss"] == pytest.approx(few.loss.item(), rel=1e-5)


def test_resuming_continues_the_run_with_its_statistics(tmp_path):
    features = pairs_with_reference(16)

    def trainer(folder, **options):
        return PreferenceTrainer(
            tiny_llama(),
            arguments(
                folder, per_device_train_batch_size=4, optim="adamw_torch", max_steps=6, **options
            ),
            train_dataset=features,
            data_collator=PairCollator(0),
            loss_fn=fp.PreferenceLoss("gamma-simpo", sample_size=8, queue_size=12),
        )

    whole = trainer(tmp_path / "run", save_strategy="steps", save_steps=3)
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    last = [row["loss"] for row in whole.state.log_history if "loss" in row][3:]
    again = [row["loss"] for row in resumed.state.log_history if "loss" in row][3:]
    assert last == again and len(last) == 3
    queues = [each.attachment.loss_fn.statistics.margins for each in (whole, resumed)]
    assert torch.equal(*(queue.nan_to_num(7.0) for queue in queues))


def test_statistics_freeze_in_evaluation():
    model = tiny_llama()
    attachment = attach(model, fp.PreferenceLoss("gamma-simpo"))
    batch = PairCollator(0)(pair_features(4))
    model.eval()
    model(**batch)
    assert attachment.loss_fn.statistics.margins.isnan().all()
    model.train()
    model(**batch)
    assert attachment.loss_fn.statistics.margins.isfinite().sum() == 4


def test_wrong_training_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        PreferenceTrainer(
            tiny_llama(),
            arguments(tmp_path, remove_unused_columns=True),
            loss_fn=fp.PreferenceLoss("dpo"),
        )
