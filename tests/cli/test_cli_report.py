"""`report`: which runs it reads, the table's numbers, the curves in the pictures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from bare_cli import ROOT, bare

from fused_prefopt import report
from fused_prefopt.cli import main
from fused_prefopt.command_line.runs import newest_checkpoint, read_runs

pytest.importorskip("matplotlib")


def history(scale: float, **more: float) -> list[dict[str, float]]:
    """What a trainer logs of four steps, one evaluation, and the end."""
    rows: list[dict[str, float]] = [
        {
            "step": step,
            "loss": scale / step,
            "rewards/chosen": scale * step,
            "rewards/rejected": -scale * step,
            "rewards/accuracies": 0.5 + 0.1 * step,
            "rewards/margins": 2 * scale * step,
            "logps/chosen": -10.0 - step,
            "logps/rejected": -20.0 - step,
            **{name: value * step for name, value in more.items()},
        }
        for step in (1, 2, 3, 4)
    ]
    return [*rows, {"step": 4, "eval_loss": 9.0}, {"step": 4, "train_runtime": 1.5}]


OURS = {"margin/mean": 0.5, "margin/std": 0.1, "kl/chosen": 0.25, "kl/rejected": -0.75}


@pytest.fixture
def runs(tmp_path):
    """A run of ours, judged on held-out pairs, and one of TRL's with checkpoints only."""
    ours, trl = tmp_path / "ours", tmp_path / "trl"
    ours.mkdir()
    state = {"global_step": 4, "log_history": history(1.0, **OURS)}
    (ours / "trainer_state.json").write_text(json.dumps(state))
    judged = {"reference": {"accuracy": 0.5}, "trained": {"accuracy": 0.75, "margin": 1.5, "kl": 2}}
    (ours / "evaluation.json").write_text(json.dumps(judged))
    for step, scale in ((9, 7.0), (10, 3.0)):
        checkpoint = trl / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        state = {"global_step": step, "log_history": history(scale)}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    return ours, trl


@pytest.fixture
def drawn(monkeypatch):
    """Picture name → its figure, as it was saved."""
    figures = {}
    save = report._save
    monkeypatch.setattr(report, "_save", lambda f, p: (figures.update({p.name: f}), save(f, p)))
    return figures


def curves(figure) -> list[dict[str, tuple[list[float], list[float]]]]:
    """Label → (steps, values), one dictionary for each of the figure's axes."""
    return [
        {line.get_label(): tuple(map(list, line.get_data())) for line in axis.lines}
        for axis in figure.axes
    ]


def test_one_run_has_a_table_and_six_pictures(runs, drawn, capsys):
    assert main(["report", str(runs[0])]) == 0
    heading, rule, row, *_ = capsys.readouterr().out.splitlines()
    assert heading.startswith("run   steps") and set(rule) == {"-"}
    assert row.split()[:5] == ["ours", "4", "0.25", "0.9", "8"]
    folder = runs[0] / "report"
    table = json.loads((folder / "table.json").read_text())["ours"]
    assert table == {
        "steps": 4,
        "loss": 0.25,
        "reward acc.": 0.9,
        "reward margin": 8.0,
        "target margin": 2.0,
        "chosen KL": 1.0,
        "rejected KL": -3.0,
        "chosen logp": -14.0,
        "rejected logp": -24.0,
        "held-out acc.": 0.75,
        "held-out margin": 1.5,
        "held-out KL": 2,
    }
    names = {"loss", "accuracies", "rewards", "margins", "kl", "logps"}
    assert {path.stem for path in folder.glob("*.png")} == names == {n[:-4] for n in drawn}
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_pictures_of_one_run_hold_its_metrics_over_the_steps(runs, drawn):
    main(["report", str(runs[0])])
    steps = [1, 2, 3, 4]
    assert curves(drawn["rewards.png"]) == [
        {"rewards/chosen": (steps, steps), "rewards/rejected": (steps, [-1, -2, -3, -4])}
    ]
    assert curves(drawn["kl.png"]) == [
        {
            "kl/chosen": (steps, [0.25, 0.5, 0.75, 1.0]),
            "kl/rejected": (steps, [-0.75, -1.5, -2.25, -3.0]),
        }
    ]
    assert curves(drawn["loss.png"])[0]["loss, held out"] == ([4], [9.0])
    (axis,) = drawn["margins.png"].axes
    assert curves(drawn["margins.png"])[0]["target margin γ_i, mean ± std"][1] == [0.5, 1, 1.5, 2]
    ((low, high),) = [band.get_datalim(axis.transData).intervaly for band in axis.collections]
    assert low == pytest.approx(0.4) and high == pytest.approx(2.4)


def test_several_runs_share_an_axis_for_each_metric(runs, drawn, capsys, tmp_path):
    assert main(["report", *map(str, runs)]) == 0
    assert "table.json, loss.png" in capsys.readouterr().out
    table = json.loads((tmp_path / "comparison" / "table.json").read_text())
    assert table["trl"]["loss"] == 0.75 and table["ours"]["loss"] == 0.25
    assert "target margin" not in table["trl"]


