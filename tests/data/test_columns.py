"""Values of columns: scores, groups and labels are read exactly, or refused with their place."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from data_tokenizer import Letters, chat

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

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 2.0, "score_rejected": 1.0}
POINT = {"prompt": "a", "completion": "b", "reward": 1.0, "group": 0}
POINT_IDS = {"prompt_ids": [1], "completion_ids": [2]}
OF_PAIRS = [
    *("score_chosen", "score_rejected", "collision_chosen", "collision_rejected"),
    *("ref_chosen_logps", "ref_rejected_logps"),
]
PAIR_IDS = {
    **{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
    **dict.fromkeys(OF_PAIRS, -1.5),
}
OF_POINTS = [
    *("reward", "reference", "prompt_reference", "sequence_kl", "collision"),
    *("group", "desirable"),
]


def of_pairs(rows):
    return tokenise_pairs(rows, Letters(), 9, 4)


def of_points(rows):
    return tokenise_points(rows, Letters(), 9, 4)


def of_whole_chats(rows):
    chats = (
        {side: chat(user="a", assistant=row[side]) for side in ("chosen", "rejected")}
        for row in rows
    )
    return ultrafeedback_binarized([row | sides for row, sides in zip(rows, chats, strict=True)])


# What reads rows, a row, its columns whose values are checked.
READERS = {
    "preference": (preference, PAIR, OF_PAIRS[:2]),
    "ultrafeedback_binarized": (of_whole_chats, PAIR, OF_PAIRS[:2]),
    "tokenise_pairs": (of_pairs, PAIR, OF_PAIRS[:2]),
    "points_of_pairs": (points_of_pairs, PAIR, OF_PAIRS[:2]),
    "PairCollator": (PairCollator(0), PAIR_IDS, OF_PAIRS),
    "completions": (completions, POINT, ["reward", "label", "desirable"]),
    "tokenise_points": (of_points, POINT, ["reward", "label", "desirable", "group"]),
    "pairs_of_points": (pairs_of_points, POINT, ["reward"]),
    "PointCollator": (PointCollator(0), POINT_IDS, OF_POINTS),
}
NO_NUMBERS = [
    *(math.nan, math.inf, -math.inf, 10**400),
    *("high", "nan", "", [1.0], True, np.bool_(True)),
]
NO_LABELS = ["bad", "false", "1", -1, 2, 0.5, math.nan, [1], {"a": 1}, torch.tensor([1, 1])]
NO_GROUPS = ["p7", 1.5, math.nan, True, [1]]
# Column → a value, what is none, and what is wanted; all others are numbers.
KINDS = {
    "group": (3, NO_GROUPS, "an integer; number the prompts"),
    **dict.fromkeys(
        ("label", "desirable"), (True, NO_LABELS, "true or false, or 1 or 0; map what is desirable")
    ),
}
NUMBER = (-1.5, NO_NUMBERS, "a finite number; ")


@pytest.mark.parametrize(
    ("reader", "column"), [(name, column) for name in READERS for column in READERS[name][2]]
)
def test_a_value_of_no_use_is_refused_with_its_column_and_its_place(reader, column):
    read, row, _ = READERS[reader]
    good, refused, wanted = KINDS.get(column, NUMBER)
    row = row | {column: good}
    read([row, dict(row)])
    place = "feature 1" if "Collator" in reader else "row 1 (counted from 0)"
    for value in refused:
        with pytest.raises(ValueError) as error:
            read([row, row | {column: value}])
        said = str(error.value)
        assert said.startswith(f"{column}: got {value!r} in {place}, wanted {wanted}"), value


def test_a_number_beyond_float32_is_refused_where_it_becomes_one():
    with pytest.raises(ValueError, match=r"reward: got -1e\+300 in feature 1, wanted a number wit"):
        PointCollator(0)([POINT_IDS | {"reward": 1.0}, POINT_IDS | {"reward": -1e300}])


def test_numbers_of_any_make_are_read():
    for value in (2, 2.0, "2", np.float32(2), np.int64(2), torch.tensor(2.0)):
        assert finite_number("score", value, row_at(0)) == 2.0
        assert preference([PAIR | {"score_rejected": value}])[0]["score_rejected"] == 2.0
    ranked = [POINT | {"reward": text, "completion": text} for text in ("9", "10")]
    assert pairs_of_points(ranked)[0]["score_chosen"] == 10.0


def test_labels_of_any_make_are_read():
    kinds = (bool, int, float, np.bool_, np.int8, np.float64, torch.tensor)
    for label in (True, False):
        for value in (kind(label) for kind in kinds):
            assert judgement("label", value, "row 0") is label
            (record,) = completions([POINT | {"label": value}])
            (feature,) = of_points([record])
            assert record["desirable"] is feature["desirable"] is label
            assert PointCollator(0)([POINT_IDS | {"desirable": value}])["desirable"].item() is label


def test_groups_keep_all_their_digits():
    for value in (2**53 + 1, str(2**53 + 1), np.int64(2**53 + 1)):
        assert whole_number("group", value, "row 0") == 2**53 + 1
    assert whole_number("group", 3.0, "row 0") == 3


@pytest.mark.parametrize("read", [completions, of_points])
@pytest.mark.parametrize("name", ["reward", "score", "rating"])
def test_one_name_of_a_rating_is_read_as_the_reward(read, name):
    rows = [{"prompt": "a", "completion": "b", name: value} for value in (1, None, "2.5")]
    assert [row.get("reward") for row in read(rows)] == [1.0, None, 2.5]
    # Of two names, the first that has values: they are never mixed.
    rows = [POINT | {"reward": value, "score": 9.0} for value in (None, 0.5)]
    assert [row.get("reward") for row in read(rows)] == [None, 0.5]


@pytest.mark.parametrize("reader", [name for name in READERS if "Collator" not in name])
def test_a_missing_column_is_named_with_its_row(reader):
    read, row, _ = READERS[reader]
    gone = "chosen" if "chosen" in row else "completion"
    lacking = {name: value for name, value in row.items() if name != gone}
    if reader == "ultrafeedback_binarized":
        read = ultrafeedback_binarized
        row = row | dict.fromkeys(("chosen", "rejected"), chat(user="a", assistant="b"))
    with pytest.raises(ValueError, match=rf"row 1 \(counted from 0\): missing column '{gone}'"):
        read([row, lacking])


def test_a_text_with_a_chat_is_named_with_its_row():
    with pytest.raises(ValueError, match=r"completion: got list with a prompt of str in row 1 "):
        of_pairs([PAIR, PAIR | {"chosen": chat(assistant="b")}])
    with pytest.raises(ValueError, match=r"completion: got NoneType with a prompt of str in row 0"):
        of_points([POINT | {"completion": None}])
