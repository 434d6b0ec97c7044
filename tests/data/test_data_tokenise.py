"""Records to ids: exact tokens, truncation, chat templates, and TRL as witness."""

import pytest
from data_tokenizer import CHAT_TEMPLATE, chat, tiny_tokenizer

from fused_prefopt.data.tokenise import tokenise_pairs, tokenise_points

RECORD = {
    "prompt": "the cat sat",
    "chosen": " on the mat",
    "rejected": " the",
    "score_chosen": 1,
    "score_rejected": 0.5,
    "corruption": "truncate",
}


class Letters:
    """The least a tokenizer must offer: one id a letter."""

    eos_token_id = 0

    def encode(self, text, add_special_tokens):
        return [ord(letter) - 96 for letter in text if letter.isalpha()]


def words(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def test_pairs_get_eos_and_keep_their_scores():
    (feature,) = tokenise_pairs([RECORD | {"prompt": "abc"}], Letters(), 64, 32)
    assert feature == {
        "prompt_ids": [1, 2, 3],
        "chosen_ids": [15, 14, 20, 8, 5, 13, 1, 20, 0],
        "rejected_ids": [20, 8, 5, 0],
        "score_chosen": 1.0,
        "score_rejected": 0.5,
    }


@pytest.mark.parametrize("missing", ["score_chosen", "score_rejected"])
def test_half_a_score_is_none(missing):
    without = {name: value for name, value in RECORD.items() if name != missing}
    for record in (without, RECORD | {missing: None}):
        (feature,) = tokenise_pairs([record], Letters(), 64, 32)
        assert feature.keys() == {"prompt_ids", "chosen_ids", "rejected_ids"}


def test_prompts_lose_the_left_and_completions_the_right():
    record = {"prompt": "abcdef", "chosen": "ghijkl", "rejected": "g"}
    (feature,) = tokenise_pairs([record], Letters(), 6, 4)
    assert feature == {"prompt_ids": [3, 4, 5, 6], "chosen_ids": [7, 8], "rejected_ids": [7, 0]}
    (feature,) = tokenise_pairs([record | {"rejected": "m"}], Letters(), 3, 2)
    assert feature == {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [13]}


def test_an_empty_text_is_the_eos_alone():
    (feature,) = tokenise_points([{"prompt": "a", "completion": ""}], Letters(), 3, 2)
    assert feature == {"prompt_ids": [1], "completion_ids": [0]}


def test_points_keep_reward_group_and_desirable():
    records = [
        {"prompt": "ab", "completion": "c", "reward": 1, "group": 3, "desirable": 1},
        {"prompt": "ab", "completion": "d", "reward": None, "group": 3},
    ]
    assert tokenise_points(records, Letters(), 9, 8) == [
        {
            "prompt_ids": [1, 2],
            "completion_ids": [3, 0],
            "reward": 1.0,
            "group": 3,
            "desirable": True,
        },
        {"prompt_ids": [1, 2], "completion_ids": [4, 0], "group": 3},
    ]


def test_eos_is_not_doubled_and_bos_survives_truncation():
    tokenizer = tiny_tokenizer(adds_bos=True)
    record = RECORD | {"chosen": " on</s>"}
    (feature,) = tokenise_pairs([record], tokenizer, 64, 32)
    assert words(tokenizer, feature["prompt_ids"]) == "<s> the cat sat"
    assert words(tokenizer, feature["chosen_ids"]) == "on </s>"
    (feature,) = tokenise_pairs([record], tokenizer, 64, 3)
    assert words(tokenizer, feature["prompt_ids"]) == "<s> cat sat"
    (feature,) = tokenise_pairs([RECORD], tiny_tokenizer(adds_bos=False), 64, 32)
    assert words(tokenizer, feature["prompt_ids"]) == "the cat sat"


def test_chats_go_through_the_template():
    tokenizer = tiny_tokenizer()
    record = {
        "prompt": chat(user="the cat"),
        "chosen": chat(assistant="sat"),
        "rejected": chat(assistant="on the mat"),
    }
    (feature,) = tokenise_pairs([record], tokenizer, 64, 32)
    assert words(tokenizer, feature["prompt_ids"]) == "<s> user the cat <end> assistant"
    assert words(tokenizer, feature["chosen_ids"]) == "sat <end>"
    assert words(tokenizer, feature["rejected_ids"]) == "on the mat <end>"
    point = {"prompt": record["prompt"], "completion": record["rejected"], "reward": 2.0}
    assert tokenise_points([point], tokenizer, 64, 32) == [
        {
            "prompt_ids": feature["prompt_ids"],
            "completion_ids": feature["rejected_ids"],
            "reward": 2.0,
        }
    ]


@pytest.mark.parametrize("conversational", [False, True])
def test_ids_equal_trl(conversational):
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    datasets = pytest.importorskip("datasets")
    tokenizer = tiny_tokenizer(adds_bos=True)
    record = {name: RECORD[name] for name in ("prompt", "chosen", "rejected")}
    if conversational:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        record = {name: chat(**{role: record[name]}) for name, role in roles.items()}
    trainer = object.__new__(trl.DPOTrainer)
    trainer._tokenizer = tokenizer
    (theirs,) = trainer._prepare_dataset(
        datasets.Dataset.from_list([record]), tokenizer, trl.DPOConfig(use_cpu=True), "train"
    )
    (ours,) = tokenise_pairs([record], tokenizer, 64, 32)
    assert ours == {name: theirs[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}


def test_records_from_a_dataset():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([RECORD, RECORD | {"score_chosen": None}])
    first, second = tokenise_pairs(rows, Letters(), 64, 32)
    assert first == tokenise_pairs([RECORD], Letters(), 64, 32)[0]
    assert second.keys() == {"prompt_ids", "chosen_ids", "rejected_ids"}


def test_a_template_that_rewrites_the_prompt_is_an_error():
    tokenizer = tiny_tokenizer(
        template=CHAT_TEMPLATE.replace("{{ bos_token }}", "{{ messages | length }}")
    )
    record = {"prompt": chat(user="the cat"), "completion": chat(assistant="sat")}
    with pytest.raises(ValueError, match="prompt: .* not a proper prefix of the whole chat"):
        tokenise_points([record], tokenizer, 64, 32)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="max_prompt_length: got 64, wanted 1..63"):
        tokenise_pairs([RECORD], Letters(), 64, 64)
    with pytest.raises(ValueError, match="missing column 'rejected'; got 'prompt', 'chosen'"):
        tokenise_pairs([{"prompt": "a", "chosen": "b"}], Letters(), 64, 32)
    with pytest.raises(ValueError, match="completion: got list with a prompt of str"):
        tokenise_points([{"prompt": "a", "completion": []}], Letters(), 64, 32)
    without_eos = Letters()
    without_eos.eos_token_id = None
    with pytest.raises(ValueError, match="tokenizer: got eos_token_id None"):
        tokenise_pairs([RECORD], without_eos, 64, 32)
