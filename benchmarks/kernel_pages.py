"""docs/kernels.md, from the compiled kernels' results and the predictions that use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.kernel_results import KERNELS, load_kernels
from benchmarks.machines import ASSUMPTIONS, MACHINES, Machine
from benchmarks.results import RESULTS, ROOT, Row, load
from benchmarks.roofline import (
    ENGINES,
    PATHS,
    TILE_CASES,
    FusedTile,
    bare_matmul,
    fused_tiles,
    predict,
)
from benchmarks.shapes import HEADS, Shape
from benchmarks.tables import table

PAGE = ROOT.parent / "docs" / "kernels.md"
_INTRODUCTION = """\
# Kernels

Written by `python -m benchmarks report` from `benchmarks/results/kernels`; edit nothing here.

## What they take of a GPU

Each kernel as its launcher launches it on Llama-3's head, compiled ahead of time and read from the
binary: registers of a thread, spill instructions and bytes of stack in the machine code, shared
memory of a program, and how often matrix and asynchronous copy instructions stand in the code
(loops are counted once). `python -m benchmarks kernels` compiles them again; it fails where a
kernel spills, uses stack or takes more shared memory than a program may have, on a gated target.
Cases named *largest* are the most that one program takes: they are shown, not gated."""
_PREDICTED = """\
## Predicted times

**Predictions, not measurements**: forward and backward of {rows} labelled rows in bf16, from matmul
rates, memory passes and tile counts. `cublas` multiplies with the vendor's library and keeps fp32
logits in slabs; `triton` computes the logits in fused tile kernels. P is the library's bare matmul
in the same model. The binding resource is what most of the time goes to; beside it, the share of
the time that goes to steps bound by memory.

What is assumed:

{assumptions}"""


def write_page(page: Path = PAGE, kernels: Path = KERNELS, results: Path = RESULTS) -> None:
    """Write the page."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(page_text(kernels, results), encoding="utf-8")


def check_page(page: Path = PAGE, kernels: Path = KERNELS, results: Path = RESULTS) -> bool:
    """Whether the page shows exactly what the results say."""
    return page.exists() and page.read_text(encoding="utf-8") == page_text(kernels, results)


def page_text(kernels: Path, results: Path) -> str:
    """The page that results on disk give."""
    contents = load_kernels(kernels)
    parts = [_INTRODUCTION]
    # What is gated first.
    for content in sorted(contents.values(), key=lambda content: not content["gated"]):
        parts += [f"### {content['target']}", _origin(content), usage_table(content["rows"])]
    rows = {shape.labelled_rows for shape in HEADS.values()}
    counted = ", ".join(map(str, sorted(rows)))
    parts.append(_PREDICTED.format(rows=counted, assumptions=ASSUMPTIONS))
    for machine in MACHINES:
        fused = fused_tiles(contents, machine)
        folder = results / machine.folder
        measured = load(folder) if folder.exists() else {}
        parts += [f"### {machine.name}", _units(machine, fused)]
        parts.append(prediction_table(machine, fused, measured))
    return "\n\n".join(parts) + "\n"


def usage_table(rows: Sequence[Row]) -> str:
    """A line for each kernel and configuration; dtypes that take the same share one."""
    header = (
        "case",
        "kernel",
        "dtype",
        "configuration",
        "registers",
        "spills",
        "stack",
        "shared KiB",
        "matrix instructions",
        "async copies",
    )
    dtypes: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        dtypes.setdefault(_cells(row), []).append(row["dtype"])
    lines = [[*key[:2], ", ".join(names), *key[2:]] for key, names in dtypes.items()]
    return table(header, lines, left=4)


def _cells(row: Row) -> tuple[str, ...]:
    """A row's cells but for its dtype."""
    named = (row["case"], f"`{row['kernel']}`")
    if row["status"] != "ok":
        return (*named, _short(row["configuration"]), row["status"], *[""] * 5)
    warps = f"{row['warps']} warp" + "s" * (row["warps"] > 1)
    launched = f"{warps}, {row['stages']} stages; {_short(row['configuration'])}"
    numbers = [str(row[name]) for name in ("registers", "spills", "stack")]
    counts = [_counted(row["matrix"]), _counted(row["copies"])]
    return (*named, launched, *numbers, f"{row['shared'] / 1024:.1f}", *counts)


def prediction_table(
    machine: Machine, fused: Mapping[str, FusedTile], measured: Mapping[str, Any]
) -> str:
    """A line for each head, path and engine; measurements beside them where there are any."""
    header = ["head", "path", "engine", "bound by", "in memory", "ms", "P"]
    if measured:
        header += ["measured ms", "measured P"]
    lines = []
    for shape, path, engine in product(HEADS.values(), PATHS, ENGINES):
        found = predict(machine, shape, path, engine, fused)
        share = f"{found.memory_share:.0%}"
        line = [shape.name, path, engine, found.bound, share]
        line += [f"{found.ms:.2f}", f"{found.in_p:.2f}"]
        if measured:
            row = measurement(measured, shape, path, engine)
            line += ["", ""] if row is None else [f"{row['ms']:.2f}", f"{row['in_p']:.2f}"]
        lines.append(line)
    return table(header, lines, left=4)


def measurement(
    results: Mapping[str, Any], shape: Shape, path: str, engine: str
) -> Mapping[str, Any] | None:
    """The measured row of "ours: path, engine" on a head, or None."""
    for content in results.values():
        for row in content["rows"] if content["section"] in ("head", "grid") else ():
            named = row["candidate"] == f"ours: {path}, {engine}"
            same = (row["shape"], row["labelled_rows"]) == (shape.name, shape.labelled_rows)
            if named and same and row["dtype"] == "bf16" and row["status"] == "ok":
                return row
    return None


def _origin(content: Mapping[str, Any]) -> str:
    gate = "gated" if content["gated"] else "compiled only, no default is chosen for it"
    limit = f"a program may have {content['shared_limit'] / 1024:.0f} KiB of shared memory"
    return f"Triton {content['triton']}; {gate}; {limit}."


def _units(machine: Machine, fused: Mapping[str, FusedTile]) -> str:
    """P of each head in ms, and how many fused programs share a multiprocessor."""
    units = ", ".join(f"{x.name} {1e3 * bare_matmul(machine, x):.2f} ms" for x in HEADS.values())
    tiles = ", ".join(
        f"{tile.resident} of {TILE_CASES[kind]} ({tile.rows} × {tile.vocab})"
        for kind, tile in fused.items()
    )
    return f"Predicted P: {units}. Programs (tiles) that share a multiprocessor: {tiles}."


def _short(configuration: str) -> str:
    """Flags by their name where they are set, and not at all where they are not."""
    words = [word for word in configuration.split() if not word.endswith("=False")]
    return " ".join(word.removesuffix("=True") for word in words)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
