"""What a trainer logs: the loss's metrics by TRL's names, of tokens, of predictions apart."""

from __future__ import annotations

import pytest
import torch
from model_families import own_token_metrics
from tiny_models import pair_features, point_features, tiny_llama
from trainers import build, history, pairs, pairs_with_reference

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.integrations.transformers import attach, preference_outputs


def test_metrics_are_logged_by_trls_names_and_mean_over_the_logged_steps(tmp_path):
    features = pairs_with_reference()
    options = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 8}
    options |= {"learning_rate": 0.0, "given": {"eval_dataset": features[:4]}}
    run = build("transformers", tmp_path, features, **options)
    run.train()
    evaluated = run.evaluate()
    every, few = (
        preference_outputs(tiny_llama(), fp.PreferenceLoss("dpo"), PairCollator(0)(rows))
        for rows in (features, features[:4])
    )
    logged = run.state.log_history[0]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"):
        assert logged[name] == pytest.approx(every.metrics[name].item(), rel=1e-4), name
    assert logged["rewards/accuracies"] == every.metrics["rewards/accuracies"].item()
    margins = few.metrics["rewards/margins"].item()
    assert history(run, "eval_rewards/margins") == pytest.approx([margins], rel=1e-4)
    assert evaluated["eval_loss"] == pytest.approx(few.loss.item(), rel=1e-5)


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("kind", ["pairs", "points"])
def test_metrics_of_tokens_are_those_of_the_logits(kind, padding_free):
    model, desirable = tiny_llama(), None
    if kind == "pairs":
        features, loss_fn, make = pair_features(4), fp.PreferenceLoss("simpo"), PairCollator
    else:
        desirable = torch.tensor([True, False, False, True, False])
        rows = zip(point_features(5), desirable.tolist(), strict=True)
        features = [{**row, "desirable": wanted, "reference": -3.0} for row, wanted in rows]
        loss_fn, make = fp.PreferenceLoss("kto"), PointCollator
    attachment = attach(model, loss_fn, log_tokens=True)
    model(**make(0, padding_free=padding_free)(features))
    found = attachment.pop_metrics("train")
    truth = own_token_metrics(tiny_llama(), make(0)(features), desirable)
    if kind == "points":
        assert "mean_token_accuracy" not in found and truth.pop("mean_token_accuracy") >= 0
    for name, value in truth.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformers", "dpo"])
def test_a_prediction_leaves_nothing_in_the_next_evaluation(tmp_path, kind):
    data = pairs_with_reference(16) if kind == "transformers" else pairs()
    few = data[:4] if kind == "transformers" else pairs(8)
    run = build(kind, tmp_path, data, given={"eval_dataset": few})
    for _ in range(2):
        run.evaluate()
        assert not run.predict(run.train_dataset).predictions
    margins = history(run, "eval_rewards/margins")
    assert len(margins) == 2 and margins[0] == margins[1]
