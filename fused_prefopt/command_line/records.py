"""Text records of a data set, as pairs or as single completions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from fused_prefopt.command_line.settings import EMBEDDED, Settings
from fused_prefopt.data import (
    load_documents,
    make_pairs,
    make_points,
    pairs_of_points,
    points_of_pairs,
    split_documents,
)
from fused_prefopt.data.adapters import adapted_records
from fused_prefopt.data.columns import PAIR, SCORES, has_values

Record = Mapping[str, Any]
Records = list[dict[str, Any]]
Say = Callable[[str], None]
_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_GROUPED = ("reward", "group")


def training_records(settings: Settings, seed: int, *, points: bool, say: Say = print) -> Records:
    """What to train on, as the data set has it.

    Args:
        settings: names the data set.
        seed: of the embedded data.
        points: whether the embedded data is to be rated completions instead of pairs.
        say: tells the user what rows of another data set were read as.

    Raises:
        ValueError: the data set, split or adapter does not exist, no adapter or several fit the
            columns, a row does not fit the adapter, or no row is usable.
    """
    if settings.dataset == EMBEDDED:
        documents = split_documents(load_documents(), seed=seed)[0]
        flipped = partial(make_pairs, flip_rate=settings.flip_rate)
        return (make_points if points else flipped)(documents, seed=seed, limit=settings.limit)
    return _read(settings, settings.dataset, settings.split, settings.limit, say)


def held_out_records(settings: Settings, seed: int, *, say: Say = print) -> Records:
    """What to judge on, as the data set has it; of no rows without `held_out`.

    Args:
        settings: names the data set.
        seed: of the embedded data.
        say: tells the user what rows of another data set than that of training were read as.

    Raises:
        ValueError: as in `training_records`.
    """
    if settings.held_out is None:
        return []
    if Path(settings.held_out).suffix in _FILES:
        return _read(settings, settings.held_out, "train", settings.held_out_limit, say)
    if settings.dataset == EMBEDDED:
        documents = split_documents(load_documents(), seed=seed)[1]
        return make_pairs(documents, seed=seed, limit=settings.held_out_limit)
    return _read(settings, settings.dataset, settings.held_out, settings.held_out_limit, _nothing)


def as_pairs(records: Records) -> Records:
    """Pairs; of rated completions the best and the worst of each prompt.

    Raises:
        ValueError: completions come without `reward` or `group`, or no prompt's rewards differ.
    """
    if _has_pairs(records):
        return records
    names = " and ".join(name for name in _GROUPED if not _all_have(records, name))
    if names:
        raise ValueError(
            f"rows: got single completions, not all with {names}, needs pairs, which pairwise"
            f" losses and held_out are judged on; give rows with {' and '.join(PAIR)}, or give each"
            " completion a rating and the number of its prompt in `group`; of labelled completions"
            " a loss such as kto learns"
        )
    pairs = pairs_of_points(records)
    if not pairs:
        raise ValueError(
            "rows: got no prompt with two completions of different reward, needs one to make a"
            " pair; give completions of one prompt the same number in `group`"
        )
    return pairs


def as_points(records: Records, *, say: Say = print) -> Records:
    """Single completions; those of a pair with its scores, or rated 1 and 0.

    Args:
        records: pairs or single completions.
        say: tells the user that completions were rated 1 and 0.
    """
    if not _has_pairs(records):
        return records
    unscored = sum(not has_values(record, SCORES) for record in records)
    if unscored:
        say(f"{unscored} of {len(records)} pairs have no scores: chosen is rated 1, rejected 0")
    return points_of_pairs(records)


def as_judged(records: Records) -> Records:
    """Completions with `desirable`: as they were judged, else those of pairs.

    Completions of pairs without scores get no `reward`.

    Raises:
        ValueError: completions come without `desirable`, and without `reward` or `group`.
    """
    if _all_have(records, "desirable"):
        return records
    if any("desirable" in record for record in records):
        raise ValueError(
            "label: got some rows without, needs one in each; drop the others, or give all a label"
        )
    pairs = as_pairs(records)
    judged = []
    # Each pair's chosen completion comes first.
    for index, point in enumerate(points_of_pairs(pairs)):
        if not has_values(pairs[index // 2], SCORES):
            del point["reward"]
        judged.append(point | {"desirable": index % 2 == 0})
    return judged


def texts_of(records: Iterable[Record]) -> Iterator[str]:
    """Every text and every message of records, to train a tokenizer on."""
    for record in records:
        for name in ("prompt", "chosen", "rejected", "completion"):
            text = record.get(name, [])
            yield from [text] if isinstance(text, str) else (each["content"] for each in text)


def _read(settings: Settings, name: str, split: str, limit: int | None, say: Say) -> Records:
    from datasets.exceptions import DatasetsError

    try:
        rows = islice(_rows(name, split, limit), limit)
        records, said = adapted_records(name, rows, settings.adapter)
    except DatasetsError as error:
        raise ValueError(f"cannot read {name}: {error.__cause__ or error}") from error
    if not records:
        raise ValueError(f"got no usable row in {name}, split {split}")
    say(said)
    return records


def _has_pairs(records: Records) -> bool:
    return bool(records) and PAIR[0] in records[0]


def _all_have(records: Records, name: str) -> bool:
    return all(name in record for record in records)


def _nothing(said: str) -> None:
    """What of a data set's other split was told already."""


def _rows(name: str, split: str, limit: int | None) -> Iterable[Record]:
    from datasets import load_dataset

    path = Path(name)
    if path.suffix not in _FILES:
        # Streaming reads no more than `limit` rows of a hub data set, but knows no slices.
        return load_dataset(name, split=split, streaming=limit is not None and "[" not in split)
    if path.is_file() and path.stat().st_size == 0:
        return []
    return load_dataset(_FILES[path.suffix], data_files=name, split=split)
