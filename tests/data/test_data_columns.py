"""Values of columns: scores, groups and labels are read exactly, or refused with their place."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from data_tokenizer import chat

from fused_prefopt.data import (
    PairCollator,
    PointCollator,
    completions,
    pairs_of_points,
    points_of_pairs,
    preference,
    tokenise_pairs,
    tokenise_points,
    ultrafeedback_binarized,
)
from fused_prefopt.data.columns import finite_number, judgement, row_at, whole_number

NO_NUMBERS = [
    math.nan,
    math.inf,
    -math.inf,
    "high",
    "nan",
    [1.0],
    True,
    np.bool_(True),
    "",
    10**400,
]
NO_LABELS = ["bad", "false", "1", -1, 2, 0.5, math.nan, [1], {"a": 1}, torch.tensor([1, 1])]
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 2.0, "score_rejected": 1.0}
POINT = {"prompt": "a", "completion": "b", "reward": 1.0, "group": 0}
PAIR_IDS = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
POINT_IDS = {"prompt_ids": [1], "completion_ids": [2]}


class Letters:
    """One id a letter."""

    eos_token_id = 0

    def encode(self, text, add_special_tokens):
        return [ord(letter) - 96 for letter in text if letter.isalpha()]


def whole_chats(row):
    turns = {side: chat(user="a", assistant=row[side]) for side in ("chosen", "rejected")}
    return row | turns


PAIR_READERS = {
    "preference": preference,
    "ultrafeedback_binarized": lambda rows: ultrafeedback_binarized(map(whole_chats, rows)),
    "tokenise_pairs": lambda rows: tokenise_pairs(rows, Letters(), 9, 4),
    "points_of_pairs": points_of_pairs,
}
POINT_READERS = {
    "completions": completions,
    "tokenise_points": lambda rows: tokenise_points(rows, Letters(), 9, 4),
    "pairs_of_points": pairs_of_points,
}


def refusal(column, value, place):
    """What begins a refusal: the column, the value, the place."""
    return f"{column}: got {value!r} in {place}, wanted "


@pytest.mark.parametrize("value", NO_NUMBERS, ids=str)
@pytest.mark.parametrize("column", ["score_chosen", "score_rejected"])
@pytest.mark.parametrize("read", PAIR_READERS.values(), ids=PAIR_READERS)
def test_a_score_of_a_pair_that_is_no_finite_number_is_refused(read, column, value):
    with pytest.raises(ValueError) as error:
        read([PAIR, PAIR | {"prompt": "z"}, PAIR | {column: value}])
    said = str(error.value)
    assert said.startswith(refusal(column, value, row_at(2)) + "a finite number; ")
    assert "row 2 (counted from 0)" in said


@pytest.mark.parametrize("value", NO_NUMBERS, ids=str)
@pytest.mark.parametrize("read", POINT_READERS.values(), ids=POINT_READERS)
def test_a_rating_that_is_no_finite_number_is_refused(read, value):
    with pytest.raises(ValueError) as error:
        read([POINT, POINT | {"reward": value}])
    assert str(error.value).startswith(refusal("reward", value, row_at(1)) + "a finite number; ")


@pytest.mark.parametrize("value", NO_NUMBERS, ids=str)
@pytest.mark.parametrize(
    ("collator", "feature", "columns"),
    [
        (
            PairCollator(0),
            PAIR_IDS,
            "score_chosen score_rejected collision_chosen collision_rejected ref_chosen_logps"
            " ref_rejected_logps",
        ),
        (PointCollator(0), POINT_IDS, "reward reference prompt_reference sequence_kl collision"),
    ],
    ids=["pairs", "points"],
)
def test_the_collators_refuse_numbers_that_are_not_finite(collator, feature, columns, value):
    good = feature | dict.fromkeys(columns.split(), -1.5)
    collator([good, good])
    for column in columns.split():
        with pytest.raises(ValueError) as error:
            collator([good, good | {column: value}])
        assert str(error.value).startswith(refusal(column, value, "feature 1")), column


def test_a_number_beyond_float32_is_refused_where_it_becomes_one():
    with pytest.raises(ValueError, match=r"reward: got -1e\+300 in feature 1, wanted a number wit"):
        PointCollator(0)([POINT_IDS | {"reward": 1.0}, POINT_IDS | {"reward": -1e300}])


def test_numbers_of_any_make_are_read():
    for value in (2, 2.0, "2", np.float32(2), np.int64(2), torch.tensor(2.0)):
        assert finite_number("score", value, "row 0") == 2.0
        assert preference([PAIR | {"score_rejected": value}])[0]["score_rejected"] == 2.0
    ranked = [POINT | {"reward": text, "completion": text} for text in ("9", "10")]
    assert pairs_of_points(ranked)[0]["score_chosen"] == 10.0


@pytest.mark.parametrize("value", NO_LABELS, ids=str)
def test_a_label_that_is_neither_a_bool_nor_0_or_1_is_refused(value):
    said = {
        lambda rows: completions(rows): ("label", row_at(1)),
        lambda rows: tokenise_points(rows, Letters(), 9, 4): ("label", row_at(1)),
        lambda rows: tokenise_points(
            [{"desirable" if n == "label" else n: v for n, v in row.items()} for row in rows],
            *(Letters(), 9, 4),
        ): ("desirable", row_at(1)),
        lambda rows: PointCollator(0)([POINT_IDS | {"desirable": row["label"]} for row in rows]): (
            "desirable",
            "feature 1",
        ),
    }
    for read, (column, place) in said.items():
        with pytest.raises(ValueError) as error:
            read([POINT | {"label": True}, POINT | {"label": value}])
        message = str(error.value)
        assert message.startswith(refusal(column, value, place) + "true or false, or 1 or 0; map")


def test_labels_of_any_make_are_read():
    kinds = (bool, int, float, np.bool_, np.int8, np.float64, torch.tensor)
    for label in (True, False):
        for value in (kind(label) for kind in kinds):
            assert judgement("label", value, "row 0") is label
            (record,) = completions([POINT | {"label": value}])
            (feature,) = tokenise_points([record], Letters(), 9, 4)
            assert record["desirable"] is feature["desirable"] is label
            assert PointCollator(0)([POINT_IDS | {"desirable": value}])["desirable"].item() is label


@pytest.mark.parametrize("value", ["p7", 1.5, math.nan, True, [1]], ids=str)
def test_a_group_that_is_no_integer_is_refused(value):
    with pytest.raises(ValueError) as error:
        tokenise_points([POINT | {"group": value}], Letters(), 9, 4)
    assert str(error.value).startswith(refusal("group", value, row_at(0)) + "an integer; number")
    with pytest.raises(ValueError, match="group: got .* in feature 0, wanted an integer"):
        PointCollator(0)([POINT_IDS | {"group": value}])


def test_groups_keep_all_their_digits():
    for value in (2**53 + 1, str(2**53 + 1), np.int64(2**53 + 1)):
        assert whole_number("group", value, "row 0") == 2**53 + 1
    assert whole_number("group", 3.0, "row 0") == 3


@pytest.mark.parametrize("name", ["reward", "score", "rating"])
def test_every_name_of_a_rating_is_read_as_the_reward(name):
    rows = [{"prompt": "a", "completion": "b", name: value} for value in (1, None, "2.5")]
    assert [row.get("reward") for row in completions(rows)] == [1.0, None, 2.5]
    features = tokenise_points(rows, Letters(), 9, 4)
    assert [feature.get("reward") for feature in features] == [1.0, None, 2.5]


def test_ratings_of_two_names_are_never_mixed():
    rows = [POINT | {"reward": None, "score": 9.0}, POINT | {"reward": 0.5, "score": 8.0}]
    assert [row.get("reward") for row in completions(rows)] == [None, 0.5]
    features = tokenise_points(rows, Letters(), 9, 4)
    assert [feature.get("reward") for feature in features] == [None, 0.5]


@pytest.mark.parametrize(
    ("read", "row"),
    [
        (preference, PAIR),
        (completions, POINT),
        (PAIR_READERS["tokenise_pairs"], PAIR),
        (POINT_READERS["tokenise_points"], POINT),
        (points_of_pairs, PAIR),
        (pairs_of_points, POINT),
    ],
)
def test_a_missing_column_is_named_with_its_row(read, row):
    gone = "chosen" if "chosen" in row else "completion"
    lacking = {name: value for name, value in row.items() if name != gone}
    with pytest.raises(ValueError, match=rf"row 1 \(counted from 0\): missing column '{gone}'"):
        read([row, lacking])


def test_a_text_with_a_chat_is_named_with_its_row():
    rows = [PAIR, PAIR | {"chosen": chat(assistant="b")}]
    with pytest.raises(ValueError, match=r"completion: got list with a prompt of str in row 1 "):
        tokenise_pairs(rows, Letters(), 9, 4)
    with pytest.raises(ValueError, match=r"completion: got NoneType with a prompt of str in row 0"):
        tokenise_points([POINT | {"completion": None}], Letters(), 9, 4)
