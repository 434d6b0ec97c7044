"""`report`: which runs it reads, the table's numbers, the curves in the pictures."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line_jobs import ROOT

from fused_prefopt.cli import pictures
from fused_prefopt.cli.main import main

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


NAMES = ("loss", "accuracies", "rewards", "margins", "kl", "logps")


def keep_figures(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Picture name → its figure, as it is saved."""
    figures: dict[str, Any] = {}
    save = pictures._save
    patch.setattr(pictures, "_save", lambda f, p: (figures.update({p.stem: f}), save(f, p)))
    return figures


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """A run of ours, judged on held-out pairs, and one of TRL's with checkpoints only."""
    folder = tmp_path_factory.mktemp("runs")
    ours, trl = folder / "ours", folder / "trl"
    ours.mkdir()
    state = {"global_step": 4, "log_history": history(1.0, **OURS)}
    (ours / "trainer_state.json").write_text(json.dumps(state))
    judged = {"reference": {"accuracy": 0.5}, "trained": {"accuracy": 0.75, "margin": 1.5, "kl": 2}}
    (ours / "evaluation.json").write_text(json.dumps(judged))
    for step, scale in ((9, 7.0), (10, 3.0)):
        (trl / f"checkpoint-{step}").mkdir(parents=True)
        state = {"global_step": step, "log_history": history(scale)}
        (trl / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    return ours, trl


@pytest.fixture(scope="module")
def reports(runs) -> list[tuple[str, dict, dict[str, Any]]]:
    """What `report` printed, wrote as table.json and drew, of our run and of both."""
    found = []
    for paths, folder in ((runs[:1], runs[0] / "report"), (runs, runs[0].parent / "comparison")):
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
            figures = keep_figures(patch)
            assert main(["report", *map(str, paths)]) == 0
        for name in NAMES:
            assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        table = json.loads((folder / "table.json").read_text())
        found.append((said.getvalue(), table, figures))
    return found


def curves(figure) -> list[dict[str, tuple[list[float], list[float]]]]:
    """Label → (steps, values), one dictionary for each of the figure's axes."""
    return [
        {line.get_label(): tuple(map(list, line.get_data())) for line in axis.lines}
        for axis in figure.axes
    ]


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


def test_one_run_has_a_table_and_six_pictures(reports):
    said, table, figures = reports[0]
    heading, rule, row, *_ = said.splitlines()
    assert heading.startswith("run   steps") and set(rule) == {"-"}
    assert row.split()[:5] == ["ours", "4", "0.25", "0.9", "8"]
    assert set(figures) == set(NAMES)
    columns = "steps,loss,reward acc.,reward margin,target margin,chosen KL,rejected KL,"
    columns += "chosen logp,rejected logp,held-out acc.,held-out margin,held-out KL"
    values = [4, 0.25, 0.9, 8, 2, 1, -3, -14, -24, 0.75, 1.5, 2]
    assert table == {"ours": dict(zip(columns.split(","), values, strict=True))}


def test_the_pictures_of_one_run_hold_its_metrics_over_the_steps(reports):
    figures, steps = reports[0][2], [1, 2, 3, 4]
    assert curves(figures["rewards"]) == [
        {"rewards/chosen": (steps, steps), "rewards/rejected": (steps, [-1, -2, -3, -4])}
    ]
    (kl,) = curves(figures["kl"])
    assert kl["kl/chosen"] == (steps, [0.25, 0.5, 0.75, 1.0])
    assert kl["kl/rejected"] == (steps, [-0.75, -1.5, -2.25, -3.0]) and len(kl) == 2
    assert curves(figures["loss"])[0]["loss, held out"] == ([4], [9.0])
    (axis,), (shown,) = figures["margins"].axes, curves(figures["margins"])
    assert shown["target margin γ_i, mean ± std"][1] == [0.5, 1, 1.5, 2]
    ((low, high),) = [band.get_datalim(axis.transData).intervaly for band in axis.collections]
    assert low == pytest.approx(0.4) and high == pytest.approx(2.4)


def test_several_runs_share_an_axis_for_each_metric_and_name_their_lines(reports):
    said, table, figures = reports[1]
    assert "table.json, loss.png" in said
    assert table["trl"]["loss"] == 0.75 and table["ours"]["loss"] == 0.25
    assert "target margin" not in table["trl"]
    chosen, rejected = curves(figures["logps"])
    assert set(chosen) == set(rejected) == {"ours", "trl"}
    assert rejected["trl"] == ([1, 2, 3, 4], [-21, -22, -23, -24])
    assert set(curves(figures["kl"])[0]) == {"ours"}


def test_it_writes_to_the_folder_that_is_named(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "plot_histories", lambda histories, folder: [])
    assert main(["report", str(runs[1]), "--output", str(tmp_path / "there")]) == 0
    assert (tmp_path / "there" / "table.json").is_file()


def test_no_legend_covers_a_curve(reports):
    for (_, _, figures), names in zip(reports, (["loss"], ["ours", "trl"]), strict=True):
        for name, figure in figures.items():
            assert assert_legends_are_outside(figure) == len(figure.axes), name
        labels = [text.get_text() for text in figures["loss"].axes[0].get_legend().get_texts()]
        assert labels == [label for name in names for label in (name, f"{name}, held out")]


def test_no_legend_covers_a_picture_of_the_main_job(monkeypatch, tmp_path):
    drawn = keep_figures(monkeypatch)
    margins = torch.linspace(-1, 1, 50)
    pictures.plot_margins(margins, {"a": margins + 0.5, "b": margins * 2}, tmp_path / "margins.png")
    both = {"a": margins, "b": margins + 2}
    pictures.plot_target_margins(both, {"x": both, "y": both}, tmp_path / "targets.png")
    pictures.plot_rewards({"a": history(1.0), "b": history(2.0)}, tmp_path / "rewards.png")
    found = {name: assert_legends_are_outside(figure) for name, figure in drawn.items()}
    assert found == {"margins": 2, "targets": 2, "rewards": 2}


def test_every_other_picture_has_its_legends_from_there_or_outside_its_axes():
    folders = ("fused_prefopt", "benchmarks", "examples")
    files = [path for name in folders for path in (ROOT / name).rglob("*.py")]
    found = {
        (path.name, receiver)
        for path in files
        for receiver in re.findall(r"(\w+)\.legend\(", path.read_text(encoding="utf-8"))
        if receiver != "figure"
    }
    assert found == {("pictures.py", "axis")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nowhere", "nowhere: there is no such folder"),
        ("empty", "empty: got no trainer_state.json, needs the output folder of a training"),
        ("broken.json", "broken.json: Expecting property name"),
        ("silent.json", "silent.json: got no logged steps"),
        ("empty empty", "empty: got the same run twice"),
    ],
)
def test_what_is_no_run_is_said_in_one_line(tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "silent.json").write_text('{"log_history": [{"step": 1}]}')
    assert main(["report", *(str(tmp_path / word) for word in words.split())]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out
