"""Corruptions: exact texts, and severities that grow with what was spoilt."""

import random
import statistics
from collections import Counter

import pytest

from fused_prefopt.data.corruptions import CORRUPTIONS, corrupt

TEXT = " one two three four five six seven eight nine ten"
FOREIGN = " alpha beta gamma delta epsilon zeta eta theta iota kappa lambda"


def spoil(kind, strength, text=TEXT, seed=0):
    return corrupt(kind, text, strength, random.Random(seed), FOREIGN)


def test_foreign_replaces_the_end():
    result = spoil("foreign", 0.3)
    assert result.text == " one two three four five six seven alpha beta gamma"
    assert result.severity == pytest.approx(0.3)
    assert spoil("foreign", 1.0).text == FOREIGN.removesuffix(" lambda")
    assert spoil("foreign", 1.0).severity == 1.0


def test_repeat_repeats_the_last_three_words_kept():
    result = spoil("repeat", 0.5)
    assert result.text == " one two three four five three four five three four"
    assert result.severity == pytest.approx(0.5)
    assert spoil("repeat", 1.0).severity == pytest.approx(0.7)


def test_truncate_stops_inside_a_word():
    result = spoil("truncate", 0.5)
    assert TEXT.startswith(result.text)
    assert TEXT[len(result.text) - 1].isalnum() and TEXT[len(result.text)].isalnum()
    assert result.text == " one two three four fiv"
    assert result.severity == pytest.approx(0.5 * (1 - len(result.text) / len(TEXT)))
    assert spoil("truncate", 1.0).text == " o"


@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
def test_shuffle_moves_exactly_the_fraction_it_says(strength):
    for seed in range(20):
        result = spoil("shuffle", strength, seed=seed)
        before, after = TEXT.split(), result.text.split()
        moved = sum(a != b for a, b in zip(before, after, strict=True))
        assert Counter(before) == Counter(after)
        assert moved == 10 * strength
        assert result.severity == pytest.approx(0.8 * strength)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_severity_is_graded(kind):
    severities = [spoil(kind, strength).severity for strength in (0.2, 0.4, 0.6, 0.8)]
    assert severities == sorted(severities) and len(set(severities)) == 4
    assert all(0 < severity <= 1 for severity in severities)
    assert spoil(kind, 0.4).text.startswith(" ")


def test_truncation_is_the_mildest_kind():
    means = {
        kind: statistics.mean(spoil(kind, s / 10).severity for s in range(1, 11))
        for kind in CORRUPTIONS
    }
    assert min(means, key=means.get) == "truncate"
    assert max(means, key=means.get) == "foreign"


@pytest.mark.parametrize(
    ("kind", "text"),
    [("shuffle", "no no no"), ("repeat", "word"), ("truncate", "a b c")],
)
def test_severity_is_zero_when_nothing_can_change(kind, text):
    result = spoil(kind, 0.5, text)
    assert (result.text, result.severity) == (text, 0.0)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="kind: got 'x', wanted one of 'foreign'"):
        spoil("x", 0.5)
    with pytest.raises(ValueError, match="strength: got 0, wanted"):
        spoil("shuffle", 0)
    with pytest.raises(ValueError, match="text: got ' ', wanted at least one word"):
        spoil("shuffle", 0.5, " ")
