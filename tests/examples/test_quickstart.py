"""The main job end to end, on a few steps; `make train` runs it in full."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import quickstart
import torch
from data_tokenizer import tiny_tokenizer
from scipy import stats
from tiny_models import tiny_llama

import fused_prefopt as fp
from fused_prefopt.evaluation import PairScores

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


def test_target_margins_are_a_line_over_one_gap_and_a_curve_over_the_other():
    torch.manual_seed(0)
    lengths = torch.randint(5, 30, (80,))
    policy, reference = (-3 * lengths * torch.rand(80, dtype=torch.float64) for _ in range(2))
    batch = fp.LogpBatch(policy=policy, lengths=lengths, reference=reference)
    names = {method.loss: method.hyperparameters for method in quickstart.METHODS}
    losses = {name: fp.PreferenceLoss(name, **names[name]) for name in METHODS}
    losses["alpha-dpo"].from_logps(batch)
    scores = dict.fromkeys(METHODS, PairScores(batch, kl=0.0, kl_rejected=0.0))
    targets, gaps = quickstart.target_margins_of(losses, scores)
    assert list(targets) == ["alpha-dpo", "gamma-simpo"]
    rewards, distances = (gap["alpha-dpo"].numpy() for gap in gaps.values())
    per_token, ratios = ((v / lengths).numpy() for v in (policy, policy - reference))
    assert rewards == pytest.approx(5.0 * (per_token[:40] - per_token[40:]))
    assert distances == pytest.approx(ratios[:40] - ratios[40:])
    line = stats.linregress(distances, targets["alpha-dpo"])
    # α β / σ, and γ at the mean: what α-DPO's eq. 11 says.
    assert line.rvalue == pytest.approx(1)
    assert line.slope == pytest.approx(0.2 * 5.0 / distances.std(ddof=1), rel=0.02)
    curve = targets["gamma-simpo"].numpy()
    assert stats.spearmanr(rewards, curve).statistic == pytest.approx(1)
    assert abs(stats.spearmanr(distances, curve).statistic) < 0.9
    assert abs(stats.linregress(rewards, targets["alpha-dpo"]).rvalue) < 0.9
