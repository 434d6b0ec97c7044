"""Reference log-probs: values, order, cache."""

from __future__ import annotations

import pytest
import torch
from tiny_models import eager_sums, pair_features, point_features, tiny_llama

from fused_prefopt import reference
from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.reference import add_reference_logps


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


def test_training_mode_is_given_back():
    model = tiny_llama().train()
    add_reference_logps(model, pair_features(2), PairCollator(0), progress=False)
    assert model.training


def test_the_cache_is_used_for_the_same_content_only(tmp_path, monkeypatch):
    model, features, collator = tiny_llama(), pair_features(4), PairCollator(0)
    first = add_reference_logps(model, features, collator, cache_dir=tmp_path, progress=False)
    calls = []
    compute = reference.dataset_logps
    monkeypatch.setattr(
        reference, "dataset_logps", lambda *a, **k: calls.append(1) or compute(*a, **k)
    )
    again = add_reference_logps(
        tiny_llama(), pair_features(4), collator, cache_dir=tmp_path, progress=False
    )
    assert again == first and not calls
    with torch.no_grad():
        model.lm_head.weight[3, 2] += 1e-3
    changed = add_reference_logps(model, features, collator, cache_dir=tmp_path, progress=False)
    assert len(calls) == 1 and changed != first
    add_reference_logps(model, features[:3], collator, cache_dir=tmp_path, progress=False)
    assert len(calls) == 2
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failed_run_leaves_no_cache(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(reference, "sequence_logps", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        add_reference_logps(
            tiny_llama(), pair_features(2), PairCollator(0), cache_dir=tmp_path, progress=False
        )
    assert not list(tmp_path.iterdir())
