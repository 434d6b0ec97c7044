"""Lists of completions: read, tokenised, collated without a tear, and as other kinds of rows."""

from __future__ import annotations

import logging

import pytest
import torch
from data_tokenizer import Letters, chat, tiny_tokenizer
from tiny_models import eager_sums, list_features, pair_features, tiny_llama

from fused_prefopt.data import (
    ListCollator,
    PairCollator,
    PointCollator,
    lists,
    lists_of_points,
    points_of_lists,
    tokenise_lists,
    tokenise_pairs,
)
from fused_prefopt.data.records import adapted_records
from fused_prefopt.reference import add_reference_logps, dataset_logps

RECORD = {"prompt": "ab", "completions": ["c", "d", "ef"], "rewards": [1, 3.5, 2]}
LIMITS = (6, 3)


def listed(record, *lengths, tokenizer=None):
    (feature,) = tokenise_lists([record], tokenizer or Letters(), *(lengths or (64, 32)))
    return feature


@pytest.mark.parametrize("name", ["rewards", "scores", "ratings"])
def test_rows_are_told_by_their_columns(name, caplog):
    rows = [
        {"prompt": "p", "completions": ["a", "", "b"], name: [1, 2, 3], "weight": 2, "id": 7},
        {"prompt": "q", "completions": ["c", "d"], name: [None, 4], "weight": 1, "id": 8},
        {"prompt": "r", "completions": [], name: [], "weight": 1, "id": 9},
    ]
    records, said = adapted_records("mine", rows)
    assert (
        said == "mine: read as lists of rated completions (adapter lists); columns not read: 'id'"
    )
    assert records == [
        {"prompt": "p", "completions": ["a", "b"], "rewards": [1.0, 3.0], "weight": 2.0},
        {"prompt": "q", "completions": ["d"], "rewards": [4.0], "weight": 1.0},
    ]
    assert caplog.messages == [
        "lists: dropped 2 unusable completions",
        "lists: dropped 1 unusable lists",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [1, 2]}, "rewards: got 2 in row 0 .*, wanted one for each of its 3 comp"),
        ({"rewards": None}, "rewards: got None in row 0"),
        ({"rewards": [1, 2, float("nan")]}, "rewards: got nan in row 0"),
        ({"rewards": [1, 2, True]}, "rewards: got True in row 0"),
        ({"weight": -1}, "weight: got -1 in row 0"),
    ],
)
def test_bad_rows_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        lists([RECORD | change])


def test_lists_that_nothing_rates_are_refused():
    with pytest.raises(ValueError, match="that nothing rates"):
        adapted_records("mine", [{"prompt": "p", "completions": ["a"]}])


def test_lists_have_the_ids_of_pairs():
    record = RECORD | {"weight": 2}
    ids = {"prompt_ids": [1, 2], "completions_ids": [[3, 0], [4, 0], [5, 6, 0]]}
    assert listed(record) == ids | {"rewards": [1.0, 3.5, 2.0], "weight": 2.0}
    pair = {"prompt": "ab", "chosen": "c", "rejected": "d"}
    assert listed(pair) == {**ids, "completions_ids": [[3, 0], [4, 0]], "rewards": [1.0, 0.0]}
    tokenizer = tiny_tokenizer(adds_bos=True)
    turns = [chat(user="the cat"), chat(assistant="sat"), chat(assistant="on mat")]
    (of_pair,) = tokenise_pairs(
        [dict(zip(("prompt", "chosen", "rejected"), turns, strict=True))], tokenizer, 64, 32
    )
    record = {"prompt": turns[0], "completions": turns[1:], "rewards": [0, 1]}
    got = listed(record, tokenizer=tokenizer)
    assert got["prompt_ids"] == of_pair["prompt_ids"]
    assert got["completions_ids"] == [of_pair["chosen_ids"], of_pair["rejected_ids"]]


def test_what_teaches_nothing_is_dropped_and_counted(caplog):
    records = [
        # Two of one text when they are cut, one without a label, and two that are left.
        {"prompt": "", "completions": ["", "cdefgh", "cdefghi", "x"], "rewards": [0, 1, 2, 3]},
        RECORD | {"rewards": [2, 2, 2]},
        RECORD | {"completions": ["c", "c", "c"]},
        {"prompt": "abcdef", "completions": ["g", "h"], "rewards": [0, 1]},
    ]
    with caplog.at_level(logging.INFO):
        features = tokenise_lists(records, Letters(), *LIMITS)
    assert [each["completions_ids"] for each in features] == [
        [[3, 4, 5, 6, 7, 8], [24, 0]],
        [[7, 0], [8, 0]],
    ]
    assert [each["rewards"] for each in features] == [[1.0, 3.0], [0.0, 1.0]]
    assert features[1]["prompt_ids"] == [4, 5, 6]
    (message,) = caplog.messages
    assert message == (
        "lists: read 4 of 12 completions, kept 2 of 4; without two different scores 2; completions"
        " truncated 2, prompts truncated 2, the same as another 3, without a completion 1; raise"
        " max_length (6) or max_prompt_length (3)"
    )
    with pytest.raises(ValueError, match="no row is left"):
        tokenise_lists(records[1:3], Letters(), *LIMITS)


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_batch_of_lists_is_that_of_its_completions(padding_free):
    features = [
        {
            "prompt_ids": [1, 2],
            "completions_ids": [[3], [4, 5], [6]],
            "rewards": [1, 3, 2],
            "references": [-1.0, -2.0, -3.0],
            "prompt_references": [-4.0, -4.0, -4.0],
            "completions_token_weights": [[1.0], [0.5, 2.0], [0.0]],
            "weight": 2.0,
        },
        {
            "prompt_ids": [7],
            "chosen_ids": [8, 9, 10],
            "rejected_ids": [11],
            "score_chosen": 5,
            "score_rejected": 4.5,
            "ref_chosen_logps": -5.0,
            "ref_rejected_logps": -6.0,
            "chosen_token_weights": [1, 2, 3],
            "rejected_token_weights": [1],
            "weight": 1.0,
        },
    ]
    del features[0]["prompt_references"]
    members = [
        point([1, 2], [3], 1, -1.0, [1.0], 2.0, 0),
        point([1, 2], [4, 5], 3, -2.0, [0.5, 2.0], 2.0, 0),
        point([1, 2], [6], 2, -3.0, [0.0], 2.0, 0),
        point([7], [8, 9, 10], 5, -5.0, [1, 2, 3], 1.0, 1),
        point([7], [11], 4.5, -6.0, [1], 1.0, 1),
    ]
    options = {"padding_free": padding_free, "max_length": 3}
    got, wanted = (
        kind(0, **options)(rows)
        for kind, rows in ((ListCollator, features), (PointCollator, members))
    )
    assert got.keys() == wanted.keys()
    assert got["groups"].tolist() == [0, 0, 0, 1, 1]
    assert got["rewards"].tolist() == [1, 3, 2, 5, 4.5]
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(got[name], value, rtol=0, atol=0, msg=name)


