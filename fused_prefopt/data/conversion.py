"""Pairs as rated points, and rated points as pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fused_prefopt.data.columns import require_columns

Record = Mapping[str, Any]


def points_of_pairs(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Two rated completions of every pair, for point-wise losses.

    Args:
        records: with `prompt`, `chosen`, `rejected`, and their scores; without scores chosen is
            rated 1 and rejected 0.

    Returns:
        Records with `prompt`, `completion`, `reward` and `group`, the pair's index.

    Raises:
        ValueError: a column is missing.
    """
    points = []
    for group, record in enumerate(records):
        require_columns(record, ("prompt", "chosen", "rejected"))
        for side, default in (("chosen", 1.0), ("rejected", 0.0)):
            reward = record.get(f"score_{side}")
            points.append(
                {
                    "prompt": record["prompt"],
                    "completion": record[side],
                    "reward": default if reward is None else float(reward),
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
        every group whose rewards differ, in order of first appearance.

    Raises:
        ValueError: a column is missing.
    """
    groups: dict[Any, list[Record]] = {}
    for record in records:
        require_columns(record, ("prompt", "completion", "reward", "group"))
        groups.setdefault(record["group"], []).append(record)
    pairs = []
    for members in groups.values():
        best = max(members, key=lambda member: member["reward"])
        worst = min(members, key=lambda member: member["reward"])
        if best["reward"] > worst["reward"]:
            pairs.append(
                {
                    "prompt": best["prompt"],
                    "chosen": best["completion"],
                    "rejected": worst["completion"],
                    "score_chosen": float(best["reward"]),
                    "score_rejected": float(worst["reward"]),
                }
            )
    return pairs
