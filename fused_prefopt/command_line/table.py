"""Plain text tables."""

from __future__ import annotations

from collections.abc import Sequence


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
