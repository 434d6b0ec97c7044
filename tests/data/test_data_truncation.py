"""Truncation: what it cuts is counted, what it leaves nothing to learn of is dropped and told."""

from __future__ import annotations

import logging

import pytest

from fused_prefopt.data import pairs_of_points, tokenise_pairs, tokenise_points
from fused_prefopt.data.tokenise import counted_pairs, counted_points

LIMITS = (6, 3)
FITS = {"prompt": "ab", "chosen": "cd", "rejected": "e"}
LONG_COMPLETION = FITS | {"chosen": "cdefgh"}
LONG_PROMPT = FITS | {"prompt": "abcdef", "rejected": ""}
EQUAL_WHEN_CUT = FITS | {"chosen": "cdefgh", "rejected": "cdefxy"}
EQUAL_ANYWAY = FITS | {"rejected": "cd"}
NOTHING_PREDICTED = FITS | {"prompt": "", "rejected": ""}


class Letters:
    """One id a letter."""

    eos_token_id = 0

    def encode(self, text, add_special_tokens):
        return [ord(letter) - 96 for letter in text if letter.isalpha()]


def told(caplog):
    """Level and text of each message of the data package."""
    return [(each.levelname, each.getMessage()) for each in caplog.records]


def test_pairs_are_counted_dropped_and_told_in_one_warning(caplog):
    rows = [FITS] * 5 + [LONG_COMPLETION, LONG_PROMPT, EQUAL_WHEN_CUT, EQUAL_ANYWAY]
    with caplog.at_level(logging.INFO):
        features = tokenise_pairs([*rows, NOTHING_PREDICTED], Letters(), *LIMITS)
    # Prompt and completion of these have 6 tokens, the completion of the last two 3.
    assert features[5]["chosen_ids"] == [3, 4, 5, 6] and features[6]["prompt_ids"] == [4, 5, 6]
    assert len(features) == 7 and features[:5] == [features[0]] * 5
    assert told(caplog) == [
        (
            "WARNING",
            "pairs: read 10, kept 7; completions truncated 2, prompts truncated 1, sides equal 2,"
            " without a completion 1; raise max_length (6) or max_prompt_length (3)",
        )
    ]


def test_completions_are_counted_dropped_and_told(caplog):
    texts = [("ab", "cd"), ("abcdef", "cdefgh"), ("", ""), ("a", "")]
    rows = [{"prompt": prompt, "completion": text} for prompt, text in texts]
    with caplog.at_level(logging.INFO):
        features = tokenise_points(rows, Letters(), *LIMITS)
    assert [feature["completion_ids"] for feature in features] == [[3, 4, 0], [3, 4, 5], [0]]
    assert told(caplog) == [
        (
            "WARNING",
            "completions: read 4, kept 3; completions truncated 1, prompts truncated 1, without a"
            " completion 1; raise max_length (6) or max_prompt_length (3)",
        )
    ]


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


@pytest.mark.parametrize("rows", [[EQUAL_ANYWAY, EQUAL_WHEN_CUT], [NOTHING_PREDICTED]])
def test_an_error_says_why_no_pair_is_left(rows):
    with pytest.raises(ValueError, match=rf"records: no row is left, .* read {len(rows)}, kept 0"):
        tokenise_pairs(rows, Letters(), *LIMITS)
    with pytest.raises(ValueError, match="without a completion 1"):
        tokenise_points([{"prompt": "", "completion": ""}], Letters(), *LIMITS)


@pytest.mark.parametrize("tokenise", [tokenise_pairs, tokenise_points])
def test_no_records_are_an_error(tokenise):
    with pytest.raises(ValueError, match="records: got no rows, needs at least one"):
        tokenise([], Letters(), *LIMITS)


def test_counts_are_returned_under_a_name_without_a_message(caplog):
    with caplog.at_level(logging.INFO):
        features, counts = counted_pairs([FITS, EQUAL_ANYWAY], Letters(), *LIMITS, "held-out pairs")
        rated, others = counted_points([{"prompt": "a", "completion": "b"}], Letters(), *LIMITS)
    assert (len(features), counts.read, counts.kept, counts.equal) == (1, 2, 1, 1)
    assert counts.message.startswith("held-out pairs: read 2, kept 1;")
    assert (len(rated), others.read, others.kept) == (1, 1, 1)
    assert not caplog.records


def test_prompts_whose_completions_make_no_pair_are_told(caplog):
    rows = [
        {"prompt": "a", "completion": text, "reward": reward, "group": group}
        for text, reward, group in (("b", 1, 0), ("c", 2, 0), ("d", 1, 1), ("e", 1, 1), ("f", 1, 2))
    ]
    with caplog.at_level(logging.INFO):
        assert len(pairs_of_points(rows)) == 1
    assert told(caplog) == [
        ("WARNING", "pairs_of_points: dropped 2 of 3 prompts, whose rewards do not differ")
    ]
