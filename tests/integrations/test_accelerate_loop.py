"""The bare loop of `examples/accelerate_loop.py`: accumulation, precision, NaN, resuming."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import accelerate_loop
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tiny_models import pair_features, tiny_llama
from trainers import ROOT, Killed, assert_bit_equal, child_environment

from fused_prefopt.data import PairCollator

STEPS, SAVE_EVERY = 9, 2


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps one state for the process, which two precisions cannot share."""

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


def run(folder: Path, *arguments: str, hook=None, **changes):
    """Train a tiny model; `hook` sees each forward pass and what it returns."""
    options = accelerate_loop.parse_arguments([f"--output={folder}", *arguments])
    given = {"steps": STEPS, "save_every": SAVE_EVERY, "batch_size": 2, "precision": "no"}
    vars(options).update(given | changes)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerate_loop.set_seed(0)
    model = tiny_llama(attention_dropout=0.2 if options.loss != "dpo" else 0.0)
    if hook is not None:
        model.model.register_forward_hook(hook)
    accelerate_loop.train(options, model, pair_features(13), PairCollator(0))
    return model


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def state(folder: Path, step: int = STEPS) -> dict:
    """What a checkpoint holds: optimizer, scheduler and the loss's statistics."""
    checkpoint = folder / f"checkpoint-{step}"
    names = ("optimizer.bin", "scheduler.bin", "custom_checkpoint_0.pkl")
    return {name: dict(torch.load(checkpoint / name, weights_only=False)) for name in names}


def assert_same_run(one: Path, other: Path) -> None:
    """The same log, however often a step was done; the same end."""
    first, second = ({row["step"]: row for row in log(folder)} for folder in (one, other))
    assert sorted(first) == list(range(1, STEPS + 1))
    assert_bit_equal(first, second)
    assert_bit_equal(state(one), state(other))
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (one, other)]
    assert weights[0] == weights[1]


