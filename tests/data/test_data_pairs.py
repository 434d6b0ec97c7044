"""Pairs and points made from documents."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fused_prefopt.data import docstrings
from fused_prefopt.data.docstrings import load_documents, paragraphs, split_documents
from fused_prefopt.data.pairs import make_pairs
from fused_prefopt.data.points import make_points


@pytest.fixture(scope="module")
def held_out():
    return split_documents(load_documents())[1]


@pytest.fixture(scope="module")
def pairs(held_out):
    return make_pairs(held_out)


def texts_of(documents):
    return {text for document in documents for text in paragraphs(document)}


def test_prompt_and_chosen_are_the_paragraph(held_out, pairs):
    texts = texts_of(held_out)
    assert len(pairs) == len(texts)
    assert {record["prompt"] + record["chosen"] for record in pairs} == texts
    for record in pairs:
        share = len(record["prompt"].split()) / len((record["prompt"] + record["chosen"]).split())
        assert 0.25 < share < 0.55
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
            owner[other["prompt"] + other["chosen"]]
            for other in records
            if (other["chosen"] + " ").startswith(borrowed + " ")
        }
        assert sources - {owner[record["prompt"] + record["chosen"]]}


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
    by_prompt = Counter(record["prompt"] + record["chosen"] for record in several)
    assert set(by_prompt.values()) <= {3, 4} and len(several) > 3.9 * len(pairs)
    other = make_pairs(held_out, seed=1)
    assert other != pairs
    assert {r["prompt"] + r["chosen"] for r in other} == {r["prompt"] + r["chosen"] for r in pairs}


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
        assert rewards[record["prompt"], record["rejected"]] == record["score_rejected"]
        assert rewards[record["prompt"], record["chosen"]] == record["score_chosen"]


def test_errors_name_the_argument(held_out):
    with pytest.raises(ValueError, match="flip_rate: got 1.5, wanted a fraction"):
        make_pairs(held_out, flip_rate=1.5)
    with pytest.raises(ValueError, match="documents: got 1 with a paragraph, wanted at least 2"):
        make_pairs(held_out[:1])
    with pytest.raises(ValueError, match="completions: got 0, wanted at least 1"):
        make_points(held_out, completions=0)


DIGEST = """
import hashlib, json
from fused_prefopt.data.docstrings import load_documents, split_documents
from fused_prefopt.data.pairs import make_pairs
from fused_prefopt.data.points import make_points
held_out = split_documents(load_documents())[1]
records = [make_pairs(held_out, flip_rate=0.2), make_points(held_out)]
print(hashlib.sha256(json.dumps(records).encode()).hexdigest())
"""


@pytest.mark.slow
def test_records_do_not_depend_on_the_process(held_out):
    records = [make_pairs(held_out, flip_rate=0.2), make_points(held_out)]
    digest = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    root = str(Path(docstrings.__file__).parents[2])
    for hash_seed in ("1", "4242"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": root}
        result = subprocess.run(
            [sys.executable, "-c", DIGEST],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.strip() == digest
