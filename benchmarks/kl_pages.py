"""The part of docs/benchmarks.md on the exact KL divergence from a reference model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.results import Row
from benchmarks.tables import number, origin, spread, table

_INTRODUCTION = """\
`sequence_kl` beside eager PyTorch: forward and backward of the KL divergence of a policy from its
reference over the whole vocabulary, in P of one of the two heads."""


def kl_section(content: Mapping[str, Any]) -> list[str]:
    """The paragraphs about the CPU's file."""
    title = "## The KL divergence from a reference model, CPU"
    return [title, _INTRODUCTION, "Measured on " + origin(content), kl_table(content["rows"])]


def kl_table(rows: Sequence[Row]) -> str:
    """A line for each candidate."""
    header = (
        *("candidate", "shape", "dtype", "labelled rows", "forward, P", "P", "extra MiB"),
        *("KL error (nats)", "gradient error"),
    )
    return table(header, [_line(row) for row in rows], left=3)


def _line(row: Row) -> list[str]:
    shape = f"{row['shape']}, {row['sequences']} × {row['length']}"
    about = [row["candidate"], shape, row["dtype"]]
    if row["status"] != "ok":
        return [*about, row["status"], *[""] * 5]
    errors = [row[name] for name in ("dhidden_error", "dweight_error") if row[name] is not None]
    extra = row["extra_bytes"]
    return [
        *about,
        str(row["labelled_rows"]),
        spread(row, "forward_in_p", ".2f"),
        spread(row, "in_p", ".2f"),
        number(None if extra is None else max(extra, 0) / 2**20, ".0f"),
        number(row["kl_error"], ".1e"),
        number(max(errors, default=None), ".1e"),
    ]
