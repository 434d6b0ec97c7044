"""Pairs as rated points, and rated points as pairs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from fused_prefopt.data.columns import PAIR, finite_number, require_columns, row_at

Record = Mapping[str, Any]
logger = logging.getLogger(__name__)


def points_of_pairs(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Two rated completions of every pair, for point-wise losses.

    Args:
        records: with `prompt`, `chosen`, `rejected`, and their scores; without scores chosen is
            rated 1 and rejected 0.

    Returns:
        Records with `prompt`, `completion`, `reward` and `group`, the pair's index.

    Raises:
        ValueError: a column is missing, or a score is no finite number.
    """
    points = []
    for group, record in enumerate(records):
        require_columns(record, ("prompt", *PAIR), row_at(group))
        for side, default in zip(PAIR, (1.0, 0.0), strict=True):
            name = f"score_{side}"
            score = record.get(name)
            reward = default if score is None else finite_number(name, score, row_at(group))
            points.append(
                {
                    "prompt": record["prompt"],
                    "completion": record[side],
                    "reward": reward,
                    "group": group,
                }
            )
    return points


def pairs_of_points(records: Iterable[Record]) -> list[dict[str, Any]]:
    """The best and the worst completion of every prompt, for pairwise losses.

    Args:
        records: with `prompt`, `completion`, `reward` and `group`.

    Returns:
        Records with `prompt`, `chosen`, `rejected`, `score_chosen` and `score_rejected`, one for
        every group whose rewards differ, in order of first appearance. A log message counts the
        groups that make no pair.

    Raises:
        ValueError: a column is missing, or a reward is no finite number.
    """
    groups: dict[Any, list[tuple[float, Record]]] = {}
    for index, record in enumerate(records):
        where = row_at(index)
        require_columns(record, ("prompt", "completion", "reward", "group"), where)
        reward = finite_number("reward", record["reward"], where)
        groups.setdefault(record["group"], []).append((reward, record))
    pairs = []
    for members in groups.values():
        high, best = max(members, key=lambda member: member[0])
        low, worst = min(members, key=lambda member: member[0])
        if high > low:
            pairs.append(
                {
                    "prompt": best["prompt"],
                    "chosen": best["completion"],
                    "rejected": worst["completion"],
                    "score_chosen": high,
                    "score_rejected": low,
                }
            )
    alike = len(groups) - len(pairs)
    if alike:
        logger.warning(
            "pairs_of_points: dropped %d of %d prompts, whose rewards do not differ",
            alike,
            len(groups),
        )
    return pairs
