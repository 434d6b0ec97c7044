"""Adapters: rows with the exact schemas of the public datasets."""

import json
import logging

import pytest
from data_tokenizer import chat, tiny_tokenizer

from fused_prefopt.data.adapters import (
    load_dataset_records,
    preference,
    ultrafeedback,
    ultrafeedback_binarized,
)
from fused_prefopt.data.tokenise import tokenise_pairs, tokenise_points


def binarized(prompt, chosen, rejected, score_chosen=8.5, score_rejected=6.0):
    def answered(answer):
        return [
            {"content": prompt, "role": "user"},
            {"content": answer, "role": "assistant"},
        ]

    return {
        "prompt": prompt,
        "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444ebe57",
        "chosen": answered(chosen),
        "rejected": answered(rejected),
        "messages": answered(chosen),
        "score_chosen": score_chosen,
        "score_rejected": score_rejected,
    }


def completion(response, overall, fine):
    def aspect(rating):
        return {"Rating": rating, "Rationale": "because"}

    def typed(rating):
        return aspect(rating) | {"Rationale For Rating": "because", "Type": ["1"]}

    return {
        "annotations": {
            "helpfulness": typed("4"),
            "honesty": aspect("N/A"),
            "instruction_following": aspect("5"),
            "truthfulness": typed("3"),
        },
        "critique": "Good.",
        "custom_system_prompt": "Be helpful.",
        "fine-grained_score": fine,
        "model": "alpaca-7b",
        "overall_score": overall,
        "principle": "helpfulness",
        "response": response,
    }


def feedback(instruction, completions):
    return {
        "source": "evol_instruct",
        "instruction": instruction,
        "models": ["alpaca-7b"] * len(completions),
        "completions": completions,
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def test_ultrafeedback_binarized(caplog):
    datasets = pytest.importorskip("datasets")
    rows = [
        binarized("the cat", "sat", "on the mat"),
        binarized("the mat", "", "on"),
        binarized("the mat", "on", "on"),
        binarized("the mat", "on", "the cat") | {"rejected": chat(user="sat", assistant="the")},
    ]
    with caplog.at_level(logging.WARNING):
        records = ultrafeedback_binarized(datasets.Dataset.from_list(rows))
    assert records == [
        {
            "prompt": chat(user="the cat"),
            "chosen": chat(assistant="sat"),
            "rejected": chat(assistant="on the mat"),
            "score_chosen": 8.5,
            "score_rejected": 6.0,
        }
    ]
    assert caplog.messages == ["ultrafeedback_binarized: dropped 3 unusable pairs"]
    tokenizer = tiny_tokenizer()
    (feature,) = tokenise_pairs(records, tokenizer, 64, 32)
    assert tokenizer.decode(feature["chosen_ids"]) == "sat <end>"


def test_ultrafeedback_binarized_keeps_earlier_turns():
    turns = chat(system="the", user="cat") + chat(assistant="sat", user="on")
    row = binarized("the", "", "")
    row["chosen"], row["rejected"] = turns + chat(assistant="mat"), turns + chat(assistant="cat")
    (record,) = ultrafeedback_binarized([row])
    assert record["prompt"] == turns
    assert (record["chosen"], record["rejected"]) == (chat(assistant="mat"), chat(assistant="cat"))


def test_ultrafeedback(caplog):
    datasets = pytest.importorskip("datasets")
    rows = [
        feedback("the cat", [completion("sat", 7.5, 4.25), completion("on", 1.0, 1.5)]),
        feedback("the mat", []),
        feedback("on the mat", [completion("sat", None, 3.0), completion("", 9.0, 4.0)]),
        feedback("sat", [completion(None, 9.0, 4.0), completion("on", None, None)]),
    ]
    with caplog.at_level(logging.WARNING):
        records = ultrafeedback(datasets.Dataset.from_list(rows))
    assert [(r["completion"][0]["content"], r["reward"], r["group"]) for r in records] == [
        ("sat", 7.5, 0),
        ("on", 1.0, 0),
        ("sat", 5.5, 2),
    ]
    assert records[2]["prompt"] == chat(user="on the mat")
    assert records[2]["completion"] == chat(assistant="sat")
    assert caplog.messages == ["ultrafeedback: dropped 3 unusable completions"]
    features = tokenise_points(records, tiny_tokenizer(), 64, 32)
    assert [feature["group"] for feature in features] == [0, 0, 2]


@pytest.mark.parametrize(
    ("overall", "fine", "reward"),
    [("8.5", 1.0, 8.5), ("N/A", 5.0, 10.0), (None, 1, 1.0), (float("nan"), "2", 3.25)],
)
def test_ultrafeedback_rewards_are_on_one_scale(overall, fine, reward):
    (record,) = ultrafeedback([feedback("the cat", [completion("sat", overall, fine)])])
    assert record["reward"] == reward


def test_preference_of_texts_and_chats(caplog):
    scores = {"score_chosen": 2, "score_rejected": 1}
    texts = {"prompt": "the cat", "chosen": " sat", "rejected": " on", **scores}
    chats = {
        "prompt": chat(user="the cat"),
        "chosen": chat(assistant="sat"),
        "rejected": chat(assistant="on"),
        **scores,
    }
    rows = [texts | {"source": "x"}, chats, texts | {"rejected": " sat"}, texts | {"chosen": ""}]
    with caplog.at_level(logging.WARNING):
        first, second = preference(rows)
    assert first == texts and second == chats
    assert caplog.messages == ["preference: dropped 2 unusable pairs"]


def test_preference_finds_an_implicit_prompt():
    rows = [
        {"chosen": "Human: hi Assistant: yes, I", "rejected": "Human: hi Assistant: yellow"},
        {"chosen": chat(user="a", assistant="b"), "rejected": chat(user="a", assistant="c")},
        {"chosen": "yes", "rejected": "no"},
    ]
    assert preference(rows) == [
        {"prompt": "Human: hi Assistant:", "chosen": " yes, I", "rejected": " yellow"},
        {"prompt": chat(user="a"), "chosen": chat(assistant="b"), "rejected": chat(assistant="c")},
        {"prompt": "", "chosen": "yes", "rejected": "no"},
    ]


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize(
    ("name", "row", "adapter"),
    [
        (
            "HuggingFaceH4/ultrafeedback_binarized",
            binarized("a", "b", "c"),
            ultrafeedback_binarized,
        ),
        ("openbmb/UltraFeedback", feedback("a", [completion("b", 2.0, 1.0)]), ultrafeedback),
        ("someone/pairs", {"prompt": "a", "chosen": "b", "rejected": "c"}, preference),
    ],
)
def test_load_dataset_records(tmp_path, monkeypatch, name, row, adapter, limit):
    datasets = pytest.importorskip("datasets")
    # A local folder of the same name makes the real load_dataset work without the hub.
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text((json.dumps(row) + "\n") * 3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    records = load_dataset_records(name, "train", limit)
    assert records == adapter([row] * (limit or 3))


def test_errors_name_the_column():
    with pytest.raises(ValueError, match="missing column 'rejected'; got 'chosen', 'label'"):
        preference([{"chosen": "a", "label": 1}])
    with pytest.raises(ValueError, match="missing column 'chosen', 'rejected'; got 'text'"):
        ultrafeedback_binarized([{"text": "a"}])
    with pytest.raises(ValueError, match="missing column 'completions'; got 'instruction'"):
        ultrafeedback([{"instruction": "a"}])
