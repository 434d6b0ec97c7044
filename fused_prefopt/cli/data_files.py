"""Rows of a data set of the hub, a folder or a file, before an adapter reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# How a file's name ends → what reads it.
FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def rows_of(name: str, split: str, limit: int | None) -> Iterator[Row]:
    """The rows of a data set.

    Args:
        name: on the hub, a folder, or a file of `FILES`.
        split: of the data set; of a file "train".
        limit: rows at most; None is all.

    Raises:
        ValueError, OSError: there is none, or it cannot be read.
    """
    from datasets.exceptions import DatasetsError

    try:
        yield from islice(_rows(name, split, limit), limit)
    except FileNotFoundError as error:
        said = str(error).rstrip(".")
        raise ValueError(
            f"got {name}: {said}; needs a hub name, a folder, or a JSON, CSV or Parquet file"
        ) from error
    except DatasetsError as error:
        raise ValueError(f"cannot read {name}: {error.__cause__ or error}") from error


def _rows(name: str, split: str, limit: int | None) -> Iterable[Row]:
    from datasets import load_dataset

    path = Path(name)
    if path.suffix not in FILES:
        # Streaming reads no more than `limit` rows of a hub data set, but knows no slices.
        return load_dataset(name, split=split, streaming=limit is not None and "[" not in split)
    if path.is_file() and path.stat().st_size == 0:
        return []
    return load_dataset(FILES[path.suffix], data_files=name, split=split)