def ending(seed: str):
    """A hook that ends a run in some forward pass after the first checkpoint."""
    passes, last = [], random.Random(seed).randint(2 * SAVE_EVERY + 1, 2 * STEPS)

    def hook(module, *_):
        passes.append(module.training)  # not where it computes the reference log-probs
        if sum(passes) == last:
            raise Killed

    return hook


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing ends, by its options; made once."""
    folders = {}

    def folder(**given):
        key = tuple(sorted(given.items()))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("whole")
            run(folders[key], **given)
        return folders[key]

    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "precision"), [("gamma-simpo", "no"), ("gamma-simpo", "bf16"), ("alpha-dpo", "no")]
)
def test_a_run_that_failed_resumes_bit_equal(tmp_path, whole, loss, precision):
    given = {"loss": loss, "precision": precision}
    with pytest.raises(Killed):
        run(tmp_path, hook=ending(f"{loss} {precision}"), **given)
    assert not (tmp_path / "model").exists()
    run(tmp_path, "--resume", **given)
    assert_same_run(whole(**given), tmp_path)


def test_a_run_killed_while_it_saves_resumes_from_the_checkpoint_before(
    tmp_path, whole, monkeypatch
):
    given = {"loss": "gamma-simpo", "precision": "no"}
    save = accelerate_loop.Accelerator.save_state

    def half(accelerator, folder):
        save(accelerator, folder)
        if folder.endswith("-6"):
            (Path(folder) / "optimizer.bin").write_bytes(b"half")
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(accelerate_loop.Accelerator, "save_state", half)
        with pytest.raises(Killed):
            run(tmp_path, **given)
    assert accelerate_loop.last_checkpoint(tmp_path)[0] == 4
    run(tmp_path, "--resume", **given)
    assert_same_run(whole(**given), tmp_path)


def test_accumulation_equals_one_larger_batch(tmp_path, monkeypatch):
    # Plain steps: Adam's first is the sign of the gradient, in which rounding shows.
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)
    given = {"loss": "dpo", "learning_rate": 3.0, "max_norm": 0.05, "steps": 4, "save_every": 9}
    split = run(tmp_path / "split", accumulation=2, batch_size=4, **given)
    whole = run(tmp_path / "whole", accumulation=1, batch_size=8, **given)
    start = tiny_llama()
    for name, value in whole.named_parameters():
        step = (value - start.get_parameter(name)).norm()
        assert step > 0, name
        assert (split.get_parameter(name) - value).norm() <= 2e-5 * step, name
    assert len(log(tmp_path / "split")) == 4
    for one, other in zip(log(tmp_path / "split"), log(tmp_path / "whole"), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


def nan_in_pass(number: int):
    """A hook that makes one forward pass of the training give NaN."""
    passes = []

    def hook(module, _, output):
        passes.append(module.training)
        if sum(passes) == number:
            output.last_hidden_state = output.last_hidden_state * torch.nan
        return output

    return hook


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_of_nan_stops_the_run_before_a_weight_is_touched(tmp_path, whole, accumulation):
    given = {"loss": "gamma-simpo", "accumulation": accumulation, "save_every": 1}
    with pytest.raises(SystemExit, match="step 5: the loss is nan, the gradient's norm nan: stop"):
        run(tmp_path, hook=nan_in_pass(5 * accumulation), **given)
    assert accelerate_loop.last_checkpoint(tmp_path)[0] == 4 == len(log(tmp_path))
    assert not (tmp_path / "model").exists()
    run(tmp_path, "--resume", **given)
    assert_same_run(whole(**given), tmp_path)


@pytest.mark.parametrize("loss", ["gamma-simpo", "alpha-dpo", "beta-dpo"])
def test_a_batch_of_nan_that_is_skipped_leaves_weights_and_statistics(tmp_path, loss, capsys):
    """Its loss and metrics are NaN in the log, its pairs are counted, training goes on."""
    hook = nan_in_pass(5)
    given = {"loss": loss, "accumulation": 1, "on_nonfinite": "skip"}
    run(tmp_path, hook=hook, save_every=1, **given)
    rows = log(tmp_path)
    finite = [row["step"] for row in rows if torch.tensor(list(row.values())).isfinite().all()]
    assert finite == [step for step in range(1, STEPS + 1) if step != 5]
    assert not torch.tensor([rows[4]["loss"], rows[4]["norm"]]).isfinite().any()
    assert rows[4]["nonfinite"] == 2
    assert [row["skipped"] for row in rows] == [0] * 4 + [1] + [0] * 4
    assert capsys.readouterr().out == "step 5: the loss is nan, the gradient's norm nan: skipped\n"
    before, after = (state(tmp_path, step) for step in (4, 5))
    assert_bit_equal(before["optimizer.bin"]["state"], after["optimizer.bin"]["state"])
    statistics = [each["custom_checkpoint_0.pkl"] for each in (before, after)]
    kept = [name for name in statistics[0] if name.rpartition(".")[2] in ("margins", "average")]
    assert kept
    for name in kept:
        assert_bit_equal(statistics[0][name], statistics[1][name], name)
    counts = [each["statistics.nonfinite"].item() for each in statistics]
    assert counts == [0, 2]
    weights = [tmp_path / f"checkpoint-{step}" / "model.safetensors" for step in (4, 5, 6)]
    assert weights[0].read_bytes() == weights[1].read_bytes() != weights[2].read_bytes()
    run(tmp_path, "--resume", steps=STEPS + 1, **given)
    assert len(log(tmp_path)) == STEPS + 1


def test_a_finished_run_is_left_as_it_is_and_continued_on_demand(tmp_path, capsys):
    def contents():
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    run(tmp_path, loss="simpo")
    before = contents()
    with pytest.raises(SystemExit, match="checkpoint-9 is there: --resume"):
        run(tmp_path, loss="simpo")
    capsys.readouterr()
    run(tmp_path, "--resume", loss="simpo")
    assert capsys.readouterr().out == f"already finished at step {STEPS}\n"
    assert contents() == before
    run(tmp_path, "--resume", loss="simpo", steps=STEPS + 1)
    assert len(log(tmp_path)) == STEPS + 1
    assert (tmp_path / "model" / "step.txt").read_text() == str(STEPS + 1)


def test_a_run_killed_before_its_model_is_written_writes_it_without_a_step(
    tmp_path, whole, monkeypatch
):
    def killed(*_):
        raise Killed

    given = {"loss": "gamma-simpo", "precision": "no"}
    with monkeypatch.context() as patch:
        patch.setattr(accelerate_loop, "save_model", killed)
        with pytest.raises(Killed):
            run(tmp_path, **given)
    run(tmp_path, "--resume", **given)
    assert len(log(tmp_path)) == STEPS
    assert_same_run(whole(**given), tmp_path)


@pytest.mark.slow
def test_the_example_alone_in_an_empty_folder_learns_from_the_embedded_text(tmp_path):
    shutil.copy(ROOT / "examples" / "accelerate_loop.py", tmp_path)
    words = "--steps=16 --limit=64 --max-length=32 --save-every=16 --accumulation=1".split()
    done = subprocess.run(
        [sys.executable, "accelerate_loop.py", "--output=out", *words],
        cwd=tmp_path,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "16/16" in done.stderr and "reference log-probs" in done.stderr
    losses = [row["loss"] for row in log(tmp_path / "out")]
    assert len(losses) == 16 and sum(losses[-5:]) < sum(losses[:5])
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
