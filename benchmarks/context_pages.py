"""The part of docs/benchmarks.md on the longest contexts: by the memory model, and as searched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.context_search import PRECISION
from benchmarks.counts import WORKSPACE
from benchmarks.longest import CAPACITIES, COMPARED, longest
from benchmarks.results import Row
from benchmarks.shapes import HEADS
from benchmarks.tables import origin, table

_BY_MODEL = f"""\
## The longest context whose head fits

**By the memory model, not measured**: tokens of each sequence of one pair, half of them labelled,
bf16. Weight, hidden states, both gradients (no weight gradient for `stash`, whose head is frozen)
and the extra bytes of the model above; no backbone, whose activations end most contexts first. The
workspace is {WORKSPACE // 2**20} MiB; `local` keeps its probabilities beside it."""
_SEARCHED = f"""\
The same by search with whole steps under the allocator, which may take no more than the capacity:
the longest length that fits, where one that is {PRECISION:.0%} longer does not."""


def context_sections(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The paragraphs.

    Args:
        measured: machine → content of its search.
    """
    parts = [_BY_MODEL, longest_table()]
    for machine, content in measured.items():
        parts += [f"### Searched on an {machine}", _SEARCHED, "Measured on " + origin(content)]
        parts.append(context_table(content["rows"]))
    return parts


def longest_table() -> str:
    """Tokens of a sequence by the model, for each candidate, head and capacity."""
    header = ["candidate", *(f"{head}, {size}" for head in HEADS for size in CAPACITIES)]
    lines = [
        [
            name,
            *(
                f"{longest(name, head, size):,}"
                for head in HEADS.values()
                for size in CAPACITIES.values()
            ),
        ]
        for name in COMPARED
    ]
    return table(header, lines, left=1)


def context_table(rows: Sequence[Row]) -> str:
    """A line for each search."""
    header = ("candidate", "head", "GB", "tokens", "by the model", "ended by", "lengths tried")
    lines = [
        [
            row["candidate"],
            row["shape"],
            f"{row['capacity_bytes'] / 1e9:.0f}",
            _tokens(row),
            "" if row["predicted"] is None else f"{row['predicted']:,}",
            row["ended_by"] if row["status"] == "ok" else "",
            str(row["probes"]),
        ]
        for row in rows
    ]
    return table(header, lines, left=2)


def _tokens(row: Row) -> str:
    if row["status"] == "ok":
        return f"{row['longest']:,}"
    return row["status"] if row["longest"] is None else f"{row['longest']:,} ({row['status']})"
