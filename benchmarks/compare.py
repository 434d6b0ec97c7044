"""Claims on what was measured and predicted, each with its limit, and what became worse.

The replay's goals are claims too; its model says which of them cannot be reached.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Any

from benchmarks.candidates import DEFAULTS, HEAD, HIDDEN, NOTHING, OF_TRL, TIGHT, tight_name
from benchmarks.device import LIBRARY, MACHINES, SQUARE, UNHIDDEN, WIDE, Machine
from benchmarks.results import Row, check, row_key
from benchmarks.shapes import HEADS, Shape
from benchmarks.trainers import EAGER, LIGER, OURS, TRL

# Time of our paths in P, fp32.
_MOST_P = {
    "ours: evaluate": 1.25,
    "ours: stash": 2.6,
    "ours: local": 3.7,
    "ours: half kept": 4.1,
    "ours: recompute": 4.6,
}
# Dtype, peer, and how many times faster `local` must be.
_FASTER = (("fp32", "TRL", 2.5), ("fp32", "Liger", 3.0), ("bf16", "TRL", 4.0))
# Extra memory of `local`, as a share of the peer's, fp32.
_LESS_MEMORY = {"eager": 0.3, "TRL": 1.0}


@dataclass(frozen=True)
class Claim:
    """One statement with its figure; `value` is None where a row gives none.

    Attributes:
        text: what is stated, its limit included.
        value: what was measured.
        holds: whether it is within the limit.
    """

    text: str
    value: float | None
    holds: bool

    def __str__(self) -> str:
        value = "no figure" if self.value is None else f"{self.value:.2f}"
        return f"{'holds ' if self.holds else 'MISSED'}  {self.text}: {value}"


def claims_of(rows: Mapping[str, Mapping[str, Row]]) -> list[Claim]:
    """Check every claim.

    Args:
        rows: dtype → candidate → row of the section `head`.
    """
    claims = [
        _most(f"fp32, {name}: time <= {limit} P", _figure(rows["fp32"], name, "in_p"), limit)
        for name, limit in _MOST_P.items()
    ]
    for dtype, peer, limit in _FASTER:
        times = _ratio(rows[dtype], peer, "ours: local", "in_p")
        text = f"{dtype}, ours: local: {limit} times as fast as {peer}"
        claims.append(Claim(text, times, times is not None and times >= limit))
    for peer, limit in _LESS_MEMORY.items():
        share = _ratio(rows["fp32"], "ours: local", peer, "extra_bytes")
        claims.append(_most(f"fp32, ours: local: memory <= {limit} of {peer}'s", share, limit))
    return claims


# Memory of a whole trainer step with ours at the longest measured context, as a share of others'.
_OF_STEP = {TRL: 0.35, LIGER: 0.25, EAGER: 0.2}


def context_claims(rows: Sequence[Row]) -> list[Claim]:
    """Check what is claimed of a step's memory over its context, on rows of memory.json."""
    length = max(row["length"] for row in rows)
    found = {row["candidate"]: row for row in rows if row["length"] == length}
    return [
        _most(
            f"{length} tokens, a step with ours: memory <= {limit} of {peer}'s",
            _ratio(found, OURS, peer, "extra_bytes"),
            limit,
        )
        for peer, limit in _OF_STEP.items()
    ]


def _most(text: str, value: float | None, limit: float) -> Claim:
    return Claim(text, value, value is not None and value <= limit)


def _figure(rows: Mapping[str, Row], name: str, field: str) -> float | None:
    return rows[name][field] if name in rows else None


def _ratio(rows: Mapping[str, Row], above: str, below: str, field: str) -> float | None:
    numerator, denominator = _figure(rows, above, field), _figure(rows, below, field)
    if numerator is None or denominator is None:
        return None
    return numerator / denominator


# Of the replay: the geometric mean of TRL's time.
_MEAN = 0.85
_MIB = 2**20
# Head and machine → milliseconds with a trained head: the field's measured best is 35.1.
_TRAINS = ("llama-3", "H200", 37.0)
# Most P of Llama-3's head, and share of a step that the GPU may wait for the host.
_MOST_P_OF_GPU = {NOTHING: 1.12, HIDDEN: 2.25}
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
        for trains, limit in _MOST_P_OF_GPU.items():
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


# A time is worse where the quartiles do not overlap and the medians differ by more than this.
_TIME = 1.05
# Allocators round, and pages come and go.
_MEMORY, _MEMORY_BYTES = 1.05, 4 * 2**20
# A search ends where two lengths are as near as this.
_LENGTH = 1.07
# Another order of a sum changes an error by less.
_ERROR = 2.0
_TIMES = ("in_p", "reused_in_p", "forward_in_p")
_ERRORS = ("logp_error", "dhidden_error", "dweight_error")


@dataclass(frozen=True)
class Change:
    """One figure that became worse.

    Attributes:
        row: which row, in words.
        field: which figure.
        before, after: its values.
    """

    row: str
    field: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.row}: {self.field}: {_shown(self.before)} -> {_shown(self.after)}"


def compare_files(before: Path, after: Path) -> list[Change]:
    """Regressions from one file to another.

    Raises:
        ValueError: a file is no results file, or the two hold different sections.
    """
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in (before, after)]
    for content in contents:
        check(content)
    if contents[0]["section"] != contents[1]["section"]:
        sections = " and ".join(content["section"] for content in contents)
        raise ValueError(f"section: got {sections}, wanted the same one twice")
    return compare(contents[0], contents[1])


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Regressions between the contents of two results files; a row that is gone is one too."""
    found = {row_key(row): row for row in after["rows"]}
    changes: list[Change] = []
    for row in before["rows"]:
        name = ", ".join(str(part) for part in row_key(row) if part is not None)
        other = found.get(row_key(row))
        if other is None:
            changes.append(Change(name, "row", "measured", "missing"))
        elif row["status"] == "ok" and other["status"] != "ok":
            changes.append(Change(name, "status", "ok", other["status"]))
        elif row["status"] == "ok":
            worse = _worse(row, other)
            changes += [Change(name, field, row[field], other[field]) for field in worse]
    return changes


def _worse(before: Row, after: Row) -> Iterator[str]:
    # Without P beside it a time counts where its spread is known.
    for name in (*_TIMES, *(["ms"] if "ms_quartiles" in before else [])):
        if _both(before, after, name) and _slower(before, after, name):
            yield name
    if _both(before, after, "extra_bytes"):
        limit = max(_MEMORY * before["extra_bytes"], before["extra_bytes"] + _MEMORY_BYTES)
        if after["extra_bytes"] > limit:
            yield "extra_bytes"
    if _both(before, after, "longest") and after["longest"] < before["longest"] / _LENGTH:
        yield "longest"
    for name in _ERRORS:
        if _both(before, after, name) and after[name] > _ERROR * before[name]:
            yield name


def _slower(before: Row, after: Row, name: str) -> bool:
    spread, later = (row.get(f"{name}_quartiles") for row in (before, after))
    apart = spread is None or later is None or later[0] > spread[1]
    return apart and after[name] > _TIME * before[name]


def _both(before: Row, after: Row, name: str) -> bool:
    return before.get(name) is not None and after.get(name) is not None


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
