"""Records of a data set: rows loaded, recognised and adapted; pairs as completions and back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from fused_prefopt.checks import closest, require_choice
from fused_prefopt.data.adapters import (
    HUMAN,
    completions,
    hh_rlhf,
    lists,
    preference,
    ultrafeedback,
    ultrafeedback_binarized,
    weight_of,
)
from fused_prefopt.data.columns import (
    CHOSEN,
    COMPLETION,
    COMPLETIONS,
    COMPLETIONS_IDS,
    GROUP,
    LABELS,
    LIST_RATINGS,
    PAIR,
    PROMPT,
    RATINGS,
    REJECTED,
    REWARD,
    SCORES,
    TOKENS,
    WEIGHT,
    finite_number,
    require_columns,
    row_at,
)

Row = Mapping[str, Any]
Record = dict[str, Any]
Adapter = Callable[[Iterable[Row]], list[Record]]
READERS: dict[str, Adapter] = {
    adapter.__name__: adapter
    for adapter in (preference, hh_rlhf, ultrafeedback_binarized, completions, lists, ultrafeedback)
}
# Data sets of the hub whose adapter is known without a look at their columns.
ADAPTERS: dict[str, Adapter] = {
    "Anthropic/hh-rlhf": hh_rlhf,
    "HuggingFaceH4/ultrafeedback_binarized": ultrafeedback_binarized,
    "openbmb/UltraFeedback": ultrafeedback,
}
# Adapter → the rows that it reads.
FORMS = {
    "preference": "chosen, rejected (texts or chats) and prompt, or without it",
    "hh_rlhf": f"chosen, rejected: texts from {HUMAN!r} on, without prompt",
    "ultrafeedback_binarized": "chosen, rejected: whole chats, beside a prompt that is a text",
    "completions": f"prompt, completion and any of {', '.join((*LABELS, *RATINGS))}",
    "lists": f"prompt, completions and a list of numbers in any of {', '.join(LIST_RATINGS)}",
    "ultrafeedback": "instruction, completions",
}
# Adapter → the columns that it makes use of; others are named to the user.
_READ = {
    "preference": (PROMPT, *PAIR, *SCORES, WEIGHT),
    "hh_rlhf": (*PAIR, WEIGHT),
    "ultrafeedback_binarized": (PROMPT, *PAIR, *SCORES, WEIGHT),
    "completions": (PROMPT, COMPLETION, *LABELS, *RATINGS, GROUP, WEIGHT),
    "lists": (PROMPT, COMPLETIONS, *LIST_RATINGS, WEIGHT),
    "ultrafeedback": ("instruction", COMPLETIONS, WEIGHT),
}
_NEEDED = {
    "pairs": PAIR,
    "completions": (COMPLETION,),
    "lists": (PROMPT, COMPLETIONS),
    "ultrafeedback": ("instruction", COMPLETIONS),
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recognised:
    """An adapter and what it takes the rows for.

    Attributes:
        adapter: its name in `READERS`.
        what: the rows are, such as "rated completions".
    """

    adapter: str
    what: str


def load_dataset_records(
    name: str, split: str, limit: int | None = None, adapter: str | None = None
) -> list[Record]:
    """Load a dataset with `datasets.load_dataset` and adapt its rows.

    A log message says what they were read as.

    Args:
        name: on the Hugging Face hub, or a local folder.
        split: such as "train_prefs"; the dataset defines which there are.
        limit: rows to read; they are streamed instead of downloading the dataset. None reads all.
        adapter: one of `READERS`; None takes that of the names in `ADAPTERS`, and of any other
            dataset the one that fits the columns of its first row.

    Returns:
        Records of pairs (`prompt`, `chosen`, `rejected`), of single completions (`prompt`,
        `completion`) or of lists (`prompt`, `completions`), as the adapter makes them.

    Raises:
        ValueError: there is no such adapter, none or several fit the columns, or a row lacks a
            column that the adapter needs or has a value that it cannot use.
    """
    from datasets import load_dataset

    rows = load_dataset(name, split=split, streaming=limit is not None)
    records, said = adapted_records(name, islice(rows, limit), adapter)
    logger.info("%s", said)
    return records


def adapted_records(
    name: str, rows: Iterable[Row], adapter: str | None = None
) -> tuple[list[Record], str]:
    """Records of a data set's rows, and what the rows were read as, in a sentence.

    Args:
        name: of the data set.
        rows: of one kind.
        adapter: name in `READERS`; None takes the one of the name in `ADAPTERS`, else the one that
            fits the first row's columns.

    Raises:
        ValueError: there is no such adapter, none or several fit the columns, or a row does not
            fit the adapter.
    """
    if adapter is not None:
        require_choice("adapter", adapter, READERS)
    elif name in ADAPTERS:
        known = ADAPTERS[name]
        return known(rows), f"{name}: read by adapter {known.__name__}, known by the name"
    rows = iter(rows)
    first = list(islice(rows, 1))
    if not first:
        return [], f"{name}: no rows"
    said = f"{name}: read by adapter {adapter}"
    if adapter is None:
        fit = recognise(first[0])
        adapter, said = fit.adapter, f"{name}: read as {fit.what} (adapter {fit.adapter})"
    unread = [repr(column) for column in first[0] if column not in _READ[adapter]]
    if unread:
        said += f"; columns not read: {', '.join(unread)}"
    return READERS[adapter](chain(first, rows)), said


def recognise(row: Row) -> Recognised:
    """The one adapter that fits a data set's first row.

    Args:
        row: of a data set.

    Raises:
        ValueError: none fits, or several do; the message lists them and the columns.
    """
    kinds = [kind for kind, names in _NEEDED.items() if all(name in row for name in names)]
    if len(kinds) > 1:
        # Where rows of several kinds share a table, the columns of the others are None.
        filled = {name for name, value in row.items() if value is not None}
        kinds = [kind for kind in kinds if filled.issuperset(_NEEDED[kind])]
    if len(kinds) > 1:
        raise ValueError(_message(row, f"which fit {' and '.join(kinds)}"))
    if kinds == ["pairs"]:
        return _recognised_pairs(row)
    if kinds == ["completions"]:
        return _recognised_completions(row)
    if kinds == ["lists"]:
        if not any(name in row for name in LIST_RATINGS):
            raise ValueError(_message(row, "lists of completions that nothing rates"))
        return Recognised("lists", "lists of rated completions")
    if kinds == ["ultrafeedback"]:
        return Recognised("ultrafeedback", "completions of UltraFeedback")
    if any(name in row for name in (*TOKENS, COMPLETIONS_IDS)):
        problem = "of token ids, which trainers and collators take as they are and no adapter reads"
        raise ValueError(_message(row, problem))
    missing = [name for names in _NEEDED.values() for name in names if name not in row]
    hints = [f"{name!r}{closest(name, row)}" for name in missing if closest(name, row)]
    raise ValueError(_message(row, "which no adapter reads", *hints))


def points_of_pairs(records: Iterable[Row]) -> list[Record]:
    """Two rated completions of every pair, for point-wise losses.

    Args:
        records: with `prompt`, `chosen`, `rejected`, and their scores; without scores chosen is
            rated 1 and rejected 0.

    Returns:
        Records with `prompt`, `completion`, `reward` and `group`, the pair's index, and the pair's
        `weight`.

    Raises:
        ValueError: a column is missing, or a score is no finite number.
    """
    points = []
    for group, record in enumerate(records):
        where = row_at(group)
        require_columns(record, (PROMPT, *PAIR), where)
        for side, name, default in zip(PAIR, SCORES, (1.0, 0.0), strict=True):
            score = record.get(name)
            reward = default if score is None else finite_number(name, score, where)
            point = {PROMPT: record[PROMPT], COMPLETION: record[side], **weight_of(record, where)}
            points.append({**point, REWARD: reward, GROUP: group})
    return points


def pairs_of_points(records: Iterable[Row]) -> list[Record]:
    """The best and the worst completion of every prompt, for pairwise losses.

    Args:
        records: with `prompt`, `completion`, `reward` and `group`, and `weight`, of which both
            completions of a pair must have the same.

    Returns:
        Records with `prompt`, `chosen`, `rejected`, `score_chosen`, `score_rejected` and `weight`,
        one for every group whose rewards differ, in order of first appearance. A log message counts
        the groups that make no pair.

    Raises:
        ValueError: a column is missing, a reward is no finite number, or a pair's completions have
            two weights.
    """
    groups: dict[Any, list[tuple[float, Row]]] = {}
    for index, record in enumerate(records):
        where = row_at(index)
        require_columns(record, (PROMPT, COMPLETION, REWARD, GROUP), where)
        reward = finite_number(REWARD, record[REWARD], where)
        groups.setdefault(record[GROUP], []).append((reward, record))
    pairs = []
    for members in groups.values():
        high, best = max(members, key=lambda member: member[0])
        low, worst = min(members, key=lambda member: member[0])
        if high > low:
            scores = dict(zip(SCORES, (high, low), strict=True))
            sides = {CHOSEN: best[COMPLETION], REJECTED: worst[COMPLETION]}
            pairs.append({PROMPT: best[PROMPT], **sides, **scores, **_weight(best, worst)})
    alike = len(groups) - len(pairs)
    if alike:
        logger.warning(
            "pairs_of_points: dropped %d of %d prompts, whose rewards do not differ",
            alike,
            len(groups),
        )
    return pairs


def _weight(best: Row, worst: Row) -> dict[str, float]:
    """The weight of a pair of two completions of a prompt."""
    where = f"group {best[GROUP]}"
    weights = [weight_of(each, where) for each in (best, worst)]
    if weights[0] != weights[1]:
        raise ValueError(
            f"weight: got {best.get(WEIGHT)} and {worst.get(WEIGHT)} in {where}, the best and the"
            " worst completion, wanted one weight for the pair of them"
        )
    return weights[0]


def _recognised_pairs(row: Row) -> Recognised:
    prompt, sides = row.get(PROMPT), [row[name] for name in PAIR]
    if all(isinstance(side, str) for side in sides):
        if prompt is None and all(side.startswith(HUMAN) for side in sides):
            return Recognised("hh_rlhf", "pairs of dialogues in HH-RLHF's form")
    elif isinstance(prompt, str):
        if all(isinstance(side, list) and len(side) > 1 for side in sides):
            return Recognised("ultrafeedback_binarized", "pairs of whole chats")
        problem = "with answers that are neither texts, as the prompt is, nor whole chats"
        raise ValueError(_message(row, problem))
    return Recognised("preference", "preference pairs")


def _recognised_completions(row: Row) -> Recognised:
    kinds = {
        "labelled": any(name in row for name in LABELS),
        "rated": any(name in row for name in RATINGS),
    }
    found = [kind for kind, there in kinds.items() if there]
    if not found:
        raise ValueError(_message(row, "completions that nothing judges"))
    return Recognised("completions", f"{' and '.join(found)} completions")


def _message(row: Row, problem: str, *hints: str) -> str:
    forms = "; ".join(f"{name} ({columns})" for name, columns in FORMS.items())
    near = f" (missing {', '.join(hints)})" if hints else ""
    return (
        f"columns: got {', '.join(map(repr, row))}, {problem}{near}; needs those of one adapter:"
        f" {forms}; rename columns, or choose an adapter with `adapter: NAME`"
    )
