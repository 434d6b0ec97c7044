"""Adapters of single completions: rows of public datasets become this package's records."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

from fused_prefopt.data.columns import (
    LABELS,
    RATINGS,
    column_of,
    finite_number,
    judgement,
    require_columns,
    row_at,
)

Row = Mapping[str, Any]
Record = dict[str, Any]
logger = logging.getLogger(__name__)


def completions(rows: Iterable[Row]) -> list[Record]:
    """Adapt rows of single completions, rated or judged.

    Args:
        rows: with `prompt` and `completion`, texts or chats, and any of `reward`, `score` or
            `rating` (the first with values counts), `group`, `desirable`, and `label`, TRL's name
            of the last.

    Returns:
        Records with those columns, the rating as `reward`, `label` as `desirable`; others are
        dropped.

    Raises:
        ValueError: a row has no prompt or no completion, a rating that is no finite number, or a
            label that is neither a bool nor 0 or 1.
    """
    rows = list(rows)
    rating = column_of(rows, RATINGS)
    records = []
    for index, row in enumerate(rows):
        where = row_at(index)
        require_columns(row, ("prompt", "completion"), where)
        record = {name: row[name] for name in ("prompt", "completion")}
        label = column_of([row], LABELS)
        if label is not None:
            record["desirable"] = judgement(label, row[label], where)
        if rating is not None and row.get(rating) is not None:
            record["reward"] = finite_number(rating, row[rating], where)
        if row.get("group") is not None:
            record["group"] = row["group"]
        records.append(record)
    return records


def ultrafeedback(rows: Iterable[Row]) -> list[Record]:
    """Adapt rows of `openbmb/UltraFeedback` to rated completions, grouped by prompt.

    The reward is `overall_score`, 1 to 10. Where that is missing, `fine-grained_score`, the mean
    of the aspect ratings, takes its place, stretched linearly from its 1 to 5 onto 1 to 10.

    Args:
        rows: with `instruction` and `completions`, a list of dicts with `response`,
            `overall_score` and `fine-grained_score`.

    Returns:
        Records with `prompt` and `completion` (each a list of one message), `reward` (float) and
        `group` (the row's index). Completions without a response or a score ("N/A", None) are
        dropped; a log message counts them.

    Raises:
        ValueError: a row has no `instruction` or no `completions`.
    """
    records, dropped = [], 0
    for group, row in enumerate(rows):
        require_columns(row, ("instruction", "completions"), row_at(group))
        for completion in row["completions"]:
            reward = _ultrafeedback_reward(completion)
            if reward is None or not completion["response"] or not row["instruction"]:
                dropped += 1
                continue
            records.append(
                {
                    "prompt": [{"role": "user", "content": row["instruction"]}],
                    "completion": [{"role": "assistant", "content": completion["response"]}],
                    "reward": reward,
                    "group": group,
                }
            )
    _report(dropped)
    return records


def _ultrafeedback_reward(completion: Row) -> float | None:
    overall = _number(completion.get("overall_score"))
    if overall is not None:
        return overall
    fine = _number(completion.get("fine-grained_score"))
    return None if fine is None else 1 + (fine - 1) * 9 / 4


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _report(dropped: int) -> None:
    if dropped:
        logger.warning("ultrafeedback: dropped %d unusable completions", dropped)
