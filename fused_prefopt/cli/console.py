"""Plain tables, and errors that a user can put right: how every command speaks.

Tables are a few lines here, of no library: `losses` and the table of `report` are also for those
who have torch alone, and tabulate pads each Markdown cell to the widest of its column, so that one
changed cell would change a whole page. A training's bar stays that of transformers' trainer, which
evaluations and the reference pass share; rich's would stand beside it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest

from fused_prefopt import checks


class UserError(Exception):
    """A command cannot do what it was asked to; the message says what it needs."""


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Turn the errors of bad input inside the block into a `UserError`.

    Args:
        what: the key, option or file that is to blame if anything is; begins the message.

    Raises:
        UserError: instead of ValueError, TypeError, OSError or ImportError.
    """
    try:
        yield
    except BrokenPipeError:  # an OSError, of whoever reads the output
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        said = str(error)
        raise UserError(said if said.startswith(f"{what}:") else f"{what}: {said}") from error


def require_packages(who: str, *packages: str) -> None:
    """Raise UserError, saying what to install, unless all the packages are there.

    Args:
        who: what needs them, for the message.
        *packages: names to import.
    """
    try:
        checks.require_packages(who, *packages)
    except ImportError as error:
        raise UserError(str(error)) from error


def text_table(heading: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """Columns as wide as their widest cell, two spaces apart, a rule below the heading.

    Args:
        heading: names of the columns.
        rows: as many cells each.
        numbers: all columns but the first are numbers, which end below one another.
    """
    lines = [heading, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
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
            [cell]
            if width is None
            else textwrap.wrap(cell, width, break_long_words=False, break_on_hyphens=False)
            for cell, width in zip(row, widths, strict=True)
        ]
        found += zip_longest(*cells, fillvalue="")
    return found


def markdown_table(
    heading: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False
) -> str:
    """A table of a page.

    Args:
        heading: names of the columns.
        rows: as many cells each; a `|` in them is escaped.
        numbers: all columns but the first end at their right edge.
    """
    rule = ["---", *["---:" if numbers else "---"] * (len(heading) - 1)]
    cells = ([cell.replace("|", r"\|") for cell in row] for row in (heading, rule, *rows))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def between(text: str, start: str, end: str, content: str) -> str:
    """A page's text with what stands between two markers replaced.

    Raises:
        ValueError: a marker is missing.
    """
    before, first, rest = text.partition(start)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise ValueError(f"page: wanted the markers {start} and {end}, wanted both in this order")
    return f"{before}{first}\n{content}\n{last}{after}"
