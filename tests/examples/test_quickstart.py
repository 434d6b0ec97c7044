"""The main job end to end, on a few steps; `make train` runs it in full."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import quickstart
from data_tokenizer import tiny_tokenizer
from tiny_models import tiny_llama

METHODS = ["alpha-dpo", "gamma-simpo", "dro"]
FEW = "--pretraining-steps 3 --steps 3 --limit 48 --held-out-limit 12 --batch-size 4"


def run(folder: Path, words: str) -> dict:
    quickstart.main(["--output", str(folder), *words.split()])
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.slow
def test_the_embedded_task_leaves_models_metrics_and_pictures_and_repeats(tmp_path, capsys):
    first = run(tmp_path / "a", FEW)
    said = capsys.readouterr().out
    assert "reference" in said and "accuracy" in said
    assert list(first["held_out"]) == ["reference", *METHODS]
    assert first["held_out"]["reference"]["kl"] == pytest.approx(0, abs=1e-6)
    for method in METHODS:
        assert (tmp_path / "a" / method / "model.safetensors").is_file()
        assert len([row for row in first["history"][method] if "loss" in row]) == 3
        assert first["held_out"][method]["kl"] > 0
    for picture in ("margins", "rewards", "target_margins"):
        assert (tmp_path / "a" / f"{picture}.png").stat().st_size > 5000
    assert "rewards/accuracies" in first["history"]["alpha-dpo"][0]
    assert len(list((tmp_path / "a" / "cache").iterdir())) == 3
    # A method learns the same whatever was trained before it.
    again = run(tmp_path / "b", f"{FEW} --methods gamma-simpo dro")
    for name in ("reference", *METHODS[1:]):
        assert again["held_out"][name] == first["held_out"][name]
    for name in METHODS[1:]:
        losses = [
            [row["loss"] for row in each["history"][name] if "loss" in row]
            for each in (first, again)
        ]
        assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_model_and_a_dataset_from_folders(tmp_path):
    model, data = tmp_path / "model", tmp_path / "data"
    tiny_llama(bos_token_id=1, eos_token_id=2).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    data.mkdir()
    rows = [
        {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " mat the on"},
        {"prompt": "the mat", "chosen": " sat", "rejected": " cat cat"},
    ]
    for split in ("train", "test"):
        lines = [json.dumps(row) for row in rows * 4]
        (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    few = "--steps 2 --batch-size 2 --max-length 32 --limit 8 --held-out-limit 8"
    found = run(tmp_path / "out", f"--model {model} --dataset {data} {few}")
    assert list(found["held_out"]) == ["reference", *METHODS]


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        quickstart.main(["--help"])
    text = capsys.readouterr().out
    for option in ("--model", "--dataset", "--seed", "--methods", "--flip-rate", "--accumulation"):
        assert option in text
