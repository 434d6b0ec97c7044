"""Records of a training's data set, and as every kind of loss judges them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fused_prefopt.cli.config import EMBEDDED, Settings
from fused_prefopt.cli.data_files import FILES, rows_of
from fused_prefopt.data import (
    lists_of_points,
    load_documents,
    make_pairs,
    make_points,
    pairs_of_points,
    points_of_lists,
    points_of_pairs,
    split_documents,
)
from fused_prefopt.data.columns import (
    CHOSEN,
    COMPLETIONS,
    DESIRABLE,
    GROUP,
    PAIR,
    REWARD,
    REWARDS,
    SCORES,
    has_values,
)
from fused_prefopt.data.records import adapted_records
from fused_prefopt.losses.protocol import Loss

Record = Mapping[str, Any]
Records = list[dict[str, Any]]
Say = Callable[[str], None]
_GROUPED = (REWARD, GROUP)
_ALIKE = (
    "rows: got no prompt with two completions of different reward, needs one to make a pair; give"
    " completions of one prompt one list, or the same number in `group`"
)
# What losses judge.
LISTS, PAIRS, RATED, LABELLED = "lists", "pairs", "rated completions", "labelled completions"


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
    if Path(settings.held_out).suffix in FILES:
        return _read(settings, settings.held_out, "train", settings.held_out_limit, say)
    if settings.dataset == EMBEDDED:
        documents = split_documents(load_documents(), seed=seed)[1]
        return make_pairs(documents, seed=seed, limit=settings.held_out_limit)
    return _read(settings, settings.dataset, settings.held_out, settings.held_out_limit, silent)


def silent(said: str) -> None:
    """Of another process, or of a data set's other split, it was told already."""


def kind_of(loss: Loss, records: Sequence[Record] = ()) -> str:
    """What a loss judges of records: `LISTS`, `PAIRS`, or completions, `RATED` or `LABELLED`.

    Rated completions that all have a `group` are lists to a loss on pairs: a ranking wants all of
    a prompt, and any other loss learns of every two.
    """
    if loss.pairwise:
        return LISTS if make_lists(records) else PAIRS
    return LABELLED if DESIRABLE in loss.needs else RATED


def judged_records(records: Records, kind: str, *, say: Say = print) -> Records:
    """Records as losses of a kind judge them.

    Args:
        records: pairs, single completions or lists.
        kind: of `kind_of`.
        say: tells the user that completions were rated 1 and 0, or put together to lists.

    Raises:
        ValueError: as `as_lists`, `as_pairs` and `as_judged` do.
    """
    if kind == LISTS:
        return as_lists(records, say=say)
    if kind == PAIRS:
        return as_pairs(records)
    if kind == LABELLED:
        return as_judged(records)
    # A batch is of whole prompts where they are known.
    return as_points(lists_of_points(records) if _are_grouped(records) else records, say=say)


def make_lists(records: Sequence[Record]) -> bool:
    """Whether they are lists, or completions of which it is known which are of one prompt."""
    return _has_lists(records) or _are_grouped(records)


def as_lists(records: Records, *, say: Say = print) -> Records:
    """Lists; rated completions of one `group` are one, and a pair is a list of two.

    Args:
        records: lists, pairs or single completions.
        say: tells the user that completions were put together.

    Raises:
        ValueError: completions come without `reward` or `group`, those of a group have two prompts
            or weights, or no prompt's rewards differ.
    """
    lists = records
    if _has_pairs(records):
        return records
    if not _has_lists(records):
        lists = lists_of_points(records)
        say(
            f"{len(records)} completions put together by `group` to {len(lists)} lists, in which"
            " every two of different rating are a pair"
        )
    if not any(len(set(row[REWARDS])) > 1 for row in lists):
        raise ValueError(_ALIKE)
    return lists


def as_pairs(records: Records) -> Records:
    """Pairs; of rated completions and of lists the best and the worst of each prompt.

    Raises:
        ValueError: completions come without `reward` or `group`, or no prompt's rewards differ.
    """
    if _has_pairs(records):
        return records
    if _has_lists(records):
        records = points_of_lists(records)
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
        raise ValueError(_ALIKE)
    return pairs


def as_points(records: Records, *, say: Say = print) -> Records:
    """Single completions; those of a pair with its scores, or rated 1 and 0.

    Args:
        records: pairs, single completions or lists.
        say: tells the user that completions were rated 1 and 0.
    """
    if _has_lists(records):
        return points_of_lists(records)
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
    if _all_have(records, DESIRABLE):
        return records
    if any(DESIRABLE in record for record in records):
        raise ValueError(
            "label: got some rows without, needs one in each; drop the others, or give all a label"
        )
    pairs = as_pairs(records)
    judged = []
    # Each pair's chosen completion comes first.
    for index, point in enumerate(points_of_pairs(pairs)):
        if not has_values(pairs[index // 2], SCORES):
            del point[REWARD]
        judged.append(point | {DESIRABLE: index % 2 == 0})
    return judged


def _read(settings: Settings, name: str, split: str, limit: int | None, say: Say) -> Records:
    records, said = adapted_records(name, rows_of(name, split, limit), settings.adapter)
    if not records:
        raise ValueError(f"got no usable row in {name}, split {split}")
    say(said)
    return records


def _has_pairs(records: Records) -> bool:
    return bool(records) and CHOSEN in records[0]


def _has_lists(records: Sequence[Record]) -> bool:
    return bool(records) and COMPLETIONS in records[0]


def _are_grouped(records: Sequence[Record]) -> bool:
    """Whether they are single completions whose prompts and ratings are known."""
    return bool(records) and all(_all_have(records, name) for name in _GROUPED)


def _all_have(records: Sequence[Record], name: str) -> bool:
    return all(name in record for record in records)
