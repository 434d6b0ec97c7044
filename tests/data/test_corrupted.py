"""Corruptions: exact texts, graded severities; pairs and points of documents that are made so."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from fused_prefopt.data import (
    Document,
    load_documents,
    make_pairs,
    make_points,
    paragraphs,
    split_documents,
)
from fused_prefopt.data.corrupted import corrupt

TEXT = " one two three four five six seven eight nine ten"
FOREIGN = " alpha beta gamma delta epsilon zeta eta theta iota kappa lambda"


def spoil(kind, strength, text=TEXT, seed=0):
    return corrupt(kind, text, strength, random.Random(seed), FOREIGN)


@pytest.mark.parametrize(
    ("kind", "strength", "text", "severity"),
    [
        ("foreign", 0.3, " one two three four five six seven alpha beta gamma", 0.3),
        ("foreign", 1.0, FOREIGN.removesuffix(" lambda"), 1.0),
        ("repeat", 0.5, " one two three four five three four five three four", 0.5),
        ("repeat", 1.0, " one two three one two three one two three one", 0.7),
        # Cut off in the middle of a word.
        ("truncate", 0.5, " one two three four fiv", 0.5 * (1 - 23 / 49)),
        ("truncate", 1.0, " o", 0.5 * (1 - 2 / 49)),
        ("shuffle", 0.5, "no no no", 0.0),
        ("repeat", 0.5, "word", 0.0),
        ("truncate", 0.5, "a b c", 0.0),
    ],
)
def test_a_text_is_spoilt_as_far_as_it_is_said(kind, strength, text, severity):
    result = spoil(kind, strength, TEXT if severity else text)
    assert result.text == text and result.severity == pytest.approx(severity)


@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
def test_shuffle_moves_exactly_the_fraction_it_says(strength):
    for seed in range(20):
        result = spoil("shuffle", strength, seed=seed)
        before, after = TEXT.split(), result.text.split()
        moved = sum(a != b for a, b in zip(before, after, strict=True))
        assert Counter(before) == Counter(after)
        assert moved == 10 * strength
        assert result.severity == pytest.approx(0.8 * strength)


@pytest.fixture(scope="module")
def held_out():
    return split_documents(load_documents())[1]


@pytest.fixture(scope="module")
def pairs(held_out):
    return make_pairs(held_out)


def whole(record):
    """The paragraph that a pair is of."""
    return record["prompt"] + record["chosen"]


def texts_of(documents):
    return {text for document in documents for text in paragraphs(document)}


def test_prompt_and_chosen_are_the_paragraph(held_out, pairs):
    texts = texts_of(held_out)
    assert len(pairs) == len(texts) and set(map(whole, pairs)) == texts
    for record in pairs:
        assert 0.25 < len(record["prompt"].split()) / len(whole(record).split()) < 0.55
        assert record["chosen"].startswith(" ") and record["rejected"].startswith(" ")


def test_every_pair_is_worse_by_a_graded_amount(pairs):
    assert list(pairs[0]) == [
        *("prompt", "chosen", "rejected", "score_chosen", "score_rejected"),
        *("corruption", "flipped"),
    ]
    kinds = Counter(record["corruption"] for record in pairs)
    assert set(kinds) == {"foreign", "shuffle", "repeat", "truncate"}
    assert min(kinds.values()) > len(pairs) / 8
    for record in pairs:
        assert record["rejected"] != record["chosen"]
        assert record["score_chosen"] == 1.0 > record["score_rejected"] >= 0.0
        assert record["flipped"] is False
    assert len({round(record["score_rejected"], 2) for record in pairs}) > 50


def test_foreign_text_comes_from_another_document(held_out):
    owner = {text: document.name for document in held_out for text in paragraphs(document)}
    records = make_pairs(held_out, kinds=["foreign"])
    for record in records[:50]:
        words, spoilt = record["chosen"].split(), record["rejected"].split()
        kept = len(words) - round((1 - record["score_rejected"]) * len(words))
        assert spoilt[:kept] == words[:kept]
        borrowed = " " + " ".join(spoilt[kept:])
        sources = {
            owner[whole(other)]
            for other in records
            if (other["chosen"] + " ").startswith(borrowed + " ")
        }
        assert sources - {owner[whole(record)]}


@pytest.mark.parametrize("rate", [0.0, 0.2, 1.0])
def test_flip_rate_exchanges_exactly_that_many_texts(held_out, pairs, rate):
    noisy = make_pairs(held_out, flip_rate=rate)
    assert sum(record["flipped"] for record in noisy) == round(rate * len(pairs))
    for clean, record in zip(pairs, noisy, strict=True):
        if record["flipped"]:
            swapped = {"chosen": clean["rejected"], "rejected": clean["chosen"], "flipped": True}
            clean = clean | swapped
        assert record == clean


def test_limit_kinds_per_prompt_and_seed(held_out, pairs):
    assert make_pairs(held_out, limit=7) == pairs[:7]
    assert {r["corruption"] for r in make_pairs(held_out, kinds=["repeat"])} == {"repeat"}
    several = make_pairs(held_out, per_prompt=4)
    assert set(Counter(map(whole, several)).values()) <= {3, 4} and len(several) > 3.9 * len(pairs)
    other = make_pairs(held_out, seed=1)
    assert other != pairs and set(map(whole, other)) == set(map(whole, pairs))


def test_points_are_grouped_and_rated(held_out):
    points = make_points(held_out, completions=5, limit=20)
    groups = [record["group"] for record in points]
    assert groups == sorted(groups) and set(groups) == set(range(20))
    texts = texts_of(held_out)
    for group in range(20):
        rated = [record for record in points if record["group"] == group]
        assert len({record["prompt"] for record in rated}) == 1
        assert len({record["completion"] for record in rated}) == len(rated) in (4, 5)
        assert rated[0]["prompt"] + rated[0]["completion"] in texts
        assert rated[0]["reward"] == 1.0
        assert all(0.0 <= record["reward"] < 1.0 for record in rated[1:])
    assert list(points[0]) == ["prompt", "completion", "reward", "group"]


def test_points_and_pairs_agree_on_rewards(held_out, pairs):
    rewards = {
        (r["prompt"], r["completion"]): r["reward"] for r in make_points(held_out, completions=5)
    }
    for record in pairs:
        for side in ("chosen", "rejected"):
            assert rewards[record["prompt"], record[side]] == record[f"score_{side}"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda _: spoil("x", 0.5), "kind: got 'x', wanted one of 'foreign'"),
        (lambda _: spoil("shuffle", 0), "strength: got 0, wanted"),
        (lambda _: spoil("shuffle", 0.5, " "), "text: got ' ', wanted at least one word"),
        (lambda texts: make_pairs(texts, flip_rate=1.5), "flip_rate: got 1.5, wanted a fraction"),
        (lambda texts: make_pairs(texts[:1]), "documents: got 1 with a paragraph, wanted at least"),
        (lambda texts: make_points(texts, completions=0), "completions: got 0, wanted at least 1"),
    ],
)
def test_errors_name_the_argument(held_out, make, said):
    with pytest.raises(ValueError, match=said):
        make(held_out)


CHILD = """
import json, sys
from test_corrupted import digest
print(digest(json.load(sys.stdin)))
"""


def digest(documents):
    """Hash of the records that are made of them."""
    train, held_out = split_documents((Document(**each) for each in documents), held_out=0.5)
    records = [make_pairs(train, flip_rate=0.2), make_pairs(held_out), make_points(held_out)]
    return hashlib.sha256(json.dumps(records).encode()).hexdigest()


@pytest.mark.slow
def test_records_do_not_depend_on_the_process():
    documents = [asdict(document) for document in load_documents()[::4]]
    here = Path(__file__).resolve()
    # This process has another seed of its hashes, so another order of every set.
    path = [str(here.parents[2]), str(here.parent), os.environ.get("PYTHONPATH", "")]
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(documents),
        env=os.environ | {"PYTHONHASHSEED": "4242", "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert child.stdout.strip() == digest(documents)
