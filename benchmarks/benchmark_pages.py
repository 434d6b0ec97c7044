"""docs/benchmarks.md, from the results on disk and from what is counted."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.context_pages import context_sections
from benchmarks.counts import __doc__ as counted
from benchmarks.kl_pages import kl_section
from benchmarks.machines import MACHINES
from benchmarks.method_cost import GOAL, PAIRS
from benchmarks.replay_pages import REPLAY, draw_replay
from benchmarks.results import RESULTS, ROOT, Row, load
from benchmarks.tables import number, origin, spread, sweep_table, table
from benchmarks.trainer_pages import PICTURE as TRAINER
from benchmarks.trainer_pages import draw_trainer, trainer_section

PAGE = ROOT.parent / "docs" / "benchmarks.md"
_INTRODUCTION = """\
# Benchmarks

Written by `python -m benchmarks report` from `benchmarks/results`; edit nothing here.

P is the time of one bare matmul `hidden @ weight.T` over the labelled rows, into an existing
output, measured right before each candidate. Times are medians, brackets hold their quartiles.
Every candidate is compared with float64 before it is timed, on the loss that it computes: who is
wrong, missing or fails is named with the reason instead. A first step and a first forward come
before the timing, so that nothing is compiled or touched for the first time in it. On a CPU the
slower half of a point's steps gets three rounds. *Forward* is a forward that a backward may
follow."""
_METHODS = """\
## What the loss itself takes

Loss and statistics of {pairs} pairs, forward and backward, as a share of the step of the op
(`local`, {shape} shape, fp32, torch engine, one run), which has {step_pairs} pairs. The goal is
{goal:.2%}."""
_PREDICTED = """\
## What a GPU would take

**Predictions**, not measurements (kernels.md says how): a step with a large head in bf16, ours
beside TRL's function, in P.

![Predicted times]({path})"""
_COUNTED = """\
## What is counted

{counted}"""


def write_benchmarks(page: Path = PAGE, results: Path = RESULTS) -> None:
    """Write the page and its pictures."""
    from benchmarks.grid_pictures import draw_rows, draw_shares

    page.parent.mkdir(parents=True, exist_ok=True)
    grids = _grids(results)
    if "shares" in grids["cpu"]:
        draw_shares(grids["cpu"]["shares"]["rows"], results / "cpu" / "shares.png")
    for folder, content in _files(results, "trainer").items():
        draw_trainer(content["rows"], results / folder / TRAINER)
    for machine in MACHINES:
        llama = [row for row in _rows(grids[machine.folder]) if _on_rows(row)]
        if llama:
            draw_rows(llama, results / machine.folder / "rows.png")
    predicted = _predicted(results)
    if predicted:
        draw_replay(predicted, results / REPLAY.name / "replay.png")
    page.write_text(page_text(results, page), encoding="utf-8")


def check_benchmarks(page: Path = PAGE, results: Path = RESULTS) -> bool:
    """Whether the page shows exactly what the results say, and its pictures exist."""
    if not page.exists() or page.read_text(encoding="utf-8") != page_text(results, page):
        return False
    return all((page.parent / name).exists() for name in pictures(results, page))


def pictures(results: Path, page: Path) -> list[str]:
    """Those that the page shows, as seen from it."""
    grids, found = _grids(results), []
    if _predicted(results):
        found.append(_seen(results / REPLAY.name / "replay.png", page))
    if "shares" in grids["cpu"]:
        found.append(_seen(results / "cpu" / "shares.png", page))
    for machine in MACHINES:
        if any(_on_rows(row) for row in _rows(grids[machine.folder])):
            found.append(_seen(results / machine.folder / "rows.png", page))
    found += [_seen(results / folder / TRAINER, page) for folder in _files(results, "trainer")]
    return found


_SWEEP = """## Memory over the vocabulary and the length, CPU

