"""What the replay predicts, as a section of docs/kernels.md and a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_candidates import DEFAULTS, OF_TRL
from benchmarks.machines import (
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
from benchmarks.replay_goals import floor_ms, goals_of
from benchmarks.results import RESULTS, Row, load
from benchmarks.shapes import HEADS
from benchmarks.tables import table

REPLAY = RESULTS / "replay"
_INTRODUCTION = """\
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
    """What docs/kernels.md says of predictions; nothing where there are none.

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
    parts = [_INTRODUCTION.format(assumptions=_assumptions(), measured=said)]
    for machine in MACHINES:
        own = [row for row in rows if row["gpu"] == machine.name]
        parts += [f"### {machine.name}", _table(own, measured.get(machine.folder, {}))]
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


def _table(rows: Sequence[Row], measured: Mapping[str, Any]) -> str:
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


def draw_replay(rows: Sequence[Row], path: Path) -> None:
    """Predicted milliseconds of ours and TRL's, a panel a machine."""
    from benchmarks.pictures import FAINT, OURS, STYLE, pyplot, save

    found = {(row["gpu"], row["shape"], row["candidate"], row["sequences"]): row for row in rows}
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(len(MACHINES), 1, figsize=(8.5, 6.0))
        for panel, machine in zip(axes, MACHINES, strict=True):
            steps = [(shape, trains) for shape in HEADS.values() for trains in DEFAULTS]
            for side, (names, colour) in enumerate(((DEFAULTS, OURS), (OF_TRL, "#d1782f"))):
                keys = [(machine.name, s.name, names[t].name, s.sequences) for s, t in steps]
                times = [found[key]["ms"] / found[key]["p_ms"] for key in keys]
                places = [place + 0.4 * side for place in range(len(steps))]
                panel.bar(places, times, 0.4, color=colour, label=("ours", "TRL")[side])
            named = [f"{shape.name}\n{trains}" for shape, trains in steps]
            panel.set_xticks([place + 0.2 for place in range(len(named))], named, fontsize=7)
            panel.set_title(machine.name)
            panel.set_ylabel("predicted time of a step, in P")
            panel.grid(axis="y", color=FAINT)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=2, frameon=False)
        save(figure, path, top=0.94)