def point(prompt, completion, reward, reference, token_weights, weight, group):
    return {
        "prompt_ids": prompt,
        "completion_ids": completion,
        "reward": reward,
        "reference": reference,
        "token_weights": token_weights,
        "weight": weight,
        "group": group,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [1, 2]}, "rewards: got 2 in feature 1, wanted one for each of its 3"),
        ({"rewards": 1}, "rewards: got 1 in feature 1, wanted one for each"),
        ({"rewards": [1, None, 2]}, "rewards: got None in completion 1 of feature 1"),
        ({"rewards": [1, 2, float("inf")]}, "reward: got inf in completion 2 of feature 1"),
        ({"references": [1.0]}, "references: got 1 in feature 1"),
        ({"completions_ids": []}, "completions: got none in feature 1"),
        ({"completions_ids": [[3], [], [4]]}, "completion_ids: completion 1 of feature 1 is empty"),
        ({"completions_ids": [[3], [-1], [4]]}, "completion_ids of completion 1 of feature 1"),
        (
            {"chosen_ids": [3], "rejected_ids": [4]}
            | dict.fromkeys(["score_chosen"], 1)
            | {"score_rejected": 1.0},
            "score_chosen: got 1 beside score_rejected 1 in feature 1",
        ),
    ],
)
def test_a_bad_list_is_named_by_its_place(change, message):
    good = {"prompt_ids": [1], "completions_ids": [[3], [4], [5]], "rewards": [1, 2, 3]}
    with pytest.raises(ValueError, match=message):
        ListCollator(0)([good, good | change])


def test_a_completion_alone_is_no_list():
    with pytest.raises(ValueError, match="completions: got none in feature 0.*lists_of_points"):
        ListCollator(0)([point([1], [2], 1, -1.0, [1.0], 1.0, 0)])


def test_lists_and_points_are_each_others():
    features = add_reference_logps(tiny_llama(), list_features(3), ListCollator(0), progress=False)
    points = points_of_lists(features)
    assert [each["group"] for each in points] == [0] * 3 + [1] * 2 + [2] * 4
    assert lists_of_points(points[::-1])[::-1] == [
        {name: value[::-1] if name != "prompt_ids" else value for name, value in each.items()}
        for each in features
    ]
    assert lists_of_points(points_of_lists([RECORD])) == [RECORD]
    for change in ({"prompt_ids": [9]}, {"weight": 2.0}):
        (name,) = change
        with pytest.raises(ValueError, match=f"{name}: got .* wanted one for all of a group"):
            lists_of_points([points[0], points[1] | change])
    with pytest.raises(ValueError, match="missing column 'group'"):
        lists_of_points([{name: points[0][name] for name in points[0] if name != "group"}])


def test_every_completion_of_a_list_has_its_reference(tmp_path):
    model, features = tiny_llama().double(), list_features(4)
    points = points_of_lists(features)
    for _ in range(2):  # computed, then read
        got = add_reference_logps(
            model,
            features,
            ListCollator(0, padding_free=True),
            batch_size=3,
            cache_dir=tmp_path,
            progress=False,
        )
    for column, part in (("references", "completion"), ("prompt_references", "prompt")):
        wanted = eager_sums(model, points, "completion_ids", part)
        found = [value for each in got for value in each[column]]
        torch.testing.assert_close(torch.tensor(found).double(), wanted, rtol=1e-5, atol=1e-5)
        assert [len(each[column]) for each in got] == [len(each["rewards"]) for each in features]
    assert len(list(tmp_path.iterdir())) == 1
    pairs = pair_features(3)
    for collator in (ListCollator(0), PairCollator(0)):
        of_pairs = add_reference_logps(model, pairs, collator, progress=False)
        wanted = eager_sums(model, pairs, "rejected_ids", "completion")
        found = torch.tensor([each["ref_rejected_logps"] for each in of_pairs]).double()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="features: got lists"):
        dataset_logps(model, features, ListCollator(0), progress=False)
