"""Every command of `python -m benchmarks` from its command line, on tiny shapes, and its report."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("psutil")
pytest.importorskip("matplotlib")

from benchmarks import __main__ as command_line  # noqa: E402
from benchmarks import cpu_runs, gpu_runs, head_points, memory, trainer_steps  # noqa: E402
from benchmarks.__main__ import main, make_parser  # noqa: E402
from benchmarks.candidates import CANDIDATES, ON_ONE_SHAPE  # noqa: E402
from benchmarks.context_search import ContextRun  # noqa: E402
from benchmarks.cpu_runs import measured_losses  # noqa: E402
from benchmarks.gpu_runs import Unit  # noqa: E402
from benchmarks.head_points import KL_CANDIDATES, GridPoint, run_kl  # noqa: E402
from benchmarks.mass_study import MASSES  # noqa: E402
from benchmarks.memory import Memory, not_measured  # noqa: E402
from benchmarks.report import END, START, page_text, pictures  # noqa: E402
from benchmarks.results import KERNELS, NO_TIME, Results, Row, load  # noqa: E402
from benchmarks.shapes import TINY, Shape  # noqa: E402
from benchmarks.tables import head_table  # noqa: E402
from benchmarks.trainers import EAGER, EVERYWHERE, IN_CONTEXT, Setup  # noqa: E402
from fused_prefopt.cli.console import between  # noqa: E402

STEP = Setup("all", 1, 1, 8, "fp32", rounds=1, hidden_size=64, vocab=97)
OURS = "ours: PreferenceTrainer"
MEMORY = Memory(3 * 2**20, 2**20, "ok")
Patch = pytest.MonkeyPatch


def small(shape: Shape) -> Shape:
    """The same name, share and softcap, with sizes that take no time."""
    return replace(shape, length=12 + shape.length // 1024, hidden_size=16, vocab=97)


def some(points: list[GridPoint], most: int) -> list[GridPoint]:
    """A point of a part of the GPU's grid, with some of its candidates, on a CPU."""
    names = ("ours: auto, auto", "TRL", "eager")
    chosen = tuple(c for c in points[0].candidates if c.name in names)[:most]
    shape = small(points[0].shape)
    return [replace(points[0], shape=shape, candidates=chosen, memory=not_measured)]


def run_units(units: list[Unit], files: dict[str, Results], end: float, say: Any) -> None:
    """In this process: test_gpu_runs has them in their own."""
    for unit in units:
        unit.measure(files[unit.file])


def run_contexts(results: Results, seconds: float, say: Any) -> None:
    ContextRun(results, seconds, lambda name, shape, _: shape.length < 999, say=say).measure()


def shrink(patch: Patch) -> None:
    """Every command measures something tiny, and in this process."""
    points = {
        name: [replace(point, shape=small(point.shape)) for point in chosen]
        for name, chosen in cpu_runs.cpu_points().items()
    }
    methods = partial(cpu_runs.run_methods, shape=TINY, calls=2)
    for module, values in {
        memory: {"peak_memory": lambda *_: MEMORY},
        cpu_runs: {
            "LAPTOP": TINY,
            "SWEEP_VOCAB": (replace(TINY, name="vocab-97"),),
            "SWEEP_LENGTH": (replace(TINY, name="length-12"),),
            "peak_memory": lambda *_: MEMORY,
            "_run_alone": lambda function: function(),
            "keep_freed_memory": lambda: None,
            "cpu_points": lambda: points,
            "run_methods": methods,
        },
        command_line: {"run_kl": partial(run_kl, shape=TINY, count=1)},
        head_points: {"keep_freed_memory": lambda: None, "in_child": lambda *_: MEMORY.extra},
        trainer_steps: {
            "ON_CPU": (STEP, replace(STEP, trains="adapter")),
            "OVER_CONTEXT": (replace(STEP, checkpointed=True, reference=(0.0, 0.0)),),
        },
        gpu_runs: {
            "telling": partial(some, gpu_runs.telling(), 2),
            "peers": partial(some, gpu_runs.peers(), 1),
            "others": partial(some, gpu_runs.others(), 1),
            "DEVICE": "cpu",
            "ON_GPU": (STEP,),
            "EVERYWHERE": (EAGER, OURS),
            "run_contexts": run_contexts,
            "run_units": run_units,
        },
    }.items():
        for name, value in values.items():
            patch.setattr(module, name, value)