Extra peak MiB of a forward and backward in fp32, D 256, half of the tokens labelled, beyond the
inputs and the two gradients."""


def page_text(results: Path, page: Path = PAGE) -> str:
    """The page that results on disk give."""
    grids, shown = _grids(results), pictures(results, page)
    parts = [_INTRODUCTION]
    titles = {
        "peers": "Every peer",
        "shares": "Labelled shares, head training and frozen",
        "rows": "Rows and dtypes, head training and frozen",
    }
    for name, title in titles.items():
        if name in grids["cpu"]:
            content = grids["cpu"][name]
            parts += [f"## {title}, CPU", "Measured on " + origin(content)]
            parts.append(grid_table(content["rows"]))
            parts += [f"![{title}]({path})" for path in shown if path.endswith(f"cpu/{name}.png")]
    sweep = results / "cpu" / "sweep.json"
    if sweep.is_file():
        content = json.loads(sweep.read_text(encoding="utf-8"))
        parts += [_SWEEP, "Measured on " + origin(content), sweep_table(content["rows"])]
    for machine in MACHINES:
        for content in grids[machine.folder].values():
            parts += [f"## {machine.name}", "Measured on " + origin(content)]
            parts.append(grid_table(content["rows"]))
        parts += [
            f"![Rows]({path})" for path in shown if path.endswith(f"{machine.folder}/rows.png")
        ]
    names = _folders()
    for folder, content in _files(results, "trainer").items():
        parts += trainer_section(content, names[folder])
        parts.append(f"![A whole trainer step]({_seen(results / folder / TRAINER, page)})")
    divergence = _files(results, "kl").get("cpu")
    parts += kl_section(divergence) if divergence else []
    if "methods" in grids["cpu"]:
        content = grids["cpu"]["methods"]
        first = content["rows"][0]
        about = {"shape": first["shape"], "step_pairs": first["sequences"] // 2}
        parts.append(_METHODS.format(pairs=PAIRS, goal=GOAL, **about))
        parts += ["Measured on " + origin(content), method_table(content["rows"])]
    parts.append(_COUNTED.format(counted=(counted or "").strip()))
    searched = {names[folder]: content for folder, content in _files(results, "context").items()}
    parts += context_sections(searched)
    parts += [_PREDICTED.format(path=path) for path in shown if path.endswith("replay.png")]
    return "\n\n".join(parts) + "\n"


def grid_table(rows: Sequence[Row]) -> str:
    """A line for each row, in the order in which they were measured."""
    header = (
        "candidate",
        "loss",
        "shape",
        "dtype",
        "gradients",
        "labelled rows",
        "forward, P",
        "P",
        "ms",
        "extra MiB",
        "log-prob error (nats)",
        "gradient error",
        "GFLOP",
        "GB moved",
    )
    return table(header, [_grid_line(row) for row in rows], left=5)


def _grid_line(row: Row) -> list[str]:
    shape = f"{row['shape']}, {row['sequences']} × {row['length']}"
    about = [row["candidate"], row["objective"], shape, row["dtype"], row["trains"]]
    about.append(str(row["labelled_rows"]))
    if row["status"] != "ok":
        return [*about, row["status"], *[""] * 7]
    errors = [row[name] for name in ("dhidden_error", "dweight_error") if row[name] is not None]
    extra = row["extra_bytes"]
    return [
        *about,
        number(row["forward_in_p"], ".2f"),
        spread(row, "in_p", ".2f"),
        number(row["ms"], ".1f"),
        row["memory_status"] if extra is None else f"{max(extra, 0) / 2**20:.0f}",
        number(row["logp_error"], ".1e"),
        number(max(errors, default=None), ".1e"),
        number(row["flops"] and row["flops"] / 1e9, ".0f"),
        number(row["bytes"] and row["bytes"] / 1e9, ".2f"),
    ]


def method_table(rows: Sequence[Row]) -> str:
    """A line for each loss."""
    header = ("loss", "keeps a statistic", "ms", "of a step of ms", "share", "within the goal")
    lines = [
        [
            row["candidate"],
            "yes" if row["stateful"] else "no",
            f"{row['ms']:.3f} [{row['ms_quartiles'][0]:.3f}, {row['ms_quartiles'][1]:.3f}]",
            f"{row['step_ms']:.0f}",
            f"{row['share']:.3%}",
            "yes" if row["share"] <= GOAL else "no",
        ]
        for row in rows
    ]
    return table(header, lines, left=2)


def _predicted(results: Path) -> list[Row]:
    """Rows of the replay."""
    folder = results / REPLAY.name
    content = load(folder).get("replay") if folder.exists() else None
    return [] if content is None else list(content["rows"])


def _grids(results: Path) -> dict[str, Mapping[str, Any]]:
    """Folder → name → content, for the CPU and each GPU; empty where nothing was measured."""
    contents = {name: load(results / name) for name in _folders()}
    kept = ("grid", "method")
    return {
        name: {key: value for key, value in files.items() if value["section"] in kept}
        for name, files in contents.items()
    }


def _files(results: Path, name: str) -> dict[str, Mapping[str, Any]]:
    """Folder → content of its file of that name, where there is one."""
    paths = {folder: results / folder / f"{name}.json" for folder in _folders()}
    return {key: json.loads(p.read_text("utf-8")) for key, p in paths.items() if p.is_file()}


def _folders() -> dict[str, str]:
    """Folder → machine."""
    return {"cpu": "CPU", **{machine.folder: machine.name for machine in MACHINES}}


def _rows(files: Mapping[str, Any]) -> list[Row]:
    return [row for content in files.values() for row in content["rows"]]


def _on_rows(row: Row) -> bool:
    """Whether a row belongs to the sweep over rows: Llama-3's head, half labelled, bf16."""
    half = 2 * row["labelled_rows"] == row["sequences"] * row["length"]
    return row["shape"] == "llama-3" and row["dtype"] == "bf16" and half


def _seen(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path.resolve(), page.resolve().parent)).as_posix()
