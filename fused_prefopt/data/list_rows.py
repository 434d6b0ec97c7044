"""Lists, the scored completions of a prompt in one row: as a row each, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fused_prefopt.data.columns import (
    CHOSEN,
    CHOSEN_IDS,
    CHOSEN_TOKEN_WEIGHTS,
    COLLISION,
    COLLISIONS,
    COMPLETION,
    COMPLETION_IDS,
    COMPLETIONS,
    COMPLETIONS_IDS,
    GROUP,
    LIST_COLUMNS,
    PAIR,
    PAIR_IDS,
    PAIR_REFERENCES,
    PROMPT,
    PROMPT_IDS,
    REFERENCE,
    REJECTED_TOKEN_WEIGHTS,
    REWARD,
    REWARDS,
    SCORE_CHOSEN,
    SCORE_REJECTED,
    SCORES,
    TOKEN_WEIGHTS,
    WEIGHT,
    finite_number,
    has_values,
    require_columns,
    row_at,
)

Row = Mapping[str, Any]
# What all completions of a row have.
_SHARED = (PROMPT, PROMPT_IDS, WEIGHT)
# A pair's columns, and what they are of its completions.
_OF_PAIRS = {
    PAIR: COMPLETION,
    PAIR_IDS: COMPLETION_IDS,
    PAIR_REFERENCES: REFERENCE,
    COLLISIONS: COLLISION,
    (CHOSEN_TOKEN_WEIGHTS, REJECTED_TOKEN_WEIGHTS): TOKEN_WEIGHTS,
}


class Member(dict[str, Any]):
    """A completion of a list as a row of its own.

    Args:
        columns: of a single completion.
        place: where it stands, as messages name it.
    """

    def __init__(self, columns: Mapping[str, Any], place: str) -> None:
        super().__init__(columns)
        self.place = place


def members_of(row: Row, where: str) -> list[Member]:
    """The completions of a list, or of a pair, chosen first, each as a row of its own.

    Args:
        row: a record or a feature; a member of a list is one of its own.
        where: which row it is.

    Raises:
        ValueError: it is neither, has no `rewards`, a column has not an entry for each completion,
            or a pair's scores do not say that chosen is better.
    """
    shared = {name: row[name] for name in _SHARED if name in row}
    if CHOSEN in row or CHOSEN_IDS in row:
        columns = _of_pair(row, where)
    elif COMPLETIONS in row or COMPLETIONS_IDS in row:
        columns = _of_list(row, where)
    elif isinstance(row, Member):
        return [row]
    else:
        raise ValueError(
            f"{COMPLETIONS}: got none in {where}, wanted a list, or a pair; of single completions"
            " with a group `data.lists_of_points` makes lists"
        )
    places = range(len(columns[REWARD]))
    return [
        Member(
            shared | {name: values[place] for name, values in columns.items()},
            f"completion {place} of {where}",
        )
        for place in places
    ]


def _of_list(row: Row, where: str) -> dict[str, Any]:
    """Column of single completions → an entry for each completion of a list."""
    require_columns(row, (REWARDS,), where)
    given = [name for name in LIST_COLUMNS if row.get(name) is not None]
    names = [name for name in (COMPLETIONS_IDS, COMPLETIONS) if name in given]
    size = len(row[names[0]]) if names else 0
    if not size:
        raise ValueError(f"{COMPLETIONS}: got none in {where}, wanted at least one")
    for name in (*given, REWARDS):
        values = row[name]
        found = None if values is None or isinstance(values, str) else _length(values)
        if found != size:
            got = values if found is None else found
            raise ValueError(
                f"{name}: got {got!r} in {where}, wanted one for each of its {size} completions"
            )
    for place, value in enumerate(row[REWARDS]):
        if value is None:
            raise ValueError(
                f"{REWARDS}: got None in completion {place} of {where}, wanted a number for each;"
                " leave the completion out"
            )
    return {LIST_COLUMNS[name]: row[name] for name in given}


def _length(values: Any) -> int | None:
    try:
        return len(values)
    except TypeError:
        return None


def _of_pair(row: Row, where: str) -> dict[str, Any]:
    """The same of a pair."""
    scores = [1.0, 0.0]
    if has_values(row, SCORES):
        scores = [finite_number(name, row[name], where) for name in SCORES]
        if not scores[0] > scores[1]:
            raise ValueError(
                f"{SCORE_CHOSEN}: got {scores[0]:g} beside {SCORE_REJECTED} {scores[1]:g} in"
                f" {where}, wanted a higher one: in a list scores alone say which completion is"
                " better; drop the row, or the scores of all rows"
            )
    given = {
        name: [row[each] for each in pair] for pair, name in _OF_PAIRS.items() if pair[0] in row
    }
    return given | {REWARD: scores}


def with_columns(row: Row, columns: Mapping[str, list[Any]]) -> dict[str, Any]:
    """A row with more columns, by the names that they have in rows of its kind.

    Args:
        row: as of `members_of`.
        columns: of single completions, an entry for each completion of the row; a pair has none
            of its prompt's.
    """
    if COMPLETIONS_IDS in row:
        return {**row, **{plural: columns[n] for plural, n in LIST_COLUMNS.items() if n in columns}}
    if CHOSEN_IDS not in row:
        return {**row, **{name: values[0] for name, values in columns.items()}}
    sides = [(pair, columns[n]) for pair, n in _OF_PAIRS.items() if n in columns]
    return {**row, **{n: v for pair, both in sides for n, v in zip(pair, both, strict=True)}}


def points_of_lists(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The completions of lists, for losses on single ones.

    Args:
        rows: records or features with `completions` or `completions_ids`, `rewards`, and
            `references`, `prompt_references`, `completions_token_weights`, `weight`.

    Returns:
        A row for each completion, by the columns' names of single ones, with `group`, the list's
        index.

    Raises:
        ValueError: a list lacks a column, or one has not an entry for each completion.
    """
    return [
        {**member, GROUP: group}
        for group, row in enumerate(rows)
        for member in members_of(row, row_at(group))
    ]


