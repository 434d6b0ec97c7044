"""docs/kernels.md, from the compiled kernels' results and from what the replay predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare import floor_ms, goals_of
from benchmarks.device import (
    GAP,
    LIBRARY,
    LIBRARY_CALL,
    LIBRARY_TILES,
    MACHINES,
    SMALL_TILE,
    SQUARE,
    TRITON_LAUNCH,
    UNHIDDEN,
    WIDE,
    Machine,
)
from benchmarks.kernel_proofs import PROOFS, proofs_section
from benchmarks.results import KERNELS, RESULTS, ROOT, Row, load, load_kernels
from benchmarks.shapes import HEADS
from benchmarks.tables import table

PAGE = ROOT.parent / "docs" / "kernels.md"
_TITLE = """\
# Kernels

Written by `python -m benchmarks report` from `kernels` and `proofs` in `benchmarks/results`; edit
nothing here."""
_USAGE = """\
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
    folders = {machine.folder: results / machine.folder for machine in MACHINES}
    measured = {name: load(path) if path.exists() else {} for name, path in folders.items()}
    proofs = proofs_section(results / PROOFS.relative_to(RESULTS), contents, any(measured.values()))
    parts = [_TITLE, proofs, _USAGE]
    # What is gated first.
    for content in sorted(contents.values(), key=lambda content: not content["gated"]):
        parts += [f"### {content['target']}", _origin(content), usage_table(content["rows"])]
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


REPLAY = RESULTS / "replay"
_PREDICTIONS = """\
## Predicted times

**Predictions, not measurements**: forward and backward of a DPO step in bf16, 8 × 2048 tokens, half
of them labelled. `python -m benchmarks replay` runs the real code of ours, of TRL's function and of
Liger's loss on tensors without data, records every library call and launch with its bytes, and
plays them on models of two GPUs, the host on a timeline of its own (its Python measured on one
core, with mocked launches). P is the bare matmul in the same model. *Extra* is the peak of what the
step allocates, without the gradients that it returns. {measured}

What is assumed:

{assumptions}

Rows whose reference does not move are not rescaled: nothing is counted for the others. Ours is told
the number of labelled rows, as trainers tell it; TRL's function finds its rows by a mask, which
waits for the GPU. Liger's losses are counted by their matmuls alone: what a compiler would fuse is
not held against them."""
_GOALS = """\
### What it was built for

A log-prob here is exact to fp32: logits leave the matmul in fp32, and a step that has to pass them
through memory cannot be faster than that takes, {floors}. TRL passes bf16 logits, half the bytes,
and loses up to 0.3 nats a sequence. Where its time is below that floor, ours is held to the
floor."""


def replay_sections(folder: Path, measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Paragraphs of docs/kernels.md on predictions; none where there are none.

    Args:
        folder: of the replay's results.
        measured: folder of a machine → its results by name.
    """
    contents = load(folder) if folder.exists() else {}
    if "replay" not in contents:
        return []
    rows = contents["replay"]["rows"]
    has = any(measured.values())
    said = "Measured times stand beside them." if has else "No GPU has run these kernels yet."
    parts = [_PREDICTIONS.format(assumptions=_assumptions(), measured=said)]
    for machine in MACHINES:
        own = [row for row in rows if row["gpu"] == machine.name]
        parts += [f"### {machine.name}", _predicted_table(own, measured.get(machine.folder, {}))]
    floors = ", ".join(
        f"{floor_ms(machine, shape):.1f} ms ({shape.name}, {machine.name})"
        for machine in MACHINES
        for shape in HEADS.values()
    )
    claims = "\n".join(f"- {claim}" for claim in goals_of(rows))
    return [*parts, _GOALS.format(floors=floors), claims]


def _assumptions() -> str:
    """The constants of the model."""

    def of_each(value: Callable[[Machine], str]) -> list[str]:
        return [value(machine) for machine in MACHINES]

    tiles = ", ".join(f"{rows} × {columns}" for rows, columns, _ in LIBRARY_TILES)
    lines = {
        "bf16 peak, TFLOP/s; multiprocessors": of_each(
            lambda gpu: f"{gpu.peak / 1e12:g}; {gpu.processors}"
        ),
        f"library matmul, share of the peak, in whole waves of the best of {tiles} tiles (the last"
        f" at {SMALL_TILE} of it)": of_each(lambda gpu: f"{LIBRARY:.2f}"),
        "matmul inside a Triton kernel, 128 × 256 tile / 128 × 128 tile, share of the peak": (
            of_each(lambda gpu: f"{gpu.fused[WIDE]} / {gpu.fused[SQUARE]}")
        ),
        "memory bandwidth, TB/s": of_each(lambda gpu: f"{gpu.bandwidth / 1e12:g}"),
        "a buffer of up to this, MB, that the next launch reads costs half of its traffic": (
            of_each(lambda gpu: f"{gpu.cached / 1e6:g}")
        ),
        "share of a matmul's output traffic (read and write where it accumulates) that its own work"
        " does not hide": of_each(lambda gpu: f"{UNHIDDEN}"),
        "gap between launches, µs": of_each(lambda gpu: f"{1e6 * GAP:g}"),
        "host, beside its measured Python: a library call / a Triton launch, µs": of_each(
            lambda gpu: f"{1e6 * LIBRARY_CALL:g} / {1e6 * TRITON_LAUNCH:g}"
        ),
    }
    header = ("", *(machine.name for machine in MACHINES))
    return table(header, [[name, *values] for name, values in lines.items()], left=1)


def _predicted_table(rows: Sequence[Row], measured: Mapping[str, Any]) -> str:
    header = ["candidate", "head", "labelled rows", "ms", "P", "launches", "GB moved"]
    header += ["waits for the host, ms", "extra MiB"]
    if measured:
        header.append("measured ms")
    lines = []
    for row in rows:
        exposed = row["exposed_ms"]
        line = [row["candidate"], row["shape"], str(row["labelled_rows"]), f"{row['ms']:.2f}"]
        line += [f"{row['in_p']:.2f}", str(row["launches"]), f"{row['moved_bytes'] / 1e9:.1f}"]
        line += ["" if exposed is None else f"{exposed:.2f}"]
        line.append(f"{row['extra_bytes'] / 2**20:.0f}")
        if measured:
            line.append(next((f"{ms:.2f}" for ms in _measurements(row, measured)), ""))
        lines.append(line)
    return table(tuple(header), lines, left=2)


def _measurements(row: Row, measured: Mapping[str, Any]) -> Iterator[float]:
    """Of the same candidate on the same shape."""
    names = ("candidate", "shape", "sequences", "length", "labelled_rows", "dtype")
    for content in measured.values():
        for other in content["rows"] if content["section"] in ("head", "grid") else ():
            same = all(other[name] == row[name] for name in names)
            if same and other["status"] == "ok" and other["ms"] is not None:
                yield other["ms"]
