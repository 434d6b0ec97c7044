"""Records to ids: exact tokens, chat templates, TRL as witness; what truncation cuts is told."""

from __future__ import annotations

import logging

import pytest
from data_tokenizer import CHAT_TEMPLATE, Letters, chat, tiny_tokenizer

from fused_prefopt.data import tokenise_pairs, tokenise_points
from fused_prefopt.data.tokenise import counted_pairs, counted_points

WORDS = {"prompt": "the cat sat", "chosen": " on the mat", "rejected": " the"}
SCORES = {"score_chosen": 1, "score_rejected": 0.5}
FITS = {"prompt": "ab", "chosen": "cd", "rejected": "e"}
LIMITS = (6, 3)
# What happens to it within the limits.
LONG_COMPLETION = FITS | {"chosen": "cdefgh"}
LONG_PROMPT = FITS | {"prompt": "abcdef", "rejected": ""}
EQUAL_WHEN_CUT = FITS | {"chosen": "cdefgh", "rejected": "cdefxy"}
EQUAL_ANYWAY = FITS | {"rejected": "cd"}
NOTHING_PREDICTED = FITS | {"prompt": "", "rejected": ""}


def of_pair(record, *lengths, tokenizer=None):
    (feature,) = tokenise_pairs([record], tokenizer or Letters(), *(lengths or (64, 32)))
    return feature


def ids(prompt, chosen, rejected, **scores):
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, **scores}


def point(prompt, completion, **columns):
    return {"prompt_ids": prompt, "completion_ids": completion, **columns}


def test_pairs_get_eos_and_keep_their_scores():
    got = of_pair(FITS | SCORES | {"corruption": "truncate"})
    assert got == ids([1, 2], [3, 4, 0], [5, 0], score_chosen=1.0, score_rejected=0.5)


@pytest.mark.parametrize("missing", SCORES)
def test_half_a_score_is_none(missing):
    scores = {name: value for name, value in SCORES.items() if name != missing}
    for record in (FITS | scores, FITS | SCORES | {missing: None}):
        assert of_pair(record) == ids([1, 2], [3, 4, 0], [5, 0])


def test_prompts_lose_the_left_and_completions_the_right():
    record = {"prompt": "abcdef", "chosen": "ghijkl", "rejected": "g"}
    assert of_pair(record, 6, 4) == ids([3, 4, 5, 6], [7, 8], [7, 0])
    assert of_pair(record | {"rejected": "m"}, 3, 2) == ids([5, 6], [7], [13])


def test_points_keep_reward_group_and_desirable():
    records = [
        {"prompt": "ab", "completion": "c", "reward": 1, "group": 3, "desirable": 1},
        {"prompt": "ab", "completion": "", "reward": None, "group": 3},
    ]
    assert tokenise_points(records, Letters(), 9, 8) == [
        point([1, 2], [3, 0], reward=1.0, group=3, desirable=True),
        point([1, 2], [0], group=3),
    ]


def test_eos_is_not_doubled_and_bos_survives_truncation():
    def words(name, *lengths, adds_bos=True):
        tokenizer = tiny_tokenizer(adds_bos)
        feature = of_pair(WORDS | {"chosen": " on</s>"}, *lengths, tokenizer=tokenizer)
        return " ".join(tokenizer.convert_ids_to_tokens(feature[name]))

    assert words("chosen_ids") == "on </s>"
    assert words("prompt_ids") == "<s> the cat sat"
    assert words("prompt_ids", 64, 3) == "<s> cat sat"
    assert words("prompt_ids", adds_bos=False) == "the cat sat"


def test_chats_go_through_the_template():
    tokenizer = tiny_tokenizer()
    sides = {"chosen": chat(assistant="sat"), "rejected": chat(assistant="on the mat")}
    feature = of_pair({"prompt": chat(user="the cat"), **sides}, tokenizer=tokenizer)
    texts = (" ".join(tokenizer.convert_ids_to_tokens(each)) for each in feature.values())
    prompt = "<s> user the cat <end> assistant"
    assert dict(zip(feature, texts, strict=True)) == ids(prompt, "sat <end>", "on the mat <end>")
    rated = {"prompt": chat(user="the cat"), "completion": sides["rejected"], "reward": 2.0}
    wanted = point(feature["prompt_ids"], feature["rejected_ids"], reward=2.0)
    assert tokenise_points([rated], tokenizer, 64, 32) == [wanted]


