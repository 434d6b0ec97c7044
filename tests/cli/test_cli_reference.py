"""`reference` and the features of a task: columns, cache, records for every loss."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from command_line_jobs import pairs, write_lines
from data_tokenizer import tiny_tokenizer
from tiny_models import eager_sums, tiny_llama

from fused_prefopt.command_line.errors import UserError
from fused_prefopt.command_line.records import (
    as_judged,
    as_pairs,
    as_points,
    held_out_records,
    texts_of,
    training_records,
)
from fused_prefopt.command_line.settings import Settings
from fused_prefopt.command_line.task import _check_fields, _features, load_loss
from fused_prefopt.data import completions, tokenise_pairs
from fused_prefopt.data.adapters import READERS
from fused_prefopt.losses import available_losses

pytest.importorskip("datasets")
pytest_plugins = ["command_line_fixtures"]
RATED = [
    {"prompt": "the cat", "completion": text, "reward": reward, "group": 3}
    for text, reward in (("sat on", 0.5), ("mat 1", 0.25), ("cat cat", 1.0))
]


def test_the_command_fills_the_cache_that_a_training_then_reads(job, material, tmp_path, capsys):
    cache, held_out = tmp_path / "cache", str(material / "held_out.jsonl")
    assert job("reference", cache_dir=str(cache), held_out=held_out) == 0
    *about_rows, train, judged, _ = capsys.readouterr().out.splitlines()
    assert (
        f"{material / 'pairs.jsonl'}: read as preference pairs (adapter preference)" in about_rows
    )
    features = tokenise_pairs(pairs(16), tiny_tokenizer(), 32, 16)
    chosen, rejected = (
        eager_sums(tiny_llama().double(), features, f"{side}_ids", "completion").mean().item()
        for side in ("chosen", "rejected")
    )
    assert train.startswith("train: 16 pairs, chosen of ") and judged.startswith("held out: 6 ")
    numbers = [float(word) for word in train.split() if word.startswith("-")]
    assert numbers == pytest.approx([chosen, rejected], abs=2e-4)
    files = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(files) == 2
    assert job("train", cache_dir=str(cache), held_out=held_out) == 0
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == files


def test_the_command_takes_another_model_and_single_completions(job, material, tmp_path, capsys):
    other = str(material / "other")
    assert job("reference", loss="dro", reference_model=other) == 0
    said = capsys.readouterr().out
    features = tokenise_pairs(pairs(16), tiny_tokenizer(), 32, 16)
    model = tiny_llama(7).double()
    sums = [
        eager_sums(model, features, f"{side}_ids", "completion") for side in ("chosen", "rejected")
    ]
    assert "train: 32 completions of " in said
    (number,) = [float(word) for word in said.split() if word.startswith("-")]
    assert number == pytest.approx(torch.cat(sums).mean().item(), abs=2e-4)
    assert len(list((tmp_path / "run" / "cache").glob("reference-*"))) == 1


@pytest.mark.parametrize("name", available_losses())
@pytest.mark.parametrize("records", [pairs(2, score_chosen=1.0, score_rejected=0.0), RATED])
def test_pairs_and_rated_completions_become_what_every_loss_needs(name, records):
    settings = Settings(model="unused", loss=name, max_length=32)
    loss_fn = load_loss(settings)
    features = _features(settings, loss_fn, tiny_tokenizer(), records)
    _check_fields(loss_fn, features)
    if loss_fn.loss.pairwise:
        assert features[0].keys() >= {"chosen_ids", "rejected_ids", "score_chosen"}
    elif "desirable" in loss_fn.loss.needs:
        assert [feature["desirable"] for feature in features[:2]] == [True, False]
    else:
        assert [feature["reward"] for feature in features[:2]] in ([1, 0], [0.5, 0.25])


def test_a_feature_that_is_missing_is_named_with_its_column():
    loss_fn = load_loss(Settings(model="unused", loss="odpo"))
    features = tokenise_pairs(pairs(1), tiny_tokenizer(), 32, 16)
    with pytest.raises(
        UserError, match="got no score_chosen and score_rejected, needs it for odpo"
    ):
        _check_fields(loss_fn, features)
    with pytest.raises(ValueError, match="no usable row"):
        _check_fields(loss_fn, [])


def test_a_field_that_no_column_gives_is_the_losss_affair():
    mine = SimpleNamespace(pairwise=True, needs=frozenset({"reference", "kl"}))
    with pytest.raises(UserError, match="loss: mine needs `kl`, a scalar estimate of KL"):
        _check_fields(SimpleNamespace(name="mine", loss=mine), [{"chosen_ids": [1]}])


def test_best_and_worst_of_rated_completions_are_a_pair():
    (pair,) = as_pairs(RATED)
    assert (pair["chosen"], pair["rejected"]) == ("cat cat", "mat 1")
    judged = as_judged(RATED)
    assert [(j["completion"], j["desirable"]) for j in judged] == [
        ("cat cat", True),
        ("mat 1", False),
    ]
    assert as_points(RATED) is RATED and as_pairs(pairs(2)) == pairs(2)
    assert [point["completion"] for point in as_points(pairs(1))] == [
        pairs(1)[0][side] for side in ("chosen", "rejected")
    ]


def test_rows_of_completions_keep_their_judgement_under_either_name():
    rows = [
        {"prompt": "a", "completion": "b", "label": True, "extra": 1},
        {"prompt": "a", "completion": "c", "desirable": False, "reward": 2.0, "group": 1},
    ]
    assert completions(rows) == [
        {"prompt": "a", "completion": "b", "desirable": True},
        {"prompt": "a", "completion": "c", "desirable": False, "reward": 2.0, "group": 1},
    ]
    assert as_judged(completions(rows)) == completions(rows)
    with pytest.raises(ValueError, match="'completion'"):
        completions([{"prompt": "a"}])
    assert {"preference", "completions", "ultrafeedback", "ultrafeedback_binarized"} <= set(READERS)


def test_files_are_read_to_the_limit_by_the_adapter_that_is_named(job, material, tmp_path):
    file = write_lines(tmp_path / "rated.jsonl", RATED)
    settings = Settings(model="unused", dataset=file, adapter="completions", limit=2)
    assert training_records(settings, 0, points=True) == RATED[:2]
    held_out = str(material / "held_out.jsonl")
    settings = Settings(model="unused", held_out=held_out, held_out_limit=3)
    assert held_out_records(settings, 0) == pairs(6, seed=1)[:3]
    assert held_out_records(Settings(model="unused"), 0) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"\nx', "cannot read .*: JSON parse error"),
        (
            '{"prompt": "a", "text": "b"}\n',
            "columns: got 'prompt', 'text', which no adapter reads; needs .*adapter: NAME",
        ),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "got no usable row in"),
        ("", "got no usable row in"),
    ],
)
def test_files_without_pairs_are_told_apart(job, tmp_path, content, message):
    file = tmp_path / "odd.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        training_records(Settings(model="unused", dataset=str(file)), 0, points=False)


def test_texts_are_every_string_and_message():
    chat = {"prompt": [{"role": "user", "content": "x"}], "completion": "y"}
    assert list(texts_of([*pairs(1), chat])) == [*pairs(1)[0].values(), "x", "y"]
