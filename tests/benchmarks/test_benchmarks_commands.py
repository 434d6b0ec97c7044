"""Every command of `python -m benchmarks` from its command line, on tiny shapes."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("psutil")
pytest.importorskip("matplotlib")

from benchmarks import __main__ as command_line  # noqa: E402
from benchmarks import (  # noqa: E402
    cpu_grid,
    gpu,
    grid,
    kl_rows,
    method_cost,
    suite,
    trainer_steps,
)
from benchmarks.__main__ import main, make_parser  # noqa: E402
from benchmarks.context_search import ContextRun  # noqa: E402
from benchmarks.grid import Point  # noqa: E402
from benchmarks.kernel_results import KERNELS  # noqa: E402
from benchmarks.mass_study import MASSES  # noqa: E402
from benchmarks.memory import Memory  # noqa: E402
from benchmarks.peers import CANDIDATES, ON_ONE_SHAPE  # noqa: E402
from benchmarks.report import END, START  # noqa: E402
from benchmarks.results import NO_TIME, Results, load  # noqa: E402
from benchmarks.shapes import TINY, Shape  # noqa: E402
from benchmarks.trainer_candidates import TRAINERS  # noqa: E402
from benchmarks.trainer_setups import Setup  # noqa: E402

STEP = Setup("all", 1, 1, 8, "fp32", rounds=1, hidden_size=64, vocab=97)
MEMORY = Memory(3 * 2**20, 2**20, "ok")
Patch = pytest.MonkeyPatch


def small(shape: Shape) -> Shape:
    """The same name, share and softcap, with sizes that take no time."""
    length = 12 + shape.length // 1024
    return replace(shape, length=length, hidden_size=16, vocab=97)


def cpu(folder: Path, patch: Patch) -> int:
    patch.setattr(suite, "LAPTOP", TINY)
    patch.setattr(suite, "SWEEP_VOCAB", (replace(TINY, name="vocab-97"),))
    patch.setattr(suite, "SWEEP_LENGTH", (replace(TINY, name="length-12"),))
    patch.setattr(suite, "peak_memory", lambda *_: MEMORY)
    patch.setattr(suite, "_run_alone", lambda function: function())
    patch.setattr(suite, "keep_freed_memory", lambda: None)
    return main(["cpu", "--rounds", "1", "--results", str(folder)])


def on_grid(folder: Path, patch: Patch) -> int:
    points = {
        name: [replace(point, shape=small(point.shape)) for point in chosen]
        for name, chosen in cpu_grid.cpu_points().items()
    }
    patch.setattr(cpu_grid, "cpu_points", lambda: points)
    patch.setattr(grid, "peak_memory", lambda *_: MEMORY)
    return main(["grid", "--rounds", "1", "--results", str(folder)])


def methods(folder: Path, patch: Patch) -> int:
    real = method_cost.measure_methods
    patch.setattr(method_cost, "measure_methods", lambda results, say: real(results, TINY, say))
    patch.setattr(method_cost, "_CALLS", 2)
    return main(["methods", "--results", str(folder)])


def divergence(folder: Path, patch: Patch) -> int:
    patch.setattr(command_line, "run_kl", partial(kl_rows.run_kl, shape=TINY, count=1))
    patch.setattr(kl_rows, "keep_freed_memory", lambda: None)
    patch.setattr(kl_rows, "in_child", lambda function, *arguments: 3 * 2**20)
    return main(["kl", "--results", str(folder)])


def trainer(folder: Path, patch: Patch) -> int:
    for library in ("trl", "peft", "datasets"):
        pytest.importorskip(library)
    patch.setattr(trainer_steps, "ON_CPU", (STEP, replace(STEP, trains="adapter")))
    return main(["trainer", "--results", str(folder)])


def on_gpu(folder: Path, patch: Patch) -> int:
    """A point of each part of the grid and the stages, on the CPU."""

    def contexts(results: Results, seconds: float, say: Callable[[str], None]) -> None:
        ContextRun(
            results, seconds, lambda name, shape, capacity: shape.length < 999, say=say
        ).measure()

    names = ("ours: auto, auto", "TRL", "eager")

    def some(points: list[Point]) -> list[Point]:
        return [
            replace(
                point,
                shape=small(point.shape),
                candidates=tuple(c for c in point.candidates if c.name in names),
            )
            for point in points[:1]
        ]

    for stage in (gpu.telling, gpu.peers, gpu.others):
        patch.setattr(gpu, stage.__name__, partial(some, stage()))
    patch.setattr(gpu, "DEVICE", "cpu")
    patch.setattr(gpu, "ON_GPU", (STEP,))
    patch.setattr(gpu, "run_contexts", contexts)
    patch.setattr(gpu, "memory_here", cpu_grid.not_measured)
    return main(["gpu", "--deadline", "3600", "--results", str(folder)])


def profiled(folder: Path, patch: Patch) -> int:
    return main(["profile"])


# masses and kernels run from the command line in test_benchmarks_masses.py and test_aot.py,
# report and compare below.
MEASURING = {
    "cpu": cpu,
    "grid": on_grid,
    "methods": methods,
    "trainer": trainer,
    "kl": divergence,
    "gpu": on_gpu,
    "profile": profiled,
}
ELSEWHERE = {"masses", "kernels", "replay", "report", "compare"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What every measuring command leaves."""
    root = tmp_path_factory.mktemp("results")
    with torch.compiler.set_stance("force_eager"), Patch.context() as patch:
        patch.setattr("benchmarks.timing.gc.collect", lambda: 0)
        for name, run in MEASURING.items():
            with Patch.context() as inner:
                assert run(root / ("h200" if name == "gpu" else "cpu"), inner) == 0
    yield root


