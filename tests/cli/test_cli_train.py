"""`train`: each kind of loss, reference and layout; what is written; resuming; bad jobs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import yaml
from bare_cli import ROOT
from command_line_jobs import log_of, pairs, write_lines

from fused_prefopt.cli import main
from fused_prefopt.command_line import train
from fused_prefopt.command_line.models import load_reference, load_start
from fused_prefopt.command_line.settings import Settings

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("datasets")
pytest_plugins = ["command_line_fixtures"]
LOG2 = math.log(2)


def weights(folder, name="model.safetensors"):
    return safetensors.load_file(folder / name)


@pytest.mark.slow
def test_the_example_trains_offline_and_leaves_everything(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "run"
    words = (
        f"--max-steps 4 limit=32 held_out_limit=8 output_dir={folder} logging_steps=1 eval_steps=2"
    )
    assert main(["train", str(ROOT / "examples" / "train.yaml"), *words.split()]) == 0
    said = capsys.readouterr().out
    assert "held-out pairs: 8" in said and "\ntrained " in said
    rows = log_of(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    # At the start the policy is its reference: every reward is 0, every target margin γ₀.
    first = {"rewards/chosen": 0, "rewards/margins": 0, "kl/chosen": 0, "margin/mean": 0.5}
    assert {name: rows[0][name] for name in first} == pytest.approx(first, abs=1e-4)
    assert rows[0]["loss"] == pytest.approx(math.log1p(math.exp(0.5)), abs=1e-4)
    judged = json.loads((folder / "evaluation.json").read_text())
    assert judged["pairs"] == 8 and judged["reference"]["kl"] == 0 < judged["trained"]["kl"]
    assert judged["trained"]["logps/chosen"] > judged["reference"]["logps/chosen"] + 0.1
    given = yaml.safe_load((folder / "config.yaml").read_text())
    assert given["max_steps"] == 4 and given["loss"] == "gamma-dpo"
    assert given["output_dir"] == str(folder)
    state = torch.load(folder / "preference_loss.pt", weights_only=True)
    assert any(values.numel() for values in state.values())
    assert {path.stem for path in (folder / "report").glob("*.png")} == {
        "loss", "accuracies", "rewards", "margins", "kl", "logps"
    }  # fmt: skip
    assert weights(folder)["lm_head.weight"].shape[0] <= 1024
    assert (folder / "tokenizer.json").is_file()


def test_the_three_references_give_the_loss_at_the_start_and_agree(job, tmp_path):
    pytest.importorskip("peft")
    rows = {}
    for reference in ("precomputed", "model", "adapter"):
        folder = tmp_path / reference
        peft = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
        assert job("train", f"output_dir={folder}", reference=reference, peft=peft) == 0
        rows[reference] = log_of(folder)
        assert rows[reference][0]["loss"] == pytest.approx(LOG2, abs=1e-4)
        assert rows[reference][1]["loss"] == pytest.approx(rows["precomputed"][1]["loss"], rel=1e-6)
        adapter = weights(folder, "adapter_model.safetensors")
        assert all("lora_" in name and 2 in value.shape for name, value in adapter.items())
    assert (tmp_path / "precomputed" / "cache").is_dir()
    assert not (tmp_path / "adapter" / "cache").exists()


def test_another_reference_model_counts_before_and_during_training(job, material, tmp_path):
    losses = []
    for reference in ("precomputed", "model"):
        folder = tmp_path / reference
        other = str(material / "other")
        job("train", f"output_dir={folder}", reference=reference, reference_model=other)
        losses.append([row["loss"] for row in log_of(folder)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[0][0] - LOG2) > 1e-4


@pytest.mark.parametrize(
    ("loss", "kwargs", "metric"),
    [("dro", {"beta": 0.1, "log_z0": 0.0}, "reward_model/mean"), ("kto", {"beta": 0.1}, "kl")],
)
def test_point_wise_losses_train_on_the_completions_of_pairs(job, tmp_path, loss, kwargs, metric):
    assert job("train", loss=loss, loss_kwargs=kwargs) == 0
    rows = log_of(tmp_path / "run")
    assert len(rows) == 2 and metric in rows[0]
    # The start is the reference: every reward is 0, KTO's KL too, and DRO is left with the scores.
    expected = 0.5 if loss == "kto" else rows[0]["reward_model/mean"]
    assert rows[0]["loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("layout", ["packed", "shared_prompt"])
def test_layouts_give_the_numbers_of_the_padded_one(job, tmp_path, layout):
    rows = []
    for name in ("padded", layout):
        job("train", f"output_dir={tmp_path / name}", layout=name, loss="simpo")
        rows.append(log_of(tmp_path / name))
    for padded, other in zip(*rows, strict=True):
        for metric in ("loss", "logps/chosen", "logps/rejected", "grad_norm"):
            assert other[metric] == pytest.approx(padded[metric], rel=1e-4), metric


def test_a_resumed_training_ends_where_an_unbroken_one_does(job, tmp_path, capsys):
    keys = {"loss": "gamma-simpo", "loss_kwargs": {"gamma": 0.5}, "save_strategy": "steps"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    job("train", f"output_dir={whole}", max_steps=4, save_steps=2, **keys)
    assert job("train", f"output_dir={broken}", "--resume", save_steps=2, **keys) == 0
    assert "no checkpoint, from the start" in capsys.readouterr().out
    assert job("train", f"output_dir={broken}", save_steps=2, **keys) == 2
    assert "has checkpoints of an earlier run, needs --resume" in capsys.readouterr().err
    # What a run leaves that is killed while it writes a checkpoint.
    (broken / "checkpoint-3").mkdir()
    (broken / "checkpoint-3" / "model.safetensors").write_bytes(b"half")
    assert job("train", f"output_dir={broken}", "--resume", max_steps=4, save_steps=2, **keys) == 0
    assert f"from {broken / 'checkpoint-2'}" in capsys.readouterr().out
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(broken)[name]), name
    losses = [
        torch.load(each / "preference_loss.pt", weights_only=True) for each in (whole, broken)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0, equal_nan=True)
    assert losses[0]["statistics.margins"].isfinite().sum() == 16
    assert [row["loss"] for row in log_of(whole)] == [row["loss"] for row in log_of(broken)]


def test_the_configuration_is_there_before_anything_is_computed(job, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_add_reference_columns", interrupted)
    assert job("train", "max_steps=3", loss="gamma-dpo") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "fused-prefopt: interrupted"
    given = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert given["max_steps"] == 3 and given["loss"] == "gamma-dpo"
    assert given["output_dir"] == str(tmp_path / "run")


def test_in_bf16_the_start_is_its_reference_wherever_that_comes_from(job, tmp_path):
    # As many rows in a batch of either pass: rounding then meets the same shapes.
    keys = {"per_device_train_batch_size": 16, "reference_batch_size": 16, "max_steps": 1}
    keys |= {"bf16": True, "loss_kwargs": {"beta": 1.0}}
    for reference in ("model", "precomputed"):
        folder = tmp_path / reference
        assert job("train", f"output_dir={folder}", reference=reference, **keys) == 0
        (row,) = log_of(folder)
        for metric in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert row[metric] == pytest.approx(0, abs=1e-6), (reference, metric)
        assert row["loss"] == pytest.approx(LOG2, abs=1e-6)


def test_an_untrained_model_gets_a_tokenizer_of_the_data_and_the_seed_decides(tmp_path):
    from fused_prefopt.command_line.models import load_tokenizer

    config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "vocab_size": 300}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    settings = Settings(model_config=config, max_length=16)
    tokenizer = load_tokenizer(settings, pairs(40))
    assert 258 <= len(tokenizer) <= 300
    first, again, other = (load_start(settings, tokenizer, seed) for seed in (0, 0, 1))
    own = load_reference(settings, tokenizer, 0)
    assert first.config.eos_token_id == tokenizer.eos_token_id
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert torch.equal(first.lm_head.weight, own.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"loss": "dpoo"}, "loss: unknown loss 'dpoo' (did you mean 'dpo'"),
        ({"loss_kwargs": {"bta": 1}}, "loss: dpo has no hyperparameter 'bta' (did you mean 'beta'"),
        ({"loss_kwargs": {"beta": -1.0}}, "loss: beta: got -1.0, wanted a finite number > 0"),
        ({"loss": "odpo"}, "dataset: got no score_chosen and score_rejected, needs it for odpo"),
        ({"dataset": "no/such/place"}, "dataset: "),
        ({"held_out": "test"}, "held_out: "),
        ({"adapter": "prefernce"}, "dataset: adapter: got 'prefernce'"),
        ({"model": "no/such/model/here"}, "model: "),
        ({"peft": {"rank": 4}}, "peft: unknown key 'rank'"),
        ({"peft": {"target_modules": ["nothing"]}}, "peft: "),
        ({"loss": "kto", "layout": "shared_prompt"}, "layout: got shared_prompt, and kto judges"),
        ({"max_prompt_length": 32}, "dataset: max_prompt_length: got 32, wanted 1..31"),
        ({"max_stepz": 3}, "unknown key 'max_stepz' (did you mean 'max_steps'"),
        ({"peft": {"r": "x"}}, "peft: r: got 'x', wanted an integer >= 1"),
        ({"loss_kwargs": {"beta": "big"}}, "loss: beta: got 'big', wanted a finite number > 0"),
        ({"loss": "gamma-dpo", "loss_kwargs": {"queue": "no"}}, "loss: queue: got 'no', wanted Tr"),
        ({"loss_kwargs": {"path": "x"}}, "loss: path: got 'x', wanted one of 'auto', 'evaluate'"),
        ({"loss_kwargs": {"drop_mass": 7}}, "loss: drop_mass: got 7, wanted a finite number"),
        ({"loss_kwargs": {"engine": "torch"}}, "loss_kwargs: got engine, needs it as a key of its"),
        ({"held_out": "/no/such/file.jsonl"}, "held_out: "),
        ({"tokenizer": "no/such/one"}, "tokenizer: got 'no/such/one', whose tokenizer cannot be"),
        ({"reference_model": "no/such/one"}, "reference_model: got 'no/such/one', which cannot be"),
        ({"attn_implementation": "nope"}, "attn_implementation: got 'nope': "),
        ({"optim": "adamw_bnb_8bit"}, "optim: "),
        ({"eval_strategy": "steps"}, "fused-prefopt: You have set `args.eval_strategy` to"),
    ],
)
def test_a_job_that_cannot_run_says_why_in_two_lines_at_most(job, capsys, keys, message):
    assert job("train", **keys) == 2
    problem = capsys.readouterr().err
    assert message in problem.splitlines()[-1]
    assert "Traceback" not in problem


def test_scores_of_the_data_reach_the_loss(job, tmp_path):
    scored = write_lines(tmp_path / "scored.jsonl", pairs(8, score_chosen=3.0, score_rejected=1.0))
    kwargs = {"alpha": 1.0}
    assert job("train", loss="odpo", loss_kwargs=kwargs, dataset=scored) == 0
    # At the start only the offset α log(3 − 1) is left of the loss.
    assert log_of(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(3), abs=1e-4)


def test_a_loss_of_whole_distributions_wants_the_reference_beside_it(job, tmp_path, capsys):
    assert job("train", loss="tdpo1") == 2
    assert "reference: got precomputed, needs model or adapter: tdpo1" in capsys.readouterr().err
    assert job("train", loss_kwargs={"ld_alpha": 0.5}) == 2
    assert "reference: got precomputed, needs model or adapter: dpo" in capsys.readouterr().err
    assert job("train", loss="tdpo1", reference="model", log_tokens=True) == 0
    rows = log_of(tmp_path / "run")
    assert rows[0]["loss"] == pytest.approx(LOG2, abs=1e-4) and rows[1]["loss"] < LOG2
    # 61 tokens that an untrained model finds about equally likely.
    assert rows[0]["entropy"] == pytest.approx(math.log(61), abs=0.05)


@pytest.mark.slow
def test_two_processes_train_as_one_with_their_batches_together(job, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    keys = {"loss": "gamma-dpo", "save_strategy": "no"}
    assert job("train", f"output_dir={one}", per_device_train_batch_size=8, **keys) == 0
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2 -m fused_prefopt train"
    words = [f"output_dir={two}", "per_device_train_batch_size=4", "ddp_backend=gloo"]
    done = subprocess.run(
        [sys.executable, *launch.split(), str(tmp_path / "job.yaml"), *words],
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        | {"HF_DATASETS_CACHE": str(tmp_path / "datasets")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("model, log and evaluation are in") == 1
    for alone, shared in zip(log_of(one), log_of(two), strict=True):
        for metric in ("loss", "kl/chosen", "rewards/margins", "margin/mean"):
            assert shared[metric] == pytest.approx(alone[metric], rel=1e-4, abs=1e-6), metric
