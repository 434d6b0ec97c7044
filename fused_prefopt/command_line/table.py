"""Plain text tables."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import zip_longest


def text_table(heading: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """Columns as wide as their widest cell, two spaces apart, a rule below the heading.

    Args:
        heading: names of the columns.
        rows: as many cells each.
        numbers: all columns but the first are numbers, which end below one another.
    """
    lines = [heading, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    padded = [
        "  ".join(
            cell.rjust(width) if numbers and column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([padded[0], "-" * max(map(len, padded)), *padded[1:]])


def wrapped(rows: Sequence[Sequence[str]], widths: Sequence[int | None]) -> list[tuple[str, ...]]:
    """Rows whose long cells go on in rows below them.

    Args:
        rows: cells of one line each; words are never broken.
        widths: of the columns in characters; None leaves a column as it is.
    """
    found: list[tuple[str, ...]] = []
    for row in rows:
        cells = [
            [cell] if width is None else _lines(cell, width)
            for cell, width in zip(row, widths, strict=True)
        ]
        found += zip_longest(*cells, fillvalue="")
    return found


def _lines(cell: str, width: int) -> list[str]:
    return textwrap.wrap(cell, width, break_long_words=False, break_on_hyphens=False)
