"""Weights of rows and tokens from data to loss: layouts, references, evaluation, metrics."""

from __future__ import annotations

import dataclasses
from itertools import filterfalse

import pytest
import torch
from tiny_models import pair_features, point_features, tiny_llama
from trainers import build, first_batch, history, in_order
from weighted_rows import true_batch, weighted, weighted_sums

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.evaluation import PairScores, score_pairs
from fused_prefopt.integrations.transformers import attach
from fused_prefopt.losses.metrics import is_unweighted
from fused_prefopt.reference import add_reference_logps
from fused_prefopt.reference_cache import data_fingerprint

LAYOUTS = [{}, {"padding_free": True}, {"shared_prompt": True}]


def points(count: int) -> list[dict]:
    rows = point_features(count)
    return [row | {"desirable": index % 3 != 1} for index, row in enumerate(rows)]


CASES = [
    *((PairCollator, layout, loss) for layout in LAYOUTS for loss in ("dpo", "simpo")),
    *((PointCollator, layout, "kto") for layout in LAYOUTS[:2]),
]


@pytest.mark.parametrize(("kind", "layout", "loss"), CASES, ids=str)
def test_every_layout_has_the_loss_gradient_and_metrics_of_the_logits(kind, layout, loss):
    features = weighted(pair_features(6) if kind is PairCollator else points(6))
    # Nothing predicts the first token of these, which is no label.
    features[1]["prompt_ids"] = []
    if kind is PairCollator:
        features[1] |= {"chosen_ids": [3, 4, 5], "chosen_token_weights": [2.0, 1.0, 0.5]}
        features[1] |= {"rejected_ids": [6, 7], "rejected_token_weights": [1.0, 3.0]}
    else:
        features[1] |= {"completion_ids": [3, 4, 5], "token_weights": [2.0, 1.0, 0.5]}
    model, other = tiny_llama(), tiny_llama(5)
    loss_fn = fp.PreferenceLoss(loss, engine="torch")
    attachment = attach(model, loss_fn, reference=other)
    found = model(**kind(0, **layout)(features))["loss"]
    found.backward()
    eager = tiny_llama()
    truth = true_batch(eager, tiny_llama(5), features)
    if loss == "simpo":
        truth = dataclasses.replace(truth, reference=None)
    known = fp.PreferenceLoss(loss).from_logps(truth)
    torch.testing.assert_close(found.double(), known.loss, rtol=1e-5, atol=1e-6)
    known.loss.backward()
    for ours, right in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), right.grad, rtol=1e-3, atol=1e-6)
    logged = attachment.pop_metrics("train")
    for name, value in known.metrics.items():
        assert logged[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-4), name
    mean = sum(row["weight"] for row in features) / len(features)
    assert logged["weights/mean"] == pytest.approx(mean)


@pytest.mark.parametrize("collator", [PairCollator(0), PairCollator(0, shared_prompt=True)])
def test_metrics_of_tokens_do_not_see_a_row_of_weight_0(collator):
    features = weighted(pair_features(6), tokens=False)
    found = []
    for rows, weights in ((features, None), ([features[1]], [1.0]), (features, [0, 1, 0, 0, 0, 0])):
        if weights is not None:
            rows = [row | {"weight": float(w)} for row, w in zip(rows, weights, strict=True)]
        model = tiny_llama()
        attachment = attach(model, fp.PreferenceLoss("simpo"), log_tokens=True)
        model(**collator(rows))
        found.append(attachment.pop_metrics("train"))
    every, alone, weighed = found
    for name in filterfalse(is_unweighted, alone):
        assert weighed[name] == pytest.approx(alone[name], rel=1e-5), name
    assert every["entropy"] != pytest.approx(alone["entropy"], rel=1e-4)
    # A token of weight 0 is not seen either.
    model, rows = tiny_llama(), [dict(features[1], chosen_token_weights=[0.0])]
    rows[0] |= {"chosen_ids": [5], "rejected_ids": [6], "rejected_token_weights": [2.0]}
    attachment = attach(model, fp.PreferenceLoss("simpo"), log_tokens=True)
    model(**collator(rows))
    assert attachment.pop_metrics("train").keys().isdisjoint({"logits/chosen"})


