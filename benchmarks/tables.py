"""Results as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers import CANDIDATES, IN_SWEEP
from benchmarks.results import Row

_MIB = 2**20
_BACKWARD = {"nothing": "none", "hidden": "hidden", "hidden and head": "hidden, head"}


def head_table(rows: Sequence[Row]) -> str:
    """Candidates of one dtype on one shape; who has no figures is named with the reason."""
    header = (
        "candidate",
        "gradients",
        "ms",
        "P",
        "P, memory reused",
        "extra peak MiB",
        "log-prob error (nats)",
        "gradient error",
    )
    known = list(CANDIDATES)
    lines = []
    for row in sorted(rows, key=lambda row: known.index(row["candidate"])):
        name, gradients = row["candidate"], _BACKWARD[row["trains"]]
        if row["status"] != "ok":
            lines.append([name, gradients, row["status"], *[""] * 5])
            continue
        errors = [row[name] for name in ("dhidden_error", "dweight_error")]
        known_errors = [error for error in errors if error is not None]
        ok = row["memory_status"] == "ok"
        lines.append(
            [
                name,
                gradients,
                number(row["ms"], ".0f"),
                spread(row, "in_p", ".2f"),
                number(row["reused_in_p"], ".2f"),
                _mib(row["extra_bytes"]) if ok else row["memory_status"],
                number(row["logp_error"], ".1e"),
                number(max(known_errors, default=None), ".1e"),
            ]
        )
    return table(header, lines, left=2)


def sweep_table(rows: Sequence[Row]) -> str:
    """Extra peak MiB of each candidate, a line per shape."""
    by_size: dict[tuple[int, int], dict[str, Row]] = {}
    for row in rows:
        by_size.setdefault((row["vocab"], row["length"]), {}).setdefault(row["candidate"], row)
    lines = []
    for (vocab, length), by_name in sorted(by_size.items(), key=lambda entry: entry[0][::-1]):
        any_row = next(iter(by_name.values()))
        lines.append(
            [
                str(vocab),
                f"{any_row['sequences']} × {length}",
                *(_sweep_cell(by_name.get(name)) for name in IN_SWEEP),
                _mib(any_row["gradient_bytes"]),
            ]
        )
    header = ("V", "S × T", *IN_SWEEP, "the two gradients")
    return table(header, lines, left=0)


def origin(content: Mapping[str, Any]) -> str:
    """One line: machine, versions, commit and date."""
    machine, versions = content["machine"], content["versions"]
    parts = [
        f"{machine['cpu']} ({machine['instructions']}), {machine['threads']} threads",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"commit {content['commit']}",
        content["date"],
    ]
    return "; ".join(parts) + "."


def _sweep_cell(row: Row | None) -> str:
    if row is None:
        return ""
    return _mib(row["extra_bytes"]) if row["status"] == "ok" else row["status"]


def _mib(size: int | None) -> str:
    # Pages come and go: a peak may lie a few of them below what the gradients alone take.
    return "" if size is None else f"{max(size, 0) / _MIB:.0f}"


def spread(row: Row, name: str, form: str) -> str:
    """A figure and, in brackets, its quartiles."""
    if row[name] is None:
        return ""
    low, high = row[f"{name}_quartiles"]
    return f"{row[name]:{form}} [{low:{form}}, {high:{form}}]"


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    rule = ["---" if column < left else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))
