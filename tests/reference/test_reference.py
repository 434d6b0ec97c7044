"""Reference log-probs: values, order, cache."""

from __future__ import annotations

import pytest
import torch
from tiny_models import eager_sums, pair_features, point_features, tiny_llama

from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.integrations import collated
from fused_prefopt.reference import add_reference_logps, dataset_logps


@torch.no_grad()
def test_pairs_get_their_sums_in_order():
    model, features = tiny_llama(), pair_features(7)
    columns = add_reference_logps(model, features, PairCollator(0), batch_size=3, progress=False)
    for side in ("chosen", "rejected"):
        truth = eager_sums(model, features, f"{side}_ids", "completion")
        got = torch.tensor([row[f"ref_{side}_logps"] for row in columns])
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)
    assert [row["prompt_ids"] for row in columns] == [row["prompt_ids"] for row in features]


@torch.no_grad()
def test_points_get_completion_and_prompt_sums():
    model, features = tiny_llama(), point_features(5)
    columns = add_reference_logps(model, features, PointCollator(0), batch_size=2, progress=False)
    for column, part in (("reference", "completion"), ("prompt_reference", "prompt")):
        truth = eager_sums(model, features, "completion_ids", part)
        got = torch.tensor([row[column] for row in columns])
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)


def test_the_pass_costs_an_evaluation_of_each_labelled_row(monkeypatch):
    plans, rows = [], []
    compute = collated.sequence_logps

    def spy(*args, **options):
        out = compute(*args, **options)
        plans.append(out.plan.path)
        rows.append(int(out.lengths.sum()))
        return out

    monkeypatch.setattr(collated, "sequence_logps", spy)
    features = point_features(6)
    add_reference_logps(tiny_llama(), features, PointCollator(0), batch_size=3, progress=False)
    assert plans == ["evaluate"] * 4
    # Every token but a sequence's first, once.
    assert sum(rows) == sum(len(x["prompt_ids"]) + len(x["completion_ids"]) - 1 for x in features)


def test_progress_is_shown(capfd):
    add_reference_logps(tiny_llama(), pair_features(5), PairCollator(0), batch_size=2)
    assert "reference log-probs: 100%" in (shown := capfd.readouterr().err) and "3/3" in shown


@pytest.mark.parametrize("options", [{"padding_free": True}, {"shared_prompt": True}])
def test_other_layouts_have_the_same_sums(options):
    model, features = tiny_llama(), pair_features(5)
    padded, other = (
        add_reference_logps(model, features, collator, batch_size=2, progress=False)
        for collator in (PairCollator(0), PairCollator(0, **options))
    )
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        wanted, got = (torch.tensor([row[name] for row in rows]) for rows in (padded, other))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)


def test_no_features_give_no_rows(tmp_path):
    for _ in range(2):
        assert add_reference_logps(tiny_llama(), [], PairCollator(0), cache_dir=tmp_path) == []


def test_training_mode_and_forward_are_given_back():
    model = tiny_llama().train()
    add_reference_logps(model, pair_features(2), PairCollator(0), progress=False)
    assert model.training and "forward" not in model.__dict__
    own = model.forward = lambda **_: None
    add_reference_logps(model, pair_features(2), PairCollator(0), progress=False)
    assert model.forward is own


def test_a_module_frozen_in_eval_mode_stays_in_it():
    model = tiny_llama().train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    for run in (add_reference_logps, dataset_logps):
        run(model, pair_features(2), PairCollator(0), progress=False)
        assert {name: module.training for name, module in model.named_modules()} == before


def test_the_cache_is_used_for_the_same_content_only(tmp_path):
    features, collator = pair_features(4), PairCollator(0)

    def run(model, features):
        batches = []
        model.model.register_forward_hook(lambda *_: batches.append(1))
        rows = add_reference_logps(model, features, collator, cache_dir=tmp_path, progress=False)
        return rows, len(batches)

    first, batches = run(tiny_llama(), features)
    assert batches == 1
    assert run(tiny_llama(), pair_features(4)) == (first, 0)
    edited = tiny_llama()
    with torch.no_grad():
        edited.lm_head.weight[3, 2] += 1e-3
    changed, batches = run(edited, features)
    assert batches == 1 and changed != first
    assert run(tiny_llama(), features[:3])[1] == 1
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failed_run_leaves_no_cache(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(collated, "sequence_logps", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        add_reference_logps(
            tiny_llama(), pair_features(2), PairCollator(0), cache_dir=tmp_path, progress=False
        )
    assert not list(tmp_path.iterdir())
