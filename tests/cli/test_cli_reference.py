"""`reference`: log-probs of the data, their means, the cache that a training reads."""

from __future__ import annotations

import pytest
import torch
from command_line_jobs import pairs
from data_tokenizer import tiny_tokenizer
from tiny_models import eager_sums, tiny_llama

from fused_prefopt.data import tokenise_pairs

pytest.importorskip("datasets")


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
