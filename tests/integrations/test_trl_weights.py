"""Weights of rows and of tokens in the trainers on TRL."""

from __future__ import annotations

import pytest
import torch
from tiny_models import pair_features, point_features, tiny_llama
from trainers import build, dataset, first_batch, history, in_order, pairs, points
from weighted_rows import COLUMNS, true_batch, weighted

import fused_prefopt as fp
from fused_prefopt.data.truncation import cut_side

pytest.importorskip("trl")

pytestmark = pytest.mark.slow
WEIGHTS = [0.5, 2.0, 0.0, 1.0] * 4


def rows_of(run, count: int = 4) -> list[dict]:
    """The first rows of a trainer's data as features, cut as its collator cuts them."""
    pairwise, found = "chosen_ids" in run.train_dataset.column_names, []
    mode = run.args.truncation_mode if pairwise else "keep_start"
    for row in (run.train_dataset[index] for index in range(count)):
        whole = dict(row) if pairwise else row | {"desirable": row["label"]}
        for name in {*COLUMNS, *COLUMNS.values()} & row.keys():
            whole[name] = cut_side(row["prompt_ids"], row[name], run.args.max_length, mode)[1]
        found.append(whole)
    return found


def assert_trained(run, loss: str, truth: fp.LogpBatch) -> None:
    known = fp.PreferenceLoss(loss).from_logps(truth)
    # Not the logged one, which old transformers round.
    assert in_order(run).train().training_loss == pytest.approx(known.loss.item(), rel=1e-5)
    for name in ("rewards/margins", "rewards/chosen", "logps/chosen"):
        assert history(run, name) == pytest.approx([known.metrics[name].item()], rel=1e-4)
    weights = truth.weights[:4]
    assert history(run, "weights/mean") == pytest.approx([weights.mean().item()])


@pytest.mark.parametrize("options", [{}, {"padding_free": True}, {"shared_prompt": True}])
def test_a_weight_a_pair_reaches_the_loss_of_texts(tmp_path, options):
    run = build("dpo", tmp_path, pairs(weight=WEIGHTS), reference=tiny_llama(5), **options)
    assert first_batch(in_order(run))["weights"].tolist() == WEIGHTS[:4] * 2
    assert_trained(run, "dpo", true_batch(tiny_llama(), tiny_llama(5), rows_of(run)))


CUTS = [
    {},
    {"precompute_ref_log_probs": True},
    {"max_length": 9},
    {"max_length": 9, "padding_free": True, "precompute_ref_log_probs": True},
    {"max_length": 12, "shared_prompt": True},
]


@pytest.mark.parametrize("options", CUTS, ids=str)
def test_weights_of_tokens_reach_loss_and_reference_of_token_ids(tmp_path, options):
    data = dataset(weighted(pair_features(8)))
    run = build("dpo", tmp_path, data, reference=tiny_llama(5), **options)
    truth = true_batch(tiny_llama(), tiny_llama(5), rows_of(run))
    if "precompute_ref_log_probs" in options:
        sums = [run.train_dataset[side][:4] for side in ("ref_chosen_logps", "ref_rejected_logps")]
        got = torch.tensor(sums).flatten().double()
        torch.testing.assert_close(got, truth.reference, rtol=1e-5, atol=1e-5)
    assert_trained(run, "dpo", truth)


def test_a_cut_of_the_start_keeps_the_last_weights(tmp_path):
    data = dataset(weighted(pair_features(8)))
    run = build("dpo", tmp_path, data, max_length=6, truncation_mode="keep_end")
    batch, rows = first_batch(in_order(run)), rows_of(run)
    sides = [
        row[name] for name in ("chosen_token_weights", "rejected_token_weights") for row in rows
    ]
    assert any(len(side) == 6 for side in sides)
    for weights, mask, side in zip(
        batch["token_weights"], batch["completion_mask"].bool(), sides, strict=True
    ):
        assert weights[mask].tolist() == side and not weights[~mask].any()


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("kind", ["texts", "ids"])
def test_weights_of_completions_and_of_their_tokens_reach_kto(tmp_path, kind, padding_free):
    if kind == "texts":
        labels = [True, False, False, True] * 4
        data = points(label=labels, weight=WEIGHTS)
    else:
        rows = weighted(point_features(8))
        data = dataset([row | {"label": index % 2 == 0} for index, row in enumerate(rows)])
    run = build("kto", tmp_path, data, reference=tiny_llama(5), padding_free=padding_free)
    assert run.calculate_KL
    features = rows_of(run)
    mismatched = [
        dict(row, completion_ids=other["completion_ids"])
        | ({"token_weights": other["token_weights"]} if kind == "ids" else {})
        for row, other in zip(features, [features[-1], *features[:-1]], strict=True)
    ]
    behind = true_batch(tiny_llama(), tiny_llama(5), mismatched)
    kl = (behind.policy - behind.reference).mean().clamp(min=0).detach()
    truth = true_batch(tiny_llama(), tiny_llama(5), features)
    fields = {name: getattr(truth, name) for name in truth.given - {"rewards", "groups"}}
    assert_trained(run, "kto", fp.LogpBatch(**fields, kl=kl))


def test_references_of_prompts_are_computed_ahead_of_weighted_tokens(tmp_path):
    rows = weighted(point_features(8))
    data = dataset([row | {"label": True} for row in rows])
    given = {"loss": "dro", "reference": tiny_llama(5), "max_length": 9}
    runs = [
        in_order(build("kto", tmp_path / str(ahead), data, precompute_ref_log_probs=ahead, **given))
        for ahead in (True, False)
    ]
    ahead, at_once = (run.train().training_loss for run in runs)
    assert ahead == pytest.approx(at_once, rel=1e-5)
    truth = true_batch(tiny_llama(), tiny_llama(5), rows_of(runs[0]))
    got = torch.tensor(runs[0].train_dataset["ref_logps"][:4]).double()
    torch.testing.assert_close(got, truth.reference, rtol=1e-5, atol=1e-5)


def test_a_pair_of_a_weight_is_two_completions_of_it(tmp_path):
    run = build("kto", tmp_path, pairs(4, weight=WEIGHTS[:4]), loss="apo-zero-unpaired")
    assert run.train_dataset["weight"] == [0.5, 0.5, 2.0, 2.0, 0.0, 0.0, 1.0, 1.0]
    assert run.train_dataset["label"] == [True, False] * 4


def test_what_has_no_meaning_is_refused(tmp_path):
    for weights, message in (
        ([1.0, -2.0, 1.0, 1.0], r"weight: got -2.0 in row 1 \(counted from 0\) of train_dataset"),
        ([1.0, None, 1.0, 1.0], "weight: got None in row 1"),
    ):
        with pytest.raises(ValueError, match=message):
            build("dpo", tmp_path, pairs(4, weight=weights))
    texts = pairs(4, chosen_token_weights=[[1.0]] * 4)
    with pytest.raises(ValueError, match="chosen_token_weights: got some with texts in row 0"):
        build("dpo", tmp_path, texts)
    rows = weighted(pair_features(4))
    rows[2]["rejected_token_weights"] = [1.0] * 40
    with pytest.raises(ValueError, match=r"rejected_token_weights: got shape \(40,\) in feature"):
        build("dpo", tmp_path, dataset(rows)).train()
    with pytest.raises(ValueError, match="token_weights: got some with ld_alpha"):
        build("dpo", tmp_path, dataset(weighted(pair_features(4))), ld_alpha=0.5).train()