def test_references_and_their_cache_heed_the_weights_of_tokens(tmp_path):
    plain = pair_features(5)
    rows = weighted(plain)
    options = {"progress": False, "cache_dir": tmp_path}
    known = add_reference_logps(tiny_llama(5), rows, PairCollator(0), **options)
    for column, name in (("chosen", "ref_chosen_logps"), ("rejected", "ref_rejected_logps")):
        sums = weighted_sums(tiny_llama(5), rows, f"{column}_ids")[0]
        got = torch.tensor([row[name] for row in known]).double()
        torch.testing.assert_close(got, sums.detach(), rtol=1e-5, atol=1e-5)
    again = add_reference_logps(tiny_llama(5), rows, PairCollator(0), **options)
    assert again == known and len(list(tmp_path.iterdir())) == 1
    others = add_reference_logps(tiny_llama(5), plain, PairCollator(0), **options)
    assert others[0]["ref_chosen_logps"] != known[0]["ref_chosen_logps"]
    assert len(list(tmp_path.iterdir())) == 2
    # Of rows the weights of pairs are no part, and without weights of tokens it is what it was.
    assert data_fingerprint(weighted(plain, tokens=False)) == data_fingerprint(plain)
    changed = [dict(row) for row in rows]
    changed[4]["rejected_token_weights"] = [9.0] * len(changed[4]["rejected_ids"])
    assert data_fingerprint(changed) != data_fingerprint(rows)


def test_an_evaluation_is_that_of_the_weighted_pairs():
    rows = weighted(pair_features(5))
    known = add_reference_logps(tiny_llama(5), rows, PairCollator(0), progress=False)
    scores = score_pairs(tiny_llama(), tiny_llama(5), known, PairCollator(0), progress=False)
    truth = true_batch(tiny_llama(), tiny_llama(5), rows)
    for name in ("policy", "lengths", "reference", "weights"):
        got, wanted = getattr(scores.batch, name).double(), getattr(truth, name).detach()
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    # Each pair as often as its weight says, halves made whole.
    often = [known[index] for index in (0, *[1] * 4, *[3] * 2, *[4] * 6)]
    repeated = [{k: v for k, v in row.items() if k != "weight"} for row in often]
    counted = score_pairs(tiny_llama(), tiny_llama(5), repeated, PairCollator(0), progress=False)
    reward = fp.PreferenceLoss("dpo").loss.reward
    summary, wanted = scores.summary(reward), counted.summary(reward)
    assert wanted.pop("accuracy_stderr") < summary.pop("accuracy_stderr")
    assert summary == pytest.approx(wanted, rel=1e-4)
    assert scores.kl_rejected == pytest.approx(counted.kl_rejected, rel=1e-4)
    equal = dataclasses.replace(scores.batch, weights=torch.full((10,), 2.0))
    plain = dataclasses.replace(scores.batch, weights=None)
    assert PairScores(equal, 0.0, 0.0).summary() == pytest.approx(PairScores(plain, 0, 0).summary())


def test_a_trainer_trains_with_them(tmp_path):
    rows = weighted(pair_features(16))
    run = in_order(build("transformers", tmp_path, rows, reference=tiny_llama(5)))
    assert first_batch(run)["weights"].tolist() == [0.5, 2.0, 0.0, 1.0] * 2
    run.train()
    truth = fp.PreferenceLoss("dpo").from_logps(true_batch(tiny_llama(), tiny_llama(5), rows[:4]))
    assert history(run, "loss") == pytest.approx([truth.loss.item()], rel=1e-5)
    margins = truth.metrics["rewards/margins"].item()
    assert history(run, "rewards/margins") == pytest.approx([margins], rel=1e-4)
    assert history(run, "weights/mean") == [0.875]
