"""docs/kernels.md, from the compiled kernels' results and from what the replay predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernel_results import KERNELS, load_kernels
from benchmarks.machines import MACHINES
from benchmarks.replay_pages import REPLAY, replay_sections
from benchmarks.results import RESULTS, ROOT, Row, load
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
    folders = {machine.folder: results / machine.folder for machine in MACHINES}
    measured = {name: load(path) if path.exists() else {} for name, path in folders.items()}
    parts += replay_sections(results / REPLAY.name, measured)
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


def _origin(content: Mapping[str, Any]) -> str:
    gate = "gated" if content["gated"] else "compiled only, no default is chosen for it"
    limit = f"a program may have {content['shared_limit'] / 1024:.0f} KiB of shared memory"
    return f"Triton {content['triton']}; {gate}; {limit}."


def _short(configuration: str) -> str:
    """Flags by their name where they are set, and not at all where they are not."""
    words = [word for word in configuration.split() if not word.endswith("=False")]
    return " ".join(word.removesuffix("=True") for word in words)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
