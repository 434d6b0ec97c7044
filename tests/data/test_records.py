"""Records of a data set: rows are recognised by their columns; pairs become points and back."""

from __future__ import annotations

import json
import logging

import pytest
from data_tokenizer import chat
from test_adapters import binarized, completion, dialogue, feedback, pair

from fused_prefopt.data import load_dataset_records, pairs_of_points, points_of_pairs
from fused_prefopt.data.records import READERS, adapted_records, recognise

TEXTS = {"chosen": " sat", "rejected": " on"}
CHATS = {"chosen": chat(assistant="sat"), "rejected": chat(assistant="on")}
WHOLE = {side: chat(user="the cat", assistant=text) for side, text in TEXTS.items()}
HH = {side: dialogue("the cat", text) for side, text in TEXTS.items()}
SCORES = {"score_chosen": 2.0, "score_rejected": 1.0}
COMPLETION = {"prompt": "the cat", "completion": " sat"}


def point(text, reward, group, prompt="p"):
    return {"prompt": prompt, "completion": text, "reward": reward, "group": group}


@pytest.mark.parametrize(
    ("row", "adapter", "what"),
    [
        (TEXTS | {"prompt": "the cat"}, "preference", "preference pairs"),
        (TEXTS, "preference", "preference pairs"),
        (TEXTS | {"prompt": None, "completion": None}, "preference", "preference pairs"),
        (CHATS | {"prompt": chat(user="the cat")}, "preference", "preference pairs"),
        (WHOLE, "preference", "preference pairs"),
        (WHOLE | SCORES, "preference", "preference pairs"),
        (binarized("the cat", "sat", "on"), "ultrafeedback_binarized", "pairs of whole chats"),
        (WHOLE | {"prompt": "the cat"}, "ultrafeedback_binarized", "pairs of whole chats"),
        (HH, "hh_rlhf", "pairs of dialogues in HH-RLHF's form"),
        (HH | {"prompt": "the cat"}, "preference", "preference pairs"),
        (feedback("the cat", []), "ultrafeedback", "completions of UltraFeedback"),
        (COMPLETION | {"label": False}, "completions", "labelled completions"),
        (COMPLETION | {"desirable": 1}, "completions", "labelled completions"),
        (COMPLETION | {"reward": 1.0}, "completions", "rated completions"),
        (COMPLETION | {"score": 1.0}, "completions", "rated completions"),
        (COMPLETION | {"rating": None}, "completions", "rated completions"),
        (COMPLETION | {"score": 1, "label": 1}, "completions", "labelled and rated completions"),
    ],
)
def test_rows_are_recognised_by_their_columns(row, adapter, what):
    fit = recognise(row)
    assert (fit.adapter, fit.what) == (adapter, what)
    records, said = adapted_records("my.jsonl", iter([row, row]))
    assert records == READERS[adapter]([row, row])
    wanted = f"my.jsonl: read as {what} (adapter {adapter})"
    # Of some of these rows an adapter needs no more than a part.
    assert said == wanted or said.startswith(f"{wanted}; columns not read: '")


@pytest.mark.parametrize("adapter", [None, "preference"])
def test_columns_that_nobody_reads_are_named(adapter):
    row = TEXTS | {"prompt": "the", "weights": 0.5, "source": "a", "weight": 2.0}
    records, said = adapted_records("my.jsonl", [row], adapter)
    assert said.endswith("; columns not read: 'weights', 'source'")
    assert records[0]["weight"] == 2.0 and "weights" not in records[0]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (COMPLETION | TEXTS | {"label": 1}, "'rejected', 'label', which fit pairs and completions"),
        ({"completion": "a", "label": 1} | TEXTS, "which fit pairs and completions"),
        (COMPLETION, "'prompt', 'completion', completions that nothing judges"),
        ({"prompt": "a", "text": "b"}, "'prompt', 'text', which no adapter reads"),
        ({"prompt_ids": [1], "chosen_ids": [2]}, "'chosen_ids', of token ids, which trainers and"),
        (
            {"prompt": "a", "choosen": "b", "rejected": "c"},
            "which no adapter reads (missing 'chosen' (did you mean 'choosen'?))",
        ),
        (CHATS | {"prompt": "the cat"}, "with answers that are neither texts, as the prompt is, n"),
    ],
)
def test_rows_that_fit_no_adapter_or_several_are_an_error(row, problem):
    with pytest.raises(ValueError) as error:
        adapted_records("my.jsonl", [row])
    said = str(error.value)
    assert said.startswith("columns: got '") and problem in said
    for name in (*READERS, "adapter: NAME", "chosen, rejected", "instruction, completions"):
        assert name in said


def test_an_adapter_that_is_named_and_a_name_of_the_hub_decide():
    row = COMPLETION | TEXTS | {"label": 1}
    (record,), said = adapted_records("my.jsonl", [row], "preference")
    assert record["chosen"] == " sat" and said == (
        "my.jsonl: read by adapter preference; columns not read: 'completion', 'label'"
    )
    assert "desirable" in adapted_records("my.jsonl", [row], "completions")[0][0]
    with pytest.raises(ValueError, match="adapter: got 'prefrence' .did you mean 'preference'"):
        adapted_records("my.jsonl", [row], "prefrence")
    records, said = adapted_records("HuggingFaceH4/ultrafeedback_binarized", [WHOLE])
    assert records == READERS["ultrafeedback_binarized"]([WHOLE])
    assert said.endswith(": read by adapter ultrafeedback_binarized, known by the name")
    assert adapted_records("my.jsonl", []) == ([], "my.jsonl: no rows")


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize(
    ("name", "row", "adapter"),
    [
        ("HuggingFaceH4/ultrafeedback_binarized", binarized("a", "b", "c"), None),
        ("openbmb/UltraFeedback", feedback("a", [completion("b", 2.0, 1.0)]), "ultrafeedback"),
        ("someone/pairs", pair("a", "b", "c"), "preference"),
        ("someone/chats", binarized("a", "b", "c"), None),
        ("someone/ratings", {"prompt": "a", "completion": "b", "score": 2.0}, "completions"),
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
    rows = [row] * (limit or 3)
    found = load_dataset_records(name, "train", limit)
    assert found == READERS[adapter or "ultrafeedback_binarized"](rows)
    if adapter is None:
        named = load_dataset_records(name, "train", limit, adapter="preference")
        assert named == READERS["preference"](rows) != found


def test_a_pair_becomes_two_rated_points():
    scored = pair("p", "c", "r", score_chosen=7, score_rejected=3)
    assert points_of_pairs([scored, pair("q", "d", "s")]) == [
        *(point("c", 7.0, 0), point("r", 3.0, 0)),
        *(point("d", 1.0, 1, "q"), point("s", 0.0, 1, "q")),
    ]


def test_the_best_and_the_worst_point_become_a_pair_and_ties_are_dropped(caplog):
    rated = [("a", 2, 5), ("b", 9, 5), ("x", 4, 6), ("c", 1, 5), ("y", 4, 6), ("z", 1, 7)]
    with caplog.at_level(logging.INFO):
        pairs = pairs_of_points(point(*each) for each in rated)
    assert pairs == [pair("p", "b", "c", score_chosen=9.0, score_rejected=1.0)]
    assert [(each.levelname, each.getMessage()) for each in caplog.records] == [
        ("WARNING", "pairs_of_points: dropped 2 of 3 prompts, whose rewards do not differ")
    ]
    with pytest.raises(ValueError, match="prompt: got 'q' in row 1 .* wanted one for all of a gr"):
        pairs_of_points([point("a", 2, 5), point("b", 1, 5, "q")])
