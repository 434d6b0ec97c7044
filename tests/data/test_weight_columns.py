"""Columns of weights: records, features and batches of them, and what is refused."""

from __future__ import annotations

import pytest
import torch
from data_tokenizer import tiny_tokenizer

from fused_prefopt.data import (
    PairCollator,
    PointCollator,
    completions,
    pairs_of_points,
    points_of_pairs,
    preference,
    tokenise_pairs,
    tokenise_points,
    ultrafeedback,
)
from fused_prefopt.data.records import adapted_records

PAIRS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6], "weight": 2},
    {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11, 12], "weight": 0.5},
]
TOKENS = [
    {"chosen_token_weights": [0.5, 1.0], "rejected_token_weights": [2.0]},
    {"chosen_token_weights": [3.0], "rejected_token_weights": [0.0, 0.25, 4.0]},
]
WHOLE = [pair | tokens for pair, tokens in zip(PAIRS, TOKENS, strict=True)]
TEXTS = [
    {"prompt": "the cat", "chosen": " sat on", "rejected": " mat", "weight": "1.5"},
    {"prompt": "on the", "chosen": " mat", "rejected": " cat sat", "weight": 0},
]


def test_a_pairs_weight_stands_in_both_halves_and_tokens_where_they_are():
    padded = PairCollator(0)(WHOLE)
    assert padded["weights"].tolist() == [2.0, 0.5, 2.0, 0.5]
    assert padded["token_weights"].tolist() == [
        [0, 0, 0, 0.5, 1.0],
        [0, 0, 3.0, 0, 0],
        [0, 0, 0, 2.0, 0],
        [0, 0, 0, 0.25, 4.0],
    ]
    packed = PairCollator(0, padding_free=True)(WHOLE)
    real = padded["attention_mask"].bool()
    assert torch.equal(packed["token_weights"][0], padded["token_weights"][real])
    shared = PairCollator(0, shared_prompt=True)(WHOLE)
    # One weight a target: chosen and rejected of the first row, then of the second.
    assert shared["token_weights"].tolist() == [0.5, 1.0, 2.0, 3.0, 0.0, 0.25, 4.0]
    assert shared["targets"].tolist() == [4, 5, 6, 9, 10, 11, 12]
    for batch in (padded, packed, shared):
        assert batch["token_weights"].dtype == batch["weights"].dtype == torch.float32


CUTS = [
    ("keep_start", 4, [0.5, 3.0, 2.0, 0.0, 0.25], [0.5, 2.0, 3.0, 0.0, 0.25]),
    # Nothing predicts the first token that is left of a row whose prompt is gone.
    ("keep_end", 2, [0.5, 1.0, 3.0, 2.0, 0.25, 4.0], [1.0, 2.0, 3.0, 4.0]),
]


@pytest.mark.parametrize(("mode", "length", "kept", "predicted"), CUTS)
def test_a_cut_of_the_tokens_is_one_of_their_weights(mode, length, kept, predicted):
    options = {"max_length": length, "truncation_mode": mode}
    batch = PairCollator(0, **options)(WHOLE)
    assert batch["token_weights"][batch["completion_mask"].bool()].tolist() == kept
    shared = PairCollator(0, shared_prompt=True, **options)(WHOLE)
    assert shared["token_weights"].tolist() == predicted


def test_completions_have_weights_of_their_own():
    rows = [
        {"prompt_ids": [1], "completion_ids": [2, 3], "weight": 1.0, "token_weights": [1, 0]},
        {"prompt_ids": [], "completion_ids": [4, 5], "weight": 0.0, "token_weights": [2, 5]},
    ]
    batch = PointCollator(0)(rows)
    assert batch["weights"].tolist() == [1.0, 0.0]
    assert batch["token_weights"].tolist() == [[0, 1, 0], [2, 5, 0]]