def lists_of_points(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rated completions put together to lists by their `group`, for losses on pairs and lists.

    A row of the data set is then a whole list, which no sampler, process or batch tears apart.

    Args:
        rows: records or features with `prompt` and `completion`, or `prompt_ids` and
            `completion_ids`; with `reward` and `group`; and any of `reference`, `prompt_reference`,
            `token_weights` and `weight`. Rows of one group must have one prompt and one weight.

    Returns:
        A row for each group, in order of first appearance, by the columns' names of lists.

    Raises:
        ValueError: a column is missing, a reward is no finite number, or the rows of a group have
            two prompts or two weights.
    """
    groups: dict[Any, list[tuple[str, Row]]] = {}
    for index, row in enumerate(rows):
        where = getattr(row, "place", row_at(index))
        texts = (PROMPT_IDS, COMPLETION_IDS) if COMPLETION_IDS in row else (PROMPT, COMPLETION)
        require_columns(row, (*texts, REWARD, GROUP), where)
        finite_number(REWARD, row[REWARD], where)
        groups.setdefault(row[GROUP], []).append((where, row))
    return [_list_of(members) for members in groups.values()]


def _list_of(members: list[tuple[str, Row]]) -> dict[str, Any]:
    _, first = members[0]
    for where, row in members:
        for name in _SHARED:
            if row.get(name) != first.get(name):
                raise ValueError(
                    f"{name}: got {row.get(name)!r} in {where} and {first.get(name)!r} in"
                    f" {members[0][0]}, both of group {first[GROUP]}, wanted one for all of a group"
                )
    columns = {}
    for plural, name in LIST_COLUMNS.items():
        if any(name in row for _, row in members):
            for where, row in members:
                require_columns(row, (name,), where)
            columns[plural] = [row[name] for _, row in members]
    return {name: first[name] for name in _SHARED if name in first} | columns
