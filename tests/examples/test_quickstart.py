"""The main job end to end, on a few steps; `make train` runs it in full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_tokenizer import tiny_tokenizer
from tiny_models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
METHODS = ["alpha-dpo", "gamma-simpo", "dro"]

pytestmark = pytest.mark.slow


def quickstart(*arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def results(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_the_embedded_task_leaves_models_metrics_and_pictures_and_repeats(tmp_path):
    few = "--pretraining-steps 3 --steps 3 --limit 48 --held-out-limit 12 --batch-size 4".split()
    outputs = [quickstart("--output", str(tmp_path / name), *few) for name in "ab"]
    assert "reference" in outputs[0] and "accuracy" in outputs[0]
    first, second = (results(tmp_path / name) for name in "ab")
    assert first["held_out"] == second["held_out"]
    assert set(first["held_out"]) == {"reference", *METHODS}
    for method in METHODS:
        assert (tmp_path / "a" / method / "model.safetensors").is_file()
        losses = [row["loss"] for row in first["history"][method] if "loss" in row]
        assert losses == [row["loss"] for row in second["history"][method] if "loss" in row]
        assert len(losses) == 3
        assert first["held_out"][method]["kl"] > 0
    assert first["held_out"]["reference"]["kl"] == pytest.approx(0, abs=1e-6)
    for picture in ("margins", "rewards", "target_margins"):
        assert (tmp_path / "a" / f"{picture}.png").stat().st_size > 5000
    assert "rewards/accuracies" in first["history"]["alpha-dpo"][0]
    assert len(list((tmp_path / "a" / "cache").iterdir())) == 3


def test_a_model_and_a_dataset_from_folders(tmp_path):
    model = tmp_path / "model"
    tiny_llama(bos_token_id=1, eos_token_id=2).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    data = tmp_path / "data"
    data.mkdir()
    rows = [
        {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " mat the on"},
        {"prompt": "the mat", "chosen": " sat", "rejected": " cat cat"},
    ]
    for split in ("train", "test"):
        lines = [json.dumps(row) for row in rows * 4]
        (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    output = tmp_path / "out"
    few = "--steps 2 --batch-size 2 --max-length 32 --limit 8 --held-out-limit 8".split()
    quickstart("--model", str(model), "--dataset", str(data), "--output", str(output), *few)
    assert set(results(output)["held_out"]) == {"reference", *METHODS}


def test_help_names_every_option():
    text = quickstart("--help")
    for option in ("--model", "--dataset", "--seed", "--methods", "--flip-rate", "--accumulation"):
        assert option in text