def test_records_and_features_keep_the_weight():
    assert [row["weight"] for row in preference(TEXTS)] == [1.5, 0.0]
    features = tokenise_pairs(TEXTS, tiny_tokenizer(), 32, 16)
    assert [row["weight"] for row in features] == [1.5, 0.0]
    points = points_of_pairs(preference(TEXTS))
    assert [point["weight"] for point in points] == [1.5, 1.5, 0.0, 0.0]
    assert [pair["weight"] for pair in pairs_of_points(points)] == [1.5, 0.0]
    judged = [{"prompt": "the", "completion": " cat", "label": 1, "weight": 3}]
    assert completions(judged)[0]["weight"] == 3.0
    assert tokenise_points(judged, tiny_tokenizer(), 32, 16)[0]["weight"] == 3.0
    assert "weight" not in completions([{"prompt": "the", "completion": " cat"}])[0]


def test_every_adapter_keeps_the_weight():
    cat, mat = ([{"role": "assistant", "content": word}] for word in ("cat", "mat"))
    chat = [{"role": "user", "content": "the"}]
    rated = [{"response": word, "overall_score": i} for i, word in enumerate(("cat", "mat"))]
    sides = {
        "chosen": "\n\nHuman: the\n\nAssistant: cat",
        "rejected": "\n\nHuman: the\n\nAssistant: m",
    }
    rows = {
        "preference": {"prompt": chat, "chosen": cat, "rejected": mat},
        "hh_rlhf": sides,
        "ultrafeedback_binarized": {"prompt": "the", "chosen": chat + cat, "rejected": chat + mat},
        "completions": {"prompt": "the", "completion": "cat", "label": True},
        "ultrafeedback": {"instruction": "the", "completions": rated},
    }
    for adapter, row in rows.items():
        records, said = adapted_records("some", [row | {"weight": 0.5}])
        assert said.endswith(f"(adapter {adapter})")
        assert records and all(record["weight"] == 0.5 for record in records), adapter
    points = ultrafeedback([rows["ultrafeedback"] | {"weight": 0.5}])
    assert pairs_of_points(points)[0]["weight"] == 0.5
    with pytest.raises(ValueError, match="weight: got -1 in row 1"):
        ultrafeedback([rows["ultrafeedback"] | {"weight": each} for each in (1, -1)])


def test_weights_that_are_none_are_refused():
    for bad, said in ((None, "None"), (-1, "-1"), ("many", "'many'"), (True, "True")):
        rows = [dict(PAIRS[0]), PAIRS[1] | {"weight": bad}]
        with pytest.raises(ValueError, match=f"weight: got {said} in feature 1"):
            PairCollator(0)(rows)
        with pytest.raises(ValueError, match=f"weight: got {said} in row 1"):
            preference([TEXTS[0], TEXTS[1] | {"weight": bad}])
    with pytest.raises(ValueError, match="feature 1: missing column 'weight'"):
        PairCollator(0)([PAIRS[0], {k: v for k, v in PAIRS[1].items() if k != "weight"}])
    unlike = [
        {"prompt": "the", "completion": word, "reward": i, "group": 0, "weight": i}
        for i, word in enumerate((" cat", " mat"))
    ]
    with pytest.raises(ValueError, match="weight: got 1 in row 1 .* and 0 in row 0 .* of group 0"):
        pairs_of_points(unlike)


def test_weights_of_tokens_that_do_not_fit_them_are_refused():
    def refused(message: str, **columns):
        with pytest.raises(ValueError, match=message):
            PairCollator(0)([WHOLE[0], WHOLE[1] | columns])

    refused("chosen_token_weights: got -1.0 at token 0 of feature 1", chosen_token_weights=[-1.0])
    refused("got nan at token 0 of feature 1", chosen_token_weights=[float("nan")])
    refused(
        r"got shape \(2,\) in feature 1, wanted one number for each of its 1",
        chosen_token_weights=[1, 1],
    )
    refused("chosen_token_weights: feature 1 is no list of numbers", chosen_token_weights=None)
    with pytest.raises(ValueError, match="feature 1: missing column 'chosen_token_weights'"):
        PairCollator(0)([WHOLE[0], PAIRS[1]])
    texts = [TEXTS[0] | {"rejected_token_weights": [1.0]}]
    for read in (preference, lambda rows: tokenise_pairs(rows, tiny_tokenizer(), 32, 16)):
        with pytest.raises(
            ValueError, match="rejected_token_weights: got some with texts in row 0"
        ):
            read(texts)
