"""Reference log-probs: values, order, cost, and a model that is given back as it was."""

from __future__ import annotations

import inspect

import pytest
import torch
from tiny_models import eager_sums, pair_features, point_features, tiny_llama

from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.models.batch import completion_logps
from fused_prefopt.ops import sequence_logps
from fused_prefopt.reference import add_reference_logps, dataset_logps

PAIRS, POINTS = pair_features(7), point_features(6)
# Column → the token ids and the part of them whose log-prob it is.
OF_PAIRS = {f"ref_{side}_logps": (f"{side}_ids", "completion") for side in ("chosen", "rejected")}
OF_POINTS = {
    "reference": ("completion_ids", "completion"),
    "prompt_reference": ("completion_ids", "prompt"),
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("features", "collator", "columns"),
    [
        (PAIRS, PairCollator(0), OF_PAIRS),
        (PAIRS, PairCollator(0, padding_free=True), OF_PAIRS),
        (PAIRS, PairCollator(0, shared_prompt=True), OF_PAIRS),
        (POINTS, PointCollator(0), OF_POINTS),
    ],
    ids=["pairs", "packed", "shared", "points"],
)
def test_features_get_their_sums_in_order(features, collator, columns):
    model = tiny_llama()
    rows = add_reference_logps(model, features, collator, batch_size=3, progress=False)
    for column, (ids, part) in columns.items():
        truth = eager_sums(model, features, ids, part)
        got = torch.tensor([row[column] for row in rows])
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)
    given = [{name: row[name] for name in row if name not in columns} for row in rows]
    assert given == features


def test_the_pass_costs_an_evaluation_of_each_labelled_row(monkeypatch):
    outs = []

    def spy(*args, **options):
        outs.append(sequence_logps(*args, **options))
        return outs[-1]

    monkeypatch.setitem(inspect.unwrap(completion_logps).__globals__, "sequence_logps", spy)
    add_reference_logps(tiny_llama(), POINTS, PointCollator(0), batch_size=3, progress=False)
    assert [out.plan.path for out in outs] == ["evaluate"] * 4
    # Every token but a sequence's first, once.
    wanted = sum(len(each["prompt_ids"]) + len(each["completion_ids"]) - 1 for each in POINTS)
    assert sum(int(out.lengths.sum()) for out in outs) == wanted


def test_progress_is_shown(capfd):
    add_reference_logps(tiny_llama(), PAIRS[:5], PairCollator(0), batch_size=2)
    assert "reference log-probs: 100%" in (shown := capfd.readouterr().err) and "3/3" in shown


@pytest.mark.parametrize("run", [add_reference_logps, dataset_logps])
def test_modes_and_forward_are_given_back(run):
    model = tiny_llama().train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    run(model, PAIRS[:2], PairCollator(0), progress=False)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert "forward" not in model.__dict__
    own = model.forward = lambda **_: None
    run(model, PAIRS[:2], PairCollator(0), progress=False)
    assert model.forward is own
