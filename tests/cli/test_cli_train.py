"""`train`: each kind of loss, reference and layout; what is written; resuming; bad jobs."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from command_line_jobs import ROOT, environment, log_of, pairs, python, write_job, write_lines
from transformers import PrinterCallback, ProgressCallback

from fused_prefopt.cli import train
from fused_prefopt.cli.config import Settings
from fused_prefopt.cli.main import main
from fused_prefopt.cli.models import load_reference, load_start, load_tokenizer

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("datasets")
LOG2 = math.log(2)
STEP = {"loss": 0.693147, "rewards/accuracies": 0.5, "rewards/margins": -0.01234, "grad_norm": 3.0}
STEP |= {"learning_rate": 5e-5, "epoch": 0.1, "nonfinite": 0.0}


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


def test_the_three_references_give_the_loss_at_the_start_and_agree(logged, tmp_path):
    pytest.importorskip("peft")
    peft, second = {"r": 2, "target_modules": ["q_proj", "v_proj"]}, set()
    for reference in ("precomputed", "model", "adapter"):
        rows = logged(reference, reference=reference, peft=peft)
        assert rows[0]["loss"] == pytest.approx(LOG2, abs=1e-4)
        second.add(rows[1]["loss"])
        assert max(second) == pytest.approx(min(second), rel=1e-6)
        adapter = weights(tmp_path / reference, "adapter_model.safetensors")
        assert all("lora_" in name and 2 in value.shape for name, value in adapter.items())
    assert (tmp_path / "precomputed" / "cache").is_dir()
    assert not (tmp_path / "adapter" / "cache").exists()


def test_another_reference_model_counts_before_and_during_training(logged, material):
    losses = [
        [
            row["loss"]
            for row in logged(kind, reference=kind, reference_model=str(material / "other"))
        ]
        for kind in ("precomputed", "model")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[0][0] - LOG2) > 1e-4


def test_dro_trains_on_pairs_rated_1_and_0_and_says_so(logged, capsys):
    options = {"beta": 0.1, "log_z0": 0.0}
    rows = logged(loss="dro", loss_kwargs=options, per_device_train_batch_size=32)
    said = "training data: 16 of 16 pairs have no scores: chosen is rated 1, rejected 0\n"
    assert said in capsys.readouterr().out
    assert len(rows) == 2 and rows[0]["reward_model/mean"] == pytest.approx(0.5)
    # The start is the reference: DRO is left with the squared scores, half of them 1.
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("scored", [False, True])
def test_kto_logs_no_scores_that_no_pair_brought(logged, tmp_path, capsys, scored):
    scores = {"score_chosen": 3.0, "score_rejected": 1.0} if scored else {}
    file = write_lines(tmp_path / "kto.jsonl", pairs(16, **scores))
    rows = logged(loss="kto", loss_kwargs={"beta": 0.1}, dataset=file)
    assert "no scores" not in capsys.readouterr().out
    assert len(rows) == 2 and rows[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-4)
    values = [row["reward_model/mean"] for row in rows if "reward_model/mean" in row]
    assert len(values) == (2 if scored else 0) and all(1 <= value <= 3 for value in values)


def test_layouts_give_the_numbers_of_the_padded_one(logged):
    metrics = ("loss", "logps/chosen", "logps/rejected", "grad_norm")
    padded, *others = (
        [[row[metric] for metric in metrics] for row in logged(name, layout=name, loss="simpo")]
        for name in ("padded", "packed", "shared_prompt")
    )
    for rows in others:
        for found, wanted in zip(rows, padded, strict=True):
            assert found == pytest.approx(wanted, rel=1e-4)


def test_it_says_once_what_rows_were_read_as_and_prints_the_whole_log(
    job, material, tmp_path, capsys
):
    held_out = str(material / "held_out.jsonl")
    assert job("train", held_out=held_out, eval_strategy="steps", eval_steps=2) == 0
    said = capsys.readouterr().out.splitlines()
    for line in (
        f"{material / 'pairs.jsonl'}: read as preference pairs (adapter preference)",
        f"{held_out}: read as preference pairs (adapter preference)",
        "training pairs: read 16, kept 16; completions truncated 0, prompts truncated 0, sides"
        " equal 0, without a completion 0",
        "held-out pairs: read 6, kept 6; completions truncated 0, prompts truncated 0, sides equal"
        " 0, without a completion 0",
    ):
        assert said.count(line) == 1, line
    printed = [ast.literal_eval(line) for line in said if line.startswith("{'loss'")]
    assert [float(row["rewards/chosen"]) for row in printed] == pytest.approx(
        [row["rewards/chosen"] for row in log_of(tmp_path / "run")], rel=1e-3, abs=1e-6
    )


def test_the_configuration_is_there_before_anything_is_computed(job, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_add_reference_columns", interrupted)
    assert job("train", "max_steps=3", loss="gamma-dpo") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "fused-prefopt: interrupted"
    given = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert given["max_steps"] == 3 and given["loss"] == "gamma-dpo"
    assert given["output_dir"] == str(tmp_path / "run")


def test_in_bf16_the_start_is_its_reference_wherever_that_comes_from(logged):
    # As many rows in a batch of either pass: rounding then meets the same shapes.
    keys = {"per_device_train_batch_size": 16, "reference_batch_size": 16, "max_steps": 1}
    keys |= {"bf16": True, "loss_kwargs": {"beta": 1.0}}
    for reference in ("model", "precomputed"):
        (row,) = logged(reference, reference=reference, **keys)
        for metric in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert row[metric] == pytest.approx(0, abs=1e-6), (reference, metric)
        assert row["loss"] == pytest.approx(LOG2, abs=1e-6)


def test_an_untrained_model_gets_a_tokenizer_of_the_data_and_the_seed_decides():
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
        ({"adapter": "prefernce"}, "dataset: adapter: got 'prefernce'"),
        ({"model": "no/such/model/here"}, "model: "),
        ({"peft": {"rank": 4}}, "peft: unknown key 'rank'"),
        ({"peft": {"target_modules": ["nothing"]}}, "peft: "),
        ({"loss": "kto", "layout": "shared_prompt"}, "layout: got shared_prompt, and kto judges"),
        ({"max_prompt_length": 32}, "dataset: max_prompt_length: got 32, wanted 1..31"),
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
        ({"eval_strategy": "steps"}, "You have set `args.eval_strategy` to"),
    ],
)
def test_a_job_that_cannot_run_says_why_in_its_last_line(refused, keys, message):
    assert message in refused(**keys)


def test_scores_of_the_data_reach_the_loss(logged, tmp_path):
    scored = write_lines(tmp_path / "scored.jsonl", pairs(8, score_chosen=3.0, score_rejected=1.0))
    # At the start only the offset α log(3 − 1) is left of the loss.
    first = logged(loss="odpo", loss_kwargs={"alpha": 1.0}, dataset=scored)[0]
    assert first["loss"] == pytest.approx(math.log(3), abs=1e-4)


def test_gold_completions_of_the_data_reach_the_loss(logged, tmp_path):
    golden = write_lines(tmp_path / "golden.jsonl", pairs(8, gold="the cat sat"))
    (first, *_) = logged(loss="tpo", loss_kwargs={"beta": 0.01}, dataset=golden)
    # 61 tokens that an untrained model finds about equally likely, and so the two completions.
    assert first["loss"] == pytest.approx(LOG2 + math.log(61), abs=0.15)


def test_a_loss_of_whole_distributions_wants_the_reference_beside_it(logged, refused):
    wants = "reference: got precomputed, needs model or adapter"
    assert f"{wants}: tdpo1" in refused(loss="tdpo1")
    assert f"{wants}: dpo" in refused(loss_kwargs={"ld_alpha": 0.5})
    rows = logged(loss="tdpo1", reference="model", log_tokens=True)
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
    done = python(*launch.split(), str(tmp_path / "job.yaml"), *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("model, log and evaluation are in") == 1
    for alone, shared in zip(log_of(one), log_of(two), strict=True):
        for metric in ("loss", "kl/chosen", "rewards/margins", "margin/mean"):
            assert shared[metric] == pytest.approx(alone[metric], rel=1e-4, abs=1e-6), metric


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        (STEP, "step   40  loss  0.6931  accuracy 0.500  margin  -0.0123  lr 5.00e-05"),
        (
            {"loss": 12.5, "learning_rate": 0.01, "kl": 3.0, "nonfinite": 2.0},
            "step   40  loss 12.5000  lr 1.00e-02  nonfinite 2",
        ),
        (
            {f"eval_{name}": value for name, value in STEP.items()},
            "held out   loss  0.6931  accuracy 0.500  margin  -0.0123",
        ),
        ({"train_runtime": 12.34, "train_loss": 0.5}, "trained to step 40 in 12.3 s"),
        ({"other": 1}, "{'other': 1}"),
    ],
)
def test_a_log_is_a_short_line(logs, line):
    assert train.step_line(logs, 40) == line


def test_lines_of_steps_and_evaluations_are_aligned():
    lines = [
        train.step_line(STEP, 7),
        train.step_line(STEP | {"loss": 10.0, "rewards/margins": 99.5}, 1234),
    ]
    lines.append(train.step_line({f"eval_{name}": value for name, value in STEP.items()}, 7))
    for word in ("loss", "accuracy", "margin"):
        assert len({line.index(word) for line in lines}) == 1, word


@pytest.mark.parametrize("bar", [True, False])
def test_the_lines_stand_where_the_log_would_and_the_bar_if_it_is_wanted(bar):
    calls = SimpleNamespace(added=[], removed=[], args=SimpleNamespace(disable_tqdm=not bar))
    calls.add_callback, calls.remove_callback = calls.added.append, calls.removed.append
    train.shorten_step_lines(calls)
    assert set(calls.removed) == {PrinterCallback, ProgressCallback}
    assert [issubclass(each, ProgressCallback) for each in calls.added] == [True] * bar + [False]


@pytest.mark.slow
def test_a_terminal_gets_a_line_a_step_and_the_bar(material, tmp_path):
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
    path = write_job(material, tmp_path, disable_tqdm=False, max_steps=3)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    child = subprocess.Popen(
        [sys.executable, "-m", "fused_prefopt", "train", path],
        env=environment(HF_DATASETS_CACHE=str(tmp_path / "datasets")),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    parts = []
    try:
        while part := os.read(ours, 65536):
            parts.append(part)
    except OSError:  # Linux's end of file
        pass
    os.close(ours)
    assert child.wait(timeout=60) == 0
    shown = b"".join(parts).decode()
    rows = log_of(tmp_path / "run")
    assert len(rows) == 3
    wanted = [train.step_line(row, number) for number, row in enumerate(rows, start=1)]
    found = re.findall(r"step +\d+  loss [^\r\n\x1b]*", shown)
    assert [line.rstrip() for line in found] == wanted
    assert max(map(len, found)) <= 80
    assert "3/3" in shown and "rewards/chosen" not in shown
    assert {"rewards/chosen", "logps/rejected", "grad_norm"} <= rows[0].keys()
