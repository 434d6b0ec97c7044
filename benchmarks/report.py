"""The README's block and docs/benchmarks.md, from the results, and every page at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import context_memory, counts
from benchmarks.context_memory import PICTURE, ContextMemory, context_block, context_section
from benchmarks.device import MACHINES
from benchmarks.kernel_page import REPLAY, check_page, write_page
from benchmarks.mass_page import NAME, check_mass_page, load_masses, write_mass_page
from benchmarks.results import RESULTS, ROOT, Row, load
from benchmarks.scaling import SCALING, load_scaling
from benchmarks.scaling_page import NAME as SCALING_NAME
from benchmarks.scaling_page import check_scaling, write_scaling
from benchmarks.tables import (
    context_sections,
    framework_section,
    grid_table,
    head_table,
    kl_section,
    measured_on,
    method_section,
    sweep_section,
    time_sentence,
    trainer_section,
)
from fused_prefopt.cli.console import between

README = ROOT.parent / "README.md"
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"


@dataclass(frozen=True)
class Places:
    """Where pages and results are.

    Attributes:
        readme: gets the tables of `results`.
        page: of the kernels.
        docs: folder of benchmarks.md, drop_mass.md and scaling.md.
        results: folder of the CPU's results; those of GPUs lie beside it.
        kernels: folder of what the compiled kernels take.
        masses: folder of the study of `drop_mass`.
    """

    readme: Path
    page: Path
    docs: Path
    results: Path
    kernels: Path
    masses: Path


def write_all(places: Places) -> None:
    """Write every page and picture."""
    results, docs = places.results, places.docs
    write_report(places.readme, results)
    write_page(places.page, places.kernels, results.parent)
    write_benchmarks(docs / "benchmarks.md", results.parent)
    write_mass_page(docs / NAME, places.masses)
    write_scaling(docs / SCALING_NAME, results.parent / SCALING.name)


def check_all(places: Places, say: Callable[[str], None] = print) -> bool:
    """Whether every page shows exactly what the results say."""
    results, docs = places.results, places.docs
    current = {
        "README": check_report(places.readme, results),
        places.page.name: check_page(places.page, places.kernels, results.parent),
        "benchmarks.md": check_benchmarks(docs / "benchmarks.md", results.parent),
        NAME: check_mass_page(docs / NAME, places.masses),
        SCALING_NAME: check_scaling(docs / SCALING_NAME, results.parent / SCALING.name),
    }
    missing = {} if load_masses(places.masses) else {NAME: "masses"}
    missing |= {} if load_scaling(results.parent / SCALING.name) else {SCALING_NAME: "scaling"}
    for name, agrees in current.items():
        if name in missing and agrees:
            say(f"{name} does not exist: `python -m benchmarks {missing[name]}` has not been run")
        else:
            say(f"{name} agrees with the results" if agrees else f"{name} is out of date")
    return all(current.values())


def write_report(readme: Path = README, folder: Path = RESULTS / "cpu") -> None:
    """Fill the README's block and draw the pictures beside the results."""
    from benchmarks.pictures import draw_all

    results = load(folder)
    text = _filled_all(readme, folder)
    draw_all(results, folder)
    readme.write_text(text, encoding="utf-8")


def check_report(readme: Path = README, folder: Path = RESULTS / "cpu") -> bool:
    """Whether the README shows exactly what the results say, and its pictures exist."""
    text = readme.read_text(encoding="utf-8")
    pictures = ("time.png", "error.png", "sweep.png")
    return text == _filled_all(readme, folder) and all((folder / p).exists() for p in pictures)


def _filled_all(readme: Path, folder: Path) -> str:
    """README's text with every block that it has.

    Raises:
        ValueError: it has none.
    """
    text, seen = readme.read_text(encoding="utf-8"), _relative(folder, readme)
    shown = _context_memory(folder.parent)
    if shown and context_memory.START in text:
        memory = "\n\n".join([context_block(shown, seen), time_sentence(load(folder))])
        return between(text, context_memory.START, context_memory.END, memory)
    return between(text, START, END, block(load(folder), seen))