@pytest.mark.parametrize("conversational", [False, True])
def test_ids_equal_trl(conversational):
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    datasets = pytest.importorskip("datasets")
    tokenizer = tiny_tokenizer(adds_bos=True)
    record = WORDS
    if conversational:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        record = {name: chat(**{role: WORDS[name]}) for name, role in roles.items()}
    trainer = object.__new__(trl.DPOTrainer)
    trainer._tokenizer = tokenizer
    (theirs,) = trainer._prepare_dataset(
        datasets.Dataset.from_list([record]), tokenizer, trl.DPOConfig(use_cpu=True), "train"
    )
    ours = of_pair(record, tokenizer=tokenizer)
    assert ours == {name: theirs[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}


def test_records_from_a_dataset():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([WORDS | SCORES, WORDS | SCORES | {"score_chosen": None}])
    features = tokenise_pairs(rows, Letters(), 64, 32)
    assert features == [of_pair(WORDS | SCORES), of_pair(WORDS)]


def test_a_template_that_rewrites_the_prompt_is_an_error():
    template = CHAT_TEMPLATE.replace("{{ bos_token }}", "{{ messages | length }}")
    record = {"prompt": chat(user="the cat"), "completion": chat(assistant="sat")}
    with pytest.raises(ValueError, match="prompt: .* not a proper prefix of the whole chat"):
        tokenise_points([record], tiny_tokenizer(template=template), 64, 32)


def test_lengths_and_tokenizers_of_no_use_are_refused():
    with pytest.raises(ValueError, match="max_prompt_length: got 64, wanted 1..63"):
        of_pair(FITS, 64, 64)
    without_eos = Letters()
    without_eos.eos_token_id = None
    with pytest.raises(ValueError, match="tokenizer: got eos_token_id None"):
        of_pair(FITS, tokenizer=without_eos)


def told(caplog):
    """Level and text of each message."""
    return [(each.levelname, each.getMessage()) for each in caplog.records]


def test_pairs_are_counted_dropped_and_told_in_one_warning(caplog):
    rows = [FITS] * 5 + [LONG_COMPLETION, LONG_PROMPT, EQUAL_WHEN_CUT, EQUAL_ANYWAY]
    with caplog.at_level(logging.INFO):
        features = tokenise_pairs([*rows, NOTHING_PREDICTED], Letters(), *LIMITS)
    # Prompt and completion of these have 6 tokens, the completion of the last two 3.
    assert features[5]["chosen_ids"] == [3, 4, 5, 6] and features[6]["prompt_ids"] == [4, 5, 6]
    assert len(features) == 7 and features[:5] == [features[0]] * 5
    said = (
        "pairs: read 10, kept 7; completions truncated 2, prompts truncated 1, sides equal 2,"
        " without a completion 1; raise max_length (6) or max_prompt_length (3)"
    )
    assert told(caplog) == [("WARNING", said)]


def test_completions_are_counted_dropped_and_told(caplog):
    texts = [("ab", "cd"), ("abcdef", "cdefgh"), ("", ""), ("a", "")]
    rows = [{"prompt": prompt, "completion": text} for prompt, text in texts]
    with caplog.at_level(logging.INFO):
        features = tokenise_points(rows, Letters(), *LIMITS)
    assert [feature["completion_ids"] for feature in features] == [[3, 4, 0], [3, 4, 5], [0]]
    said = (
        "completions: read 4, kept 3; completions truncated 1, prompts truncated 1, without a"
        " completion 1; raise max_length (6) or max_prompt_length (3)"
    )
    assert told(caplog) == [("WARNING", said)]


@pytest.mark.parametrize(
    ("rows", "level", "end"),
    [
        ([FITS] * 2, "INFO", "without a completion 0"),
        ([FITS, LONG_COMPLETION], "INFO", "; raise max_length (6)"),
        ([FITS, LONG_PROMPT], "INFO", "; raise max_prompt_length (3)"),
        (
            [FITS, LONG_COMPLETION, LONG_COMPLETION],
            "WARNING",
            "; raise max_length (6), which cuts 67% of the rows",
        ),
        ([FITS] * 9 + [EQUAL_ANYWAY], "WARNING", "sides equal 1, without a completion 0"),
    ],
)
def test_a_warning_is_for_dropped_rows_and_for_many_cut_ones(rows, level, end, caplog):
    with caplog.at_level(logging.INFO):
        tokenise_pairs(rows, Letters(), *LIMITS)
    ((found, message),) = told(caplog)
    assert found == level and message.endswith(end)


@pytest.mark.parametrize("tokenise", [tokenise_pairs, tokenise_points])
def test_an_error_says_why_no_row_is_left(tokenise):
    empty = NOTHING_PREDICTED | {"completion": ""}
    with pytest.raises(ValueError, match="records: no row .* kept 0; .* without a completion 2"):
        tokenise([empty] * 2, Letters(), *LIMITS)
    with pytest.raises(ValueError, match="records: got no rows, needs at least one"):
        tokenise([], Letters(), *LIMITS)
    with pytest.raises(ValueError, match="records: no row is left, .* read 2, .* sides equal 2"):
        tokenise_pairs([EQUAL_ANYWAY, EQUAL_WHEN_CUT], Letters(), *LIMITS)


def test_counts_are_returned_under_a_name_without_a_message(caplog):
    with caplog.at_level(logging.INFO):
        features, counts = counted_pairs([FITS, EQUAL_ANYWAY], Letters(), *LIMITS, "held-out pairs")
        rated, others = counted_points([{"prompt": "a", "completion": "b"}], Letters(), *LIMITS)
    assert (len(features), counts.read, counts.kept, counts.equal) == (1, 2, 1, 1)
    assert counts.message.startswith("held-out pairs: read 2, kept 1;")
    assert (len(rated), others.read, others.kept) == (1, 1, 1)
    assert not caplog.records
