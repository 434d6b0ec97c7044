"""Adapters: rows with the exact schemas of the public data sets."""

from __future__ import annotations

import logging

import pytest
from data_tokenizer import chat, tiny_tokenizer

from fused_prefopt.data import (
    hh_rlhf,
    preference,
    tokenise_pairs,
    tokenise_points,
    ultrafeedback,
    ultrafeedback_binarized,
)

SCORES = {"score_chosen": 8.5, "score_rejected": 6.0}


def binarized(prompt, chosen, rejected):
    """A row of HuggingFaceH4/ultrafeedback_binarized."""
    sides = [chat(user=prompt, assistant=answer) for answer in (chosen, rejected)]
    return {
        "prompt": prompt,
        "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444ebe57",
        "chosen": sides[0],
        "rejected": sides[1],
        "messages": sides[0],
        **SCORES,
    }


def completion(response, overall, fine):
    """One of the completions in a row of openbmb/UltraFeedback."""
    aspect = {"Rating": "5", "Rationale": "because"}
    typed = aspect | {"Rationale For Rating": "because", "Type": ["1"]}
    return {
        "annotations": {
            "helpfulness": typed,
            "honesty": aspect | {"Rating": "N/A"},
            "instruction_following": aspect,
            "truthfulness": typed,
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
    """A row of openbmb/UltraFeedback."""
    return {
        "source": "evol_instruct",
        "instruction": instruction,
        "models": ["alpaca-7b"] * len(completions),
        "completions": completions,
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def dialogue(*turns):
    """A text in the form of Anthropic/hh-rlhf."""
    roles = ("\n\nHuman:", "\n\nAssistant:")
    return "".join(f"{roles[i % 2]} {turn}" for i, turn in enumerate(turns))


def pair(prompt, chosen, rejected, **columns):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def told(caplog, adapt, rows):
    """The records, and the messages that adapting logged."""
    with caplog.at_level(logging.WARNING):
        return adapt(rows), caplog.messages


def test_ultrafeedback_binarized(caplog):
    datasets = pytest.importorskip("datasets")
    rows = [
        binarized("the cat", "sat", "on the mat"),
        binarized("the mat", "", "on"),
        binarized("the mat", "on", "on"),
        binarized("the mat", "on", "the cat") | {"rejected": chat(user="sat", assistant="the")},
    ]
    records, said = told(caplog, ultrafeedback_binarized, datasets.Dataset.from_list(rows))
    sides = chat(assistant="sat"), chat(assistant="on the mat")
    assert records == [pair(chat(user="the cat"), *sides, **SCORES)]
    assert said == ["ultrafeedback_binarized: dropped 3 unusable pairs"]
    assert len(tokenise_pairs(records, tiny_tokenizer(), 64, 32)) == 1


def test_ultrafeedback_binarized_keeps_earlier_turns():
    turns = chat(system="the", user="cat") + chat(assistant="sat", user="on")
    sides = chat(assistant="mat"), chat(assistant="cat")
    (record,) = ultrafeedback_binarized([pair("the", *(turns + side for side in sides))])
    assert record == pair(turns, *sides)


def test_ultrafeedback(caplog):
    datasets = pytest.importorskip("datasets")
    rows = [
        feedback("the cat", [completion("sat", 7.5, 4.25), completion("on", 1.0, 1.5)]),
        feedback("the mat", []),
        feedback("on the mat", [completion("sat", None, 3.0), completion("", 9.0, 4.0)]),
        feedback("sat", [completion(None, 9.0, 4.0), completion("on", None, None)]),
    ]
    records, said = told(caplog, ultrafeedback, datasets.Dataset.from_list(rows))
    wanted = [("the cat", "sat", 7.5, 0), ("the cat", "on", 1.0, 0), ("on the mat", "sat", 5.5, 2)]
    assert records == [
        {"prompt": chat(user=prompt), "completion": chat(assistant=text), "reward": r, "group": g}
        for prompt, text, r, g in wanted
    ]
    assert said == ["ultrafeedback: dropped 3 unusable completions"]
    assert [each["weight"] for each in ultrafeedback([rows[0] | {"weight": 2}])] == [2.0, 2.0]
    assert len(tokenise_points(records, tiny_tokenizer(), 64, 32)) == 3


@pytest.mark.parametrize(
    ("overall", "fine", "reward"),
    [("8.5", 1.0, 8.5), ("N/A", 5.0, 10.0), (None, 1, 1.0), (float("nan"), "2", 3.25)],
)
def test_ultrafeedback_rewards_are_on_one_scale(overall, fine, reward):
    (record,) = ultrafeedback([feedback("the cat", [completion("sat", overall, fine)])])
    assert record["reward"] == reward


def test_preference_of_texts_and_chats(caplog):
    texts = pair("the cat", " sat", " on", **SCORES)
    chats = pair(chat(user="the cat"), chat(assistant="sat"), chat(assistant="on"), **SCORES)
    rows = [texts | {"source": "x"}, chats, texts | {"rejected": " sat"}, texts | {"chosen": ""}]
    said = ["preference: dropped 2 unusable pairs"]
    assert told(caplog, preference, rows) == ([texts, chats], said)


def test_preference_finds_an_implicit_prompt():
    chats = (chat(user="a", assistant=answer) for answer in "bc")
    rows = [
        ("Human: hi Assistant: yes, I", "Human: hi Assistant: yellow"),
        tuple(chats),
        ("yes", "no"),
    ]
    assert preference({"chosen": chosen, "rejected": rejected} for chosen, rejected in rows) == [
        pair("Human: hi Assistant:", " yes, I", " yellow"),
        pair(chat(user="a"), chat(assistant="b"), chat(assistant="c")),
        pair("", "yes", "no"),
    ]


def test_preference_keeps_gold_completions_behind_their_prompt(caplog):
    whole = {"prompt": "the", "chosen": " cat", "rejected": " mat", "gold": " sat"}
    joined = {name: "the" + whole[name] for name in ("chosen", "rejected", "gold")}
    assert preference([whole, joined]) == [whole, whole]
    with pytest.raises(ValueError, match="gold: got 'a' in row 0 .* wanted it to begin with 'the'"):
        preference([joined | {"gold": "a"}])
    bare = {name: whole[name] for name in whole if name != "gold"}
    said = ["preference: dropped all gold completions, 1 of 2 pairs lack them"]
    assert told(caplog, preference, [whole, whole | {"gold": ""}]) == ([bare, bare], said)


def test_hh_rlhf_splits_at_the_last_answer(caplog):
    shared = dialogue("hi", "yes, I may", "go on", "")[:-1]
    sides = [
        (f"{shared} I may.", f"{shared} I will."),
        (dialogue("a", "b"), dialogue("c", "b d")),
        (dialogue("a", "b"), dialogue("a", "b")),
        (dialogue("a", "b"), dialogue("a", " ")),
        (dialogue("a"), dialogue("a")),
    ]
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in sides]
    said = ["hh_rlhf: dropped 4 unusable pairs"]
    assert told(caplog, hh_rlhf, rows) == ([pair(shared, " I may.", " I will.")], said)
    assert shared.endswith("Human: go on\n\nAssistant:")
    with pytest.raises(ValueError, match=r"rejected: got list in row 1 .*, wanted a text"):
        hh_rlhf([rows[0], rows[0] | {"rejected": chat(user="a", assistant="b")}])


@pytest.mark.parametrize(
    ("adapt", "row", "said"),
    [
        (preference, {"chosen": "a", "label": 1}, "column 'rejected'; got 'chosen', 'label'"),
        (ultrafeedback_binarized, {"text": "a"}, "column 'chosen', 'rejected'; got 'text'"),
        (ultrafeedback, {"instruction": "a"}, "column 'completions'; got 'instruction'"),
    ],
)
def test_a_missing_column_is_named(adapt, row, said):
    with pytest.raises(ValueError, match=f"missing {said}"):
        adapt([row])
