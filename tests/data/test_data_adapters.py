"""Adapters: rows with the exact schemas of the public datasets."""

import json
import logging

import pytest
from data_tokenizer import chat, tiny_tokenizer

from fused_prefopt.data.adapters import (
    READERS,
    adapted_records,
    completions,
    hh_rlhf,
    load_dataset_records,
    preference,
    ultrafeedback,
    ultrafeedback_binarized,
)
from fused_prefopt.data.recognition import recognise
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


def dialogue(*turns):
    """A text in the form of HH-RLHF."""
    roles = ("\n\nHuman:", "\n\nAssistant:")
    return "".join(f"{roles[i % 2]} {turn}" for i, turn in enumerate(turns))


def test_hh_rlhf_splits_at_the_last_answer(caplog):
    shared = dialogue("hi", "yes, I may", "go on", "")[:-1]
    rows = [
        {"chosen": f"{shared} I may.", "rejected": f"{shared} I will."},
        {"chosen": dialogue("a", "b"), "rejected": dialogue("c", "b d")},
        {"chosen": dialogue("a", "b"), "rejected": dialogue("a", "b")},
        {"chosen": dialogue("a", "b"), "rejected": dialogue("a", " ")},
        {"chosen": dialogue("a"), "rejected": dialogue("a")},
    ]
    with caplog.at_level(logging.WARNING):
        records = hh_rlhf(rows)
    assert records == [{"prompt": shared, "chosen": " I may.", "rejected": " I will."}]
    assert shared.endswith("Human: go on\n\nAssistant:")
    assert caplog.messages == ["hh_rlhf: dropped 4 unusable pairs"]
    with pytest.raises(ValueError, match=r"rejected: got list in row 1 .*, wanted a text"):
        hh_rlhf([rows[0], rows[0] | {"rejected": chat(user="a", assistant="b")}])


TEXTS = {"chosen": " sat", "rejected": " on"}
CHATS = {"chosen": chat(assistant="sat"), "rejected": chat(assistant="on")}
WHOLE = {
    side: chat(user="the cat", assistant=answer)
    for side, answer in (("chosen", "sat"), ("rejected", "on"))
}
HH = {side: dialogue("the cat", answer) for side, answer in (("chosen", "sat"), ("rejected", "on"))}
COMPLETION = {"prompt": "the cat", "completion": " sat"}


@pytest.mark.parametrize(
    ("row", "adapter", "what"),
    [
        (TEXTS | {"prompt": "the cat"}, "preference", "preference pairs"),
        (TEXTS, "preference", "preference pairs"),
        (TEXTS | {"prompt": None, "completion": None}, "preference", "preference pairs"),
        (CHATS | {"prompt": chat(user="the cat")}, "preference", "preference pairs"),
        (WHOLE, "preference", "preference pairs"),
        (WHOLE | {"score_chosen": 2.0, "score_rejected": 1.0}, "preference", "preference pairs"),
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
    assert said == f"my.jsonl: read as {what} (adapter {adapter})"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (COMPLETION | TEXTS | {"label": 1}, "'rejected', 'label', which fit pairs and completions"),
        ({"completion": "a", "label": 1} | TEXTS, "which fit pairs and completions"),
        (COMPLETION, "'prompt', 'completion', completions that nothing judges"),
        ({"prompt": "a", "text": "b"}, "'prompt', 'text', which no adapter reads"),
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
    (pair,), said = adapted_records("my.jsonl", [row], "preference")
    assert pair["chosen"] == " sat" and said == "my.jsonl: read by adapter preference"
    assert "desirable" in adapted_records("my.jsonl", [row], "completions")[0][0]
    with pytest.raises(ValueError, match="adapter: got 'prefrence' .did you mean 'preference'"):
        adapted_records("my.jsonl", [row], "prefrence")
    records, said = adapted_records("HuggingFaceH4/ultrafeedback_binarized", [WHOLE])
    assert records == ultrafeedback_binarized([WHOLE])
    assert said.endswith(": read by adapter ultrafeedback_binarized, known by the name")
    assert adapted_records("my.jsonl", []) == ([], "my.jsonl: no rows")


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
        ("someone/chats", binarized("a", "b", "c"), ultrafeedback_binarized),
        ("someone/ratings", {"prompt": "a", "completion": "b", "score": 2.0}, completions),
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
    if "completion" not in row and "instruction" not in row:
        named = load_dataset_records(name, "train", limit, adapter="preference")
        assert named == preference([row] * (limit or 3))


def test_errors_name_the_column():
    with pytest.raises(ValueError, match="missing column 'rejected'; got 'chosen', 'label'"):
        preference([{"chosen": "a", "label": 1}])
    with pytest.raises(ValueError, match="missing column 'chosen', 'rejected'; got 'text'"):
        ultrafeedback_binarized([{"text": "a"}])
    with pytest.raises(ValueError, match="missing column 'completions'; got 'instruction'"):
        ultrafeedback([{"instruction": "a"}])