def test_lines_of_several_runs_are_named_after_them(runs, drawn):
    ours, trl = runs
    main(["report", str(ours), str(trl), "--output", str(ours.parent / "both")])
    chosen, rejected = curves(drawn["logps.png"])
    assert set(chosen) == set(rejected) == {"ours", "trl"}
    assert rejected["trl"] == ([1, 2, 3, 4], [-21, -22, -23, -24])
    (kl, _) = curves(drawn["kl.png"])
    assert set(kl) == {"ours"}
    assert (ours.parent / "both" / "table.json").is_file()


def assert_legends_are_outside(figure) -> int:
    """Every legend is below its axis and its axis's label, and on the picture; their number."""
    figure.canvas.draw()
    legends = [axis.get_legend() for axis in figure.axes if axis.get_legend() is not None]
    for legend in legends:
        box, axis = legend.get_window_extent(), legend.axes
        assert box.y1 <= axis.xaxis.label.get_window_extent().y0 < axis.get_window_extent().y0
        assert figure.bbox.y0 <= box.y0 and figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert axis.get_window_extent().height > 0.4 * figure.bbox.height
    return len(legends)


@pytest.mark.parametrize("count", [1, 2])
def test_no_legend_covers_a_curve(runs, drawn, tmp_path, count):
    main(["report", *map(str, runs[:count]), "--output", str(tmp_path / "pictures")])
    assert len(drawn) == 6
    for name, figure in drawn.items():
        assert assert_legends_are_outside(figure) == len(figure.axes), name
    labels = [text.get_text() for text in drawn["loss.png"].axes[0].get_legend().get_texts()]
    alone = ["loss", "loss, held out"]
    assert labels == (alone if count == 1 else ["ours", "ours, held out", "trl", "trl, held out"])


def test_no_legend_covers_a_picture_of_the_main_job(drawn, tmp_path):
    margins = torch.linspace(-1, 1, 50)
    report.plot_margins(margins, {"a": margins + 0.5, "b": margins * 2}, tmp_path / "margins.png")
    report.plot_target_margins(margins, margins + 2, 2.0, tmp_path / "targets.png")
    report.plot_rewards({"a": history(1.0), "b": history(2.0)}, tmp_path / "rewards.png")
    found = {name: assert_legends_are_outside(figure) for name, figure in drawn.items()}
    assert found == {"margins.png": 2, "targets.png": 1, "rewards.png": 2}


def test_every_other_picture_has_its_legends_from_there_or_outside_its_axes():
    folders = ("fused_prefopt", "benchmarks", "examples")
    files = [path for name in folders for path in (ROOT / name).rglob("*.py")]
    found = {
        (path.name, receiver)
        for path in files
        for receiver in re.findall(r"(\w+)\.legend\(", path.read_text(encoding="utf-8"))
        if receiver != "figure"
    }
    assert found == {("report.py", "axis")}


def test_names_are_the_shortest_ends_that_differ(tmp_path):
    for name in ("a/seed-0", "b/seed-0"):
        (tmp_path / name).mkdir(parents=True)
        text = json.dumps({"log_history": history(1.0)})
        (tmp_path / name / "trainer_state.json").write_text(text)
    found = read_runs([str(tmp_path / "a/seed-0"), str(tmp_path / "b/seed-0/trainer_state.json")])
    assert [run.name for run in found] == ["a/seed-0", "b/seed-0"]
    assert [run.last("loss") for run in found] == [0.25, 0.25] and found[0].last("no") is None


def test_the_newest_checkpoint_has_the_most_steps(runs, tmp_path):
    killed = runs[1] / "checkpoint-11"
    killed.mkdir()
    (killed / "model.safetensors").touch()
    newest = newest_checkpoint(runs[1])
    assert newest is not None and newest.name == "checkpoint-10"
    assert newest_checkpoint(tmp_path) is None


def test_what_is_no_run_is_said_in_one_line(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "silent.json").write_text('{"log_history": [{"step": 1}]}')
    for words, message in (
        (["nowhere"], "nowhere: there is no such folder"),
        (["empty"], "empty: got no trainer_state.json, needs the output folder of a training"),
        (["broken.json"], "broken.json: Expecting property name"),
        (["silent.json"], "silent.json: got no logged steps"),
        (["ours", "ours"], "ours: got the same run twice"),
    ):
        assert main(["report", *(str(tmp_path / word) for word in words)]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_without_matplotlib_the_table_is_there_and_what_to_install(runs):
    done = bare(f'sys.exit(main(["report", {str(runs[0])!r}]))')
    assert done.returncode == 2 and "0.75" in done.stdout
    assert 'drawing needs matplotlib: pip install "fused-prefopt[plots]"' in done.stderr
    assert (runs[0] / "report" / "table.json").is_file()


def test_a_reader_that_leaves_early_gets_no_stack_trace():
    done = subprocess.run(
        f"{sys.executable} -m fused_prefopt losses | head -1",
        shell=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.startswith("loss ") and done.stderr == ""
