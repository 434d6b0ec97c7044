"""Text records of a data set, as pairs or as single completions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from fused_prefopt.checks import require_choice
from fused_prefopt.command_line.settings import EMBEDDED, Settings
from fused_prefopt.data import (
    load_documents,
    make_pairs,
    make_points,
    pairs_of_points,
    points_of_pairs,
    preference,
    split_documents,
)
from fused_prefopt.data.adapters import ADAPTERS
from fused_prefopt.data.columns import require_columns

Record = Mapping[str, Any]
_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_JUDGED = ("reward", "group", "desirable")


def completions(rows: Iterable[Record]) -> list[dict[str, Any]]:
    """Adapt rows of single completions, rated or judged.

    Args:
        rows: with `prompt` and `completion`, texts or chats, and any of `reward`, `group`,
            `desirable` and `label`, TRL's name of the last.

    Returns:
        Records with those columns, `label` as `desirable`; others are dropped.

    Raises:
        ValueError: a row has no prompt or no completion.
    """
    records = []
    for row in rows:
        require_columns(row, ("prompt", "completion"))
        record = {name: row[name] for name in ("prompt", "completion")}
        if row.get("label") is not None:
            record["desirable"] = bool(row["label"])
        records.append(record | {n: row[n] for n in _JUDGED if row.get(n) is not None})
    return records


READERS: dict[str, Callable[[Iterable[Record]], list[dict[str, Any]]]] = {
    adapter.__name__: adapter for adapter in (preference, completions, *ADAPTERS.values())
}


def training_records(settings: Settings, seed: int, *, points: bool) -> list[dict[str, Any]]:
    """What to train on, as the data set has it.

    Args:
        settings: names the data set.
        seed: of the embedded data.
        points: whether the embedded data is to be rated completions instead of pairs.

    Raises:
        ValueError: the data set, split or adapter does not exist, or no row is usable.
    """
    if settings.dataset == EMBEDDED:
        documents = split_documents(load_documents(), seed=seed)[0]
        flipped = partial(make_pairs, flip_rate=settings.flip_rate)
        return (make_points if points else flipped)(documents, seed=seed, limit=settings.limit)
    return _read(settings, settings.dataset, settings.split, settings.limit)


def held_out_records(settings: Settings, seed: int) -> list[dict[str, Any]]:
    """What to judge on, as the data set has it; of no rows without `held_out`.

    Raises:
        ValueError: as in `training_records`.
    """
    if settings.held_out is None:
        return []
    if Path(settings.held_out).suffix in _FILES:
        return _read(settings, settings.held_out, "train", settings.held_out_limit)
    if settings.dataset == EMBEDDED:
        documents = split_documents(load_documents(), seed=seed)[1]
        return make_pairs(documents, seed=seed, limit=settings.held_out_limit)
    return _read(settings, settings.dataset, settings.held_out, settings.held_out_limit)


def as_pairs(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pairs; of rated completions the best and the worst of each prompt.

    Raises:
        ValueError: completions come without `reward` or `group`.
    """
    return pairs_of_points(records) if records and "completion" in records[0] else records


def as_points(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Single completions; those of a pair with its scores, or rated 1 and 0."""
    return points_of_pairs(records) if records and "chosen" in records[0] else records


def as_judged(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Completions with `desirable`: as they were judged, else those of pairs.

    Raises:
        ValueError: completions come without `desirable`, and without `reward` or `group`.
    """
    if records and "desirable" in records[0]:
        return records
    points = points_of_pairs(as_pairs(records))
    # Each pair's chosen completion comes first.
    return [point | {"desirable": index % 2 == 0} for index, point in enumerate(points)]


def texts_of(records: Iterable[Record]) -> Iterator[str]:
    """Every text and every message of records, to train a tokenizer on."""
    for record in records:
        for name in ("prompt", "chosen", "rejected", "completion"):
            text = record.get(name, [])
            yield from [text] if isinstance(text, str) else (each["content"] for each in text)


def _read(settings: Settings, name: str, split: str, limit: int | None) -> list[dict[str, Any]]:
    from datasets.exceptions import DatasetsError

    if settings.adapter is not None:
        require_choice("adapter", settings.adapter, READERS)
    adapted = READERS.get(settings.adapter or "", ADAPTERS.get(name, preference))
    try:
        records = adapted(islice(_rows(name, split, limit), limit))
    except DatasetsError as error:
        raise ValueError(f"cannot read {name}: {error.__cause__ or error}") from error
    if not records:
        raise ValueError(f"got no usable row in {name}, split {split}")
    return records


def _rows(name: str, split: str, limit: int | None) -> Iterable[Record]:
    from datasets import load_dataset

    path = Path(name)
    if path.suffix not in _FILES:
        # Streaming reads no more than `limit` rows of a hub data set, but knows no slices.
        return load_dataset(name, split=split, streaming=limit is not None and "[" not in split)
    if path.is_file() and path.stat().st_size == 0:
        return []
    return load_dataset(_FILES[path.suffix], data_files=name, split=split)