def test_every_command_is_run_by_a_test() -> None:
    (commands,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(commands.choices) == {*MEASURING, *ELSEWHERE}


def test_every_command_leaves_its_rows(measured: Path) -> None:
    files = load(measured / "cpu")
    assert files.keys() == {
        *("head-fp32", "head-bf16", "sweep"),
        *("shares", "rows", "peers", "methods", "trainer", "kl"),
    }
    statuses = {row["status"] for content in files.values() for row in content["rows"]}
    assert "ok" in statuses and NO_TIME not in statuses
    assert {row["candidate"] for row in files["head-fp32"]["rows"]} == set(ON_ONE_SHAPE)
    names = {row["candidate"] for content in files.values() for row in content["rows"]}
    assert set(CANDIDATES) < names | {"ours: auto"}
    assert len(files["trainer"]["rows"]) == 2 * len(TRAINERS)
    ours = [row for row in files["rows"]["rows"] if row["candidate"].startswith("ours")]
    assert len(ours) == 3 * 4 and {row["status"] for row in ours} == {"ok"}
    assert {row["memory_status"] for row in ours} == {"not measured"}
    grids = load(measured / "h200")
    assert grids.keys() == {"grid", "trainer", "context"}
    found = {(row["candidate"], row["labelled_rows"]): row for row in grids["grid"]["rows"]}
    assert {name for name, _ in found} == {"ours: auto, auto", "TRL", "eager"}
    assert len(found) == 2 + 1 + 2
    for row in found.values():
        assert row["status"] == "ok" and row["in_p"] > 0
    assert {row["status"] for row in grids["trainer"]["rows"]} == {"ok"}


def test_a_deadline_leaves_named_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "DEADLINE", 0.0)
    monkeypatch.setattr(suite, "_run_alone", lambda function: function())
    assert main(["cpu", "--deadline", "0", "--results", str(tmp_path)]) == 0
    for content in load(tmp_path).values():
        assert {row["status"] for row in content["rows"]} == {NO_TIME}


def test_the_report_of_everything(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = Path(shutil.copytree(measured, tmp_path / "results"))
    readme, docs = tmp_path / "README.md", tmp_path / "docs"
    readme.write_text(f"{START}\nold\n{END}\n", encoding="utf-8")
    places = ["--readme", str(readme), "--docs", str(docs), "--page", str(docs / "kernels.md")]
    places += ["--results", str(results / "cpu"), "--kernels", str(KERNELS)]
    absent = [*places, "--masses", str(tmp_path / "absent")]
    assert main(["report", "--check", *absent]) == 1
    assert "benchmarks.md is out of date" in capsys.readouterr().out
    assert main(["report", *absent]) == 0
    capsys.readouterr()
    assert main(["report", "--check", *absent]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "README agrees with the results",
        "kernels.md agrees with the results",
        "benchmarks.md agrees with the results",
        "drop_mass.md does not exist: `python -m benchmarks masses` has not been run",
    ]
    page = (docs / "benchmarks.md").read_text(encoding="utf-8")
    assert "## A whole trainer step, CPU" in page and "## A whole trainer step, H200" in page
    assert "## The KL divergence from a reference model" in page
    assert "### Searched on an H200" in page and "## Rows and dtypes" in page
    assert "(../results/cpu/trainer.png)" in page and "(../results/h200/trainer.png)" in page

    path = results / "cpu" / "trainer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["rows"][0]["loss"] += 1.0
    path.write_text(json.dumps(content), encoding="utf-8")
    assert main(["report", "--check", *absent]) == 1
    assert main(["compare", str(path), str(measured / "cpu" / "trainer.json")]) in (0, 1)


def test_the_measuring_commands_write_where_the_report_reads() -> None:
    defaults = {
        name: make_parser().parse_args([name]).results
        for name in (*MEASURING, "masses", "report")
        if name != "profile"
    }
    folders = {path.name for path in defaults.values()}
    assert folders == {"cpu", "h200", "masses"}
    assert defaults["masses"] == MASSES
    assert make_parser().parse_args(["report"]).masses == MASSES
    assert command_line.PAGE.parent.name == "docs"