def block(results: Mapping[str, Any], folder: str) -> str:
    """The tables and links to the pictures.

    Args:
        results: name → content of a results file.
        folder: where the pictures are, as seen from the page.
    """
    parts = []
    for name in ("head-fp32", "head-bf16"):
        rows = results[name]["rows"]
        parts += [f"**{_title(rows[0])}**", head_table(rows)]
    parts.append(f"![Time in P]({folder}/time.png)\n![Error against float64]({folder}/error.png)")
    sweep = results["sweep"]["rows"]
    size = f"{sweep[0]['dtype']}, D {sweep[0]['hidden_size']}, half of the tokens labelled"
    parts += [
        f"Extra peak memory, beyond the inputs and the two gradients ({size}):",
        f"![Extra peak memory]({folder}/sweep.png)",
        measured_on(results["head-fp32"]),
    ]
    return "\n\n".join(parts)


def _title(row: Mapping[str, Any]) -> str:
    return (
        f"{row['dtype']}: {row['sequences']} × {row['length']} tokens,"
        f" {row['labelled_rows']} labelled, V {row['vocab']}, D {row['hidden_size']}"
    )


def _relative(folder: Path, readme: Path) -> str:
    return Path(os.path.relpath(folder.resolve(), readme.resolve().parent)).as_posix()


_TRAINER = "trainer.png"
BENCHMARKS = ROOT.parent / "docs" / "benchmarks.md"
_BENCHMARKS = """\
# Benchmarks

Written by `python -m benchmarks report` from `benchmarks/results`; edit nothing here.

P is the time of one bare matmul `hidden @ weight.T` over the labelled rows, into an existing
output, measured right before each candidate. Times are medians, brackets hold their quartiles.
Every candidate is compared with float64 before it is timed, on the loss that it computes: who is
wrong, missing or fails is named with the reason instead. A first step and a first forward come
before the timing, so that nothing is compiled or touched for the first time in it. On a CPU the
slower half of a point's steps gets three rounds. *Forward* is a forward that a backward may
follow."""

_HEAD = """\
## A head on every path, CPU

One forward and backward of a DPO step; *memory reused*: in a process that keeps freed memory. Peers
that are faster in bf16 round the logits to bf16."""
_OF_HEAD = ("time", "error", "sweep")
_PREDICTED = """\
## What a GPU would take

**Predictions**, not measurements (kernels.md says how): a step with a large head in bf16, ours
beside TRL's function, in P.

![Predicted times]({path})"""
_COUNTED = """\
## What is counted

{counted}"""


def write_benchmarks(page: Path = BENCHMARKS, results: Path = RESULTS) -> None:
    """Write the page and its pictures."""
    from benchmarks.pictures import draw_replay, draw_rows, draw_shares, draw_trainer

    page.parent.mkdir(parents=True, exist_ok=True)
    grids = _grids(results)
    if "shares" in grids["cpu"]:
        draw_shares(grids["cpu"]["shares"]["rows"], results / "cpu" / "shares.png")
    for folder, content in _files(results, "trainer").items():
        draw_trainer(content["rows"], results / folder / _TRAINER)
    shown = _context_memory(results)
    if shown:
        context_memory.draw_context(shown, results / "cpu" / PICTURE)
    for machine in MACHINES:
        llama = [row for row in _rows(grids[machine.folder]) if _on_rows(row)]
        if llama:
            draw_rows(llama, results / machine.folder / "rows.png")
    predicted = _predicted(results)
    if predicted:
        draw_replay(predicted, results / REPLAY.name / "replay.png")
    page.write_text(page_text(results, page), encoding="utf-8")