# Command → its options.
MEASURING = {
    "cpu": ["--rounds", "1"],
    "grid": ["--rounds", "1"],
    "methods": [],
    "trainer": [],
    "memory": [],
    "kl": [],
    "gpu": ["--deadline", "3600"],
    "profile": [],
}
# In test_frameworks, test_mass_study, test_aot, test_replay and test_compare; the report below.
ELSEWHERE = {"frameworks", "masses", "kernels", "replay", "scaling", "fits", "report", "compare"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What every measuring command leaves."""
    for library in ("trl", "peft", "datasets"):
        pytest.importorskip(library)
    root = tmp_path_factory.mktemp("results")
    with torch.compiler.set_stance("force_eager"), Patch.context() as patch:
        patch.setattr("benchmarks.measuring.gc.collect", lambda: 0)
        shrink(patch)
        for name, options in MEASURING.items():
            folder = root / ("h200" if name == "gpu" else "cpu")
            given = [] if name == "profile" else ["--results", str(folder)]
            assert main([name, *options, *given]) == 0
    yield root


def test_every_command_is_run_by_a_test() -> None:
    (commands,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(commands.choices) == {*MEASURING, *ELSEWHERE}


def by_candidate(content: dict[str, Any]) -> dict[str, Row]:
    return {row["candidate"]: row for row in content["rows"]}


def test_every_command_leaves_its_rows(results: Path) -> None:
    files = load(results / "cpu")
    assert files.keys() == {
        *("head-fp32", "head-bf16", "sweep"),
        *("shares", "rows", "peers", "methods", "trainer", "memory", "kl"),
    }
    statuses = {row["status"] for content in files.values() for row in content["rows"]}
    assert "ok" in statuses and NO_TIME not in statuses
    for name in ("head-fp32", "head-bf16"):
        rows = by_candidate(files[name])
        assert rows.keys() == set(ON_ONE_SHAPE)
        local = rows["ours: local"]
        assert local["rounds"] == local["reused_rounds"] == 1 and local["reused_in_p"] > 0
        assert rows["eager"]["extra_bytes"] == MEMORY.extra
    assert len(files["sweep"]["rows"]) == 2 * 4
    names = {row["candidate"] for content in files.values() for row in content["rows"]}
    assert set(CANDIDATES) < names | {"ours: auto"}
    assert len(files["trainer"]["rows"]) == 2 * len(EVERYWHERE)
    assert by_candidate(files["memory"]).keys() == set(IN_CONTEXT)
    ours = [row for row in files["rows"]["rows"] if row["candidate"].startswith("ours")]
    assert len(ours) == 3 * 4 and {row["status"] for row in ours} == {"ok"}
    assert {row["memory_status"] for row in ours} == {"not measured"}
    assert by_candidate(files["methods"]).keys() == set(measured_losses())
    kls = by_candidate(files["kl"])
    assert kls.keys() == KL_CANDIDATES.keys()
    for row in kls.values():
        assert row["status"] == "ok" and row["extra_bytes"] == 3 * 2**20
        assert row["rounds"] == row["forward_rounds"] == 1
        assert row["in_p"] > 0 and row["forward_in_p"] > 0


def test_the_gpus_command_leaves_its_rows(results: Path) -> None:
    grids = load(results / "h200")
    assert grids.keys() == {"grid", "trainer", "context"}
    found = {(row["candidate"], row["labelled_rows"]): row for row in grids["grid"]["rows"]}
    assert {name for name, _ in found} == {"ours: auto, auto", "TRL", "eager"}
    assert len(found) == 2 + 1 + 1
    for row in found.values():
        assert row["status"] == "ok" and row["in_p"] > 0
    assert [row["status"] for row in grids["trainer"]["rows"]] == ["ok", "ok"]


def test_a_deadline_leaves_named_rows(tmp_path: Path, monkeypatch: Patch) -> None:
    shrink(monkeypatch)
    assert main(["cpu", "--deadline", "0", "--results", str(tmp_path)]) == 0
    for content in load(tmp_path).values():
        assert {row["status"] for row in content["rows"]} == {NO_TIME}


@pytest.fixture
def places(results: Path, tmp_path: Path) -> list[str]:
    """Options of the report: a copy of the results, and an old README."""
    copy, docs = shutil.copytree(results, tmp_path / "results"), tmp_path / "docs"
    text = f"# Title\n\n{START}\nold\n{END}\n\nAfter.\n"
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    given = ["--readme", tmp_path / "README.md", "--docs", docs, "--page", docs / "kernels.md"]
    given += ["--results", copy / "cpu", "--kernels", KERNELS, "--masses", tmp_path / "absent"]
    return [str(each) for each in given]


def test_the_report_of_everything(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--check", *places]) == 1
    assert capsys.readouterr().out.count("is out of date") == 3
    assert main(["report", *places]) == 0
    capsys.readouterr()
    assert main(["report", "--check", *places]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "README agrees with the results",
        "kernels.md agrees with the results",
        "benchmarks.md agrees with the results",
        "drop_mass.md does not exist: `python -m benchmarks masses` has not been run",
        "scaling.md does not exist: `python -m benchmarks scaling` has not been run",
    ]
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# Title\n\n") and readme.endswith(f"{END}\n\nAfter.\n")
    assert "| ours: local | hidden, head |" in readme and "(results/cpu/sweep.png)" in readme
    page = (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for text in (
        *("## A whole trainer step, CPU", "## A whole trainer step, H200", "## Rows and dtypes"),
        *("## The KL divergence from a reference model", "### Searched on an H200", "## H200"),
        *("(../results/cpu/trainer.png)", "(../results/h200/trainer.png)"),
        *("(../results/cpu/shares.png)", "(../results/h200/rows.png)"),
        *("| gamma-dpo | yes |", "which has 2 pairs"),
    ):
        assert text in page, text
    shown = pictures(tmp_path / "results", tmp_path / "docs" / "benchmarks.md")
    for name in (*shown, *(f"../results/cpu/{name}.png" for name in ("time", "error", "sweep"))):
        assert (tmp_path / "docs" / name).stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "field", "pages"),
    [
        ("head-fp32", "ms", ["README", "benchmarks.md"]),
        ("trainer", "loss", ["benchmarks.md"]),
        ("methods", "ms", ["benchmarks.md"]),
    ],
)
def test_other_figures_make_a_page_out_of_date(
    places: list[str], tmp_path: Path, capsys: Any, name: str, field: str, pages: list[str]
) -> None:
    main(["report", *places])
    path = tmp_path / "results" / "cpu" / f"{name}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["rows"][0][field] += 1000.0
    path.write_text(json.dumps(content), encoding="utf-8")
    capsys.readouterr()
    assert main(["report", "--check", *places]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said if "out of date" in line] == pages


def test_the_report_needs_its_markers() -> None:
    with pytest.raises(ValueError, match="wanted the markers"):
        between("# Title\n", START, END, "text")


def test_a_table_names_who_has_no_figures(results: Path) -> None:
    row = load(results / "cpu")["head-fp32"]["rows"][-1]
    line = head_table([{**row, "status": "unavailable: needs trl"}]).splitlines()[2]
    assert line == "| eager | hidden, head | unavailable: needs trl |  |  |  |  |  |"


def test_the_page_does_without_what_was_not_measured(tmp_path: Path) -> None:
    text = page_text(tmp_path, tmp_path / "benchmarks.md")
    assert "## The longest context" in text and "## H200" not in text


def test_the_measuring_commands_write_where_the_report_reads() -> None:
    defaults = {
        name: make_parser().parse_args([name]).results
        for name in (*MEASURING, "masses", "report")
        if name != "profile"
    }
    assert {path.name for path in defaults.values()} == {"cpu", "h200", "masses"}
    assert defaults["masses"] == make_parser().parse_args(["report"]).masses == MASSES
    assert command_line.PAGE.parent.name == "docs"
