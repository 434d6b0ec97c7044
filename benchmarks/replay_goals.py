"""What the replay must show, and what its model says cannot be reached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import exp, log

from benchmarks.claims import Claim
from benchmarks.gpu_candidates import DEFAULTS, OF_TRL
from benchmarks.machines import LIBRARY, MACHINES, SQUARE, UNHIDDEN, WIDE, Machine
from benchmarks.peers import HEAD, HIDDEN, NOTHING
from benchmarks.replay import TIGHT, tight_name
from benchmarks.results import Row
from benchmarks.shapes import HEADS, Shape

_MEAN = 0.85
_MIB = 2**20
# Head and machine → milliseconds with a trained head: the field's measured best is 35.1.
_TRAINS = ("llama-3", "H200", 37.0)
# Most P of Llama-3's head, and share of a step that the GPU may wait for the host.
_MOST_P = {NOTHING: 1.12, HIDDEN: 2.25}
_EXPOSED = {"llama-3": 0.02, "qwen2.5-0.5b": 0.10}
# The floor leaves nothing for launches, the host and the rows' own copy.
_OF_FLOOR = 1.04
_SAID = {NOTHING: "no gradient", HIDDEN: "frozen head", HEAD: "head trains"}

Rows = Mapping[tuple[str, str, str], Row]


def goals_of(rows: Sequence[Row]) -> list[Claim]:
    """Every goal with what was predicted; where TRL's time is below the floor of fp32 logits, that
    floor is the goal."""
    found = {(row["gpu"], row["shape"], row["candidate"]): row for row in rows}
    usual = {shape.name: shape.labelled_rows for shape in HEADS.values()}
    default = {key: row for key, row in found.items() if row["labelled_rows"] == usual[key[1]]}
    return [*_beside_trl(default), *_on_its_own(default), *_in_little_memory(rows)]


def floor_ms(machine: Machine, shape: Shape) -> float:
    """Least time of fp32 log-probs: the better of two ways, with launches and the host for nothing.

    Logits that a library's matmul leaves in memory pass through it in fp32, once each way (TRL's
    are bf16, half the bytes); a fused kernel leaves none, but its matmul is slower, and with a
    softcap it has a smaller tile.
    """
    logits = shape.labelled_rows * shape.vocab
    flops = 2 * logits * shape.hidden_size / machine.peak
    in_memory = flops / LIBRARY + (1 + UNHIDDEN) * 4 * logits / machine.bandwidth
    fused = flops / machine.fused[WIDE if shape.softcap is None else SQUARE]
    return 1e3 * min(in_memory, fused)


def _beside_trl(rows: Rows) -> Iterator[Claim]:
    ratios = []
    for machine in MACHINES:
        for shape in HEADS.values():
            for trains in DEFAULTS:
                ours = rows[machine.name, shape.name, DEFAULTS[trains].name]
                trl = rows[machine.name, shape.name, OF_TRL[trains].name]
                ratio = ours["ms"] / trl["ms"]
                ratios.append(ratio)
                name = f"{machine.name}, {shape.name}, {_SAID[trains]}"
                floor = floor_ms(machine, shape)
                if trains == NOTHING and floor > trl["ms"] - trl["exposed_ms"]:
                    text = f"{name}: of the floor of fp32 logits ({ratio:.2f} of TRL's time, which"
                    text += f" is below it), at most {_OF_FLOOR}"
                    yield Claim(text, ours["ms"] / floor, ours["ms"] <= _OF_FLOOR * floor)
                else:
                    yield Claim(f"{name}: of TRL's time, at most 1", ratio, ratio <= 1)
                more = (ours["extra_bytes"] - trl["extra_bytes"]) / _MIB
                yield Claim(f"{name}: MiB more than TRL, at most 0", more, more <= 0)
    mean = exp(sum(map(log, ratios)) / len(ratios))
    yield Claim(f"geometric mean of TRL's time, at most {_MEAN}", mean, mean <= _MEAN)


def _on_its_own(rows: Rows) -> Iterator[Claim]:
    head, gpu, most = _TRAINS
    ms = rows[gpu, head, DEFAULTS[HEAD].name]["ms"]
    yield Claim(f"{gpu}, {head}, head trains: ms, at most {most:g}", ms, ms <= most)
    for machine in MACHINES:
        for trains, limit in _MOST_P.items():
            row = rows[machine.name, "llama-3", DEFAULTS[trains].name]
            # The host has a goal of its own.
            value = (row["ms"] - row["exposed_ms"]) / row["p_ms"]
            name = _SAID[trains]
            text = f"{machine.name}, llama-3, {name}: P of the GPU's own time, at most {limit}"
            yield Claim(text, value, value <= limit)
        for shape, limit in _EXPOSED.items():
            for trains in DEFAULTS:
                row = rows[machine.name, shape, DEFAULTS[trains].name]
                share = row["exposed_ms"] / row["ms"]
                name = _SAID[trains]
                text = f"{machine.name}, {shape}, {name}: share that waits for the host"
                yield Claim(f"{text}, at most {limit:.0%}", share, share <= limit)


def _in_little_memory(rows: Sequence[Row]) -> Iterator[Claim]:
    for row in rows:
        path = row["candidate"].removeprefix("ours: ").partition(" in ")[0]
        if row["candidate"] != tight_name(path):
            continue
        sums = 0 if path == "evaluate" else 4 * row["labelled_rows"] * row["hidden_size"]
        limit = TIGHT + sums / _MIB
        extra = row["extra_bytes"] / _MIB
        text = f"{row['gpu']}, {row['shape']}, {row['labelled_rows']} rows, {path}: MiB"
        yield Claim(f"{text}, at most {limit:.0f}", extra, extra <= limit)