def check_benchmarks(page: Path = BENCHMARKS, results: Path = RESULTS) -> bool:
    """Whether the page shows exactly what the results say, and its pictures exist."""
    if not page.exists() or page.read_text(encoding="utf-8") != page_text(results, page):
        return False
    return all((page.parent / name).exists() for name in pictures(results, page))


def pictures(results: Path, page: Path) -> list[str]:
    """Those that the page shows, as seen from it."""
    grids, found = _grids(results), []
    if _predicted(results):
        found.append(_seen(results / REPLAY.name / "replay.png", page))
    if _head(results):
        found += [_seen(results / "cpu" / f"{name}.png", page) for name in _OF_HEAD]
    if "shares" in grids["cpu"]:
        found.append(_seen(results / "cpu" / "shares.png", page))
    for machine in MACHINES:
        if any(_on_rows(row) for row in _rows(grids[machine.folder])):
            found.append(_seen(results / machine.folder / "rows.png", page))
    found += [_seen(results / folder / _TRAINER, page) for folder in _files(results, "trainer")]
    if _context_memory(results):
        found.append(_seen(results / "cpu" / PICTURE, page))
    return found


def page_text(results: Path, page: Path = BENCHMARKS) -> str:
    """The page that results on disk give."""
    grids, shown = _grids(results), pictures(results, page)
    parts = [_BENCHMARKS]
    head = _head(results)
    if head:
        parts += [_HEAD, block(head, _seen(results / "cpu", page))]
    titles = {
        "peers": "Every peer",
        "shares": "Labelled shares, head training and frozen",
        "rows": "Rows and dtypes, head training and frozen",
    }
    for name, title in titles.items():
        if name in grids["cpu"]:
            content = grids["cpu"][name]
            parts += [f"## {title}, CPU", measured_on(content)]
            parts.append(grid_table(content["rows"]))
            parts += [f"![{title}]({path})" for path in shown if path.endswith(f"cpu/{name}.png")]
    sweep = results / "cpu" / "sweep.json"
    if sweep.is_file():
        parts += sweep_section(json.loads(sweep.read_text(encoding="utf-8")))
    for machine in MACHINES:
        for content in grids[machine.folder].values():
            parts += [f"## {machine.name}", measured_on(content)]
            parts.append(grid_table(content["rows"]))
        parts += [
            f"![Rows]({path})" for path in shown if path.endswith(f"{machine.folder}/rows.png")
        ]
    names = _folders()
    for folder, content in _files(results, "trainer").items():
        parts += trainer_section(content, names[folder])
        parts.append(f"![A whole trainer step]({_seen(results / folder / 'trainer.png', page)})")
    shown_memory = _context_memory(results)
    parts += context_section(shown_memory, _seen(results / "cpu", page)) if shown_memory else []
    inside = _files(results, "frameworks").get("cpu")
    parts += framework_section(inside) if inside else []
    divergence = _files(results, "kl").get("cpu")
    parts += kl_section(divergence) if divergence else []
    if "methods" in grids["cpu"]:
        parts += method_section(grids["cpu"]["methods"])
    parts.append(_COUNTED.format(counted=(counts.__doc__ or "").strip()))
    searched = {names[folder]: content for folder, content in _files(results, "context").items()}
    parts += context_sections(searched)
    parts += [_PREDICTED.format(path=path) for path in shown if path.endswith("replay.png")]
    return "\n\n".join(parts) + "\n"


def _context_memory(results: Path) -> ContextMemory | None:
    """What was measured and predicted over the context, where both were."""
    measured = _files(results, "memory").get("cpu")
    recorded = load_scaling(results / SCALING.name).get("heads")
    return ContextMemory.of(measured, recorded["rows"]) if measured and recorded else None


def _head(results: Path) -> Mapping[str, Any]:
    """Content of the CPU's files that the README's block is made of; none where one is missing."""
    found = load(results / "cpu")
    return found if {"head-fp32", "head-bf16", "sweep"} <= found.keys() else {}


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
