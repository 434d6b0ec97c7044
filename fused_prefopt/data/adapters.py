"""Adapters: rows of public preference datasets become this package's records."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

from fused_prefopt.data.columns import has_values, require_columns

Row = Mapping[str, Any]
Record = dict[str, Any]
logger = logging.getLogger(__name__)
_SCORES = ("score_chosen", "score_rejected")


def preference(rows: Iterable[Row]) -> list[Record]:
    """Adapt rows that are already in TRL's preference format, text or chat.

    Args:
        rows: with `chosen` and `rejected`, strings or lists of messages, and optionally `prompt`
            and both `score_chosen` and `score_rejected`. Without `prompt`, it is what chosen and
            rejected begin with in common: whole messages, or text up to a space.

    Returns:
        Records with `prompt`, `chosen`, `rejected` and, where all have them, the scores; other
        columns are dropped. Pairs whose chosen and rejected are equal, or one of which is empty,
        are dropped; log messages count them, and pairs without the scores of others.

    Raises:
        ValueError: a row has no `chosen` or no `rejected`.
    """
    records, dropped = [], 0
    for row in rows:
        require_columns(row, ("chosen", "rejected"))
        prompt, chosen, rejected = _with_prompt(row)
        if chosen and rejected and chosen != rejected:
            record = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            records.append(record | _scores(row))
        else:
            dropped += 1
    _report("preference", dropped, "pairs")
    return _scored_alike("preference", records)


def ultrafeedback_binarized(rows: Iterable[Row]) -> list[Record]:
    """Adapt raw rows of `HuggingFaceH4/ultrafeedback_binarized` (its `*_prefs` splits).

    Args:
        rows: with `prompt`, `prompt_id`, `messages` (all three ignored), `chosen`, `rejected`
            (whole chats, lists of messages), `score_chosen`, `score_rejected` (1 to 10).

    Returns:
        Records with `prompt` (the messages before the last turn), `chosen`, `rejected` (the last
        turn, a list of one assistant message) and, where all have them, the scores. Pairs with an
        empty answer, equal answers or two prompts are dropped; log messages count them, and pairs
        without the scores of others.

    Raises:
        ValueError: a row has no `chosen` or no `rejected`.
    """
    records, dropped = [], 0
    for row in rows:
        require_columns(row, ("chosen", "rejected"))
        chosen, rejected = _messages(row["chosen"]), _messages(row["rejected"])
        answered = _is_answered(chosen) and _is_answered(rejected) and chosen != rejected
        if answered and chosen[:-1] == rejected[:-1]:
            record = {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
            records.append(record | _scores(row))
        else:
            dropped += 1
    _report("ultrafeedback_binarized", dropped, "pairs")
    return _scored_alike("ultrafeedback_binarized", records)


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
        require_columns(row, ("instruction", "completions"))
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
    _report("ultrafeedback", dropped, "completions")
    return records


ADAPTERS: dict[str, Callable[[Iterable[Row]], list[Record]]] = {
    "HuggingFaceH4/ultrafeedback_binarized": ultrafeedback_binarized,
    "openbmb/UltraFeedback": ultrafeedback,
}


def load_dataset_records(name: str, split: str, limit: int | None = None) -> list[Record]:
    """Load a dataset with `datasets.load_dataset` and adapt its rows.

    Args:
        name: on the Hugging Face hub, or a local folder. Names in `ADAPTERS` have their own
            adapter, all others go through `preference`.
        split: such as "train_prefs"; the dataset defines which there are.
        limit: rows to read; they are streamed instead of downloading the dataset. None reads all.

    Raises:
        ValueError: the rows lack a column that the adapter needs.
    """
    from datasets import load_dataset

    rows = load_dataset(name, split=split, streaming=limit is not None)
    return ADAPTERS.get(name, preference)(islice(rows, limit))


def _with_prompt(row: Row) -> tuple[Any, Any, Any]:
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        return row["prompt"], chosen, rejected
    shortest = min(len(chosen), len(rejected))
    size = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)
    if isinstance(chosen, str):
        # The space goes with the completion, as most tokenizers join it to the next word.
        size = max(chosen.rfind(" ", 0, size), 0)
    return chosen[:size], chosen[size:], rejected[size:]


def _scores(row: Row) -> dict[str, float]:
    return {name: float(row[name]) for name in _SCORES} if has_values(row, _SCORES) else {}


def _scored_alike(adapter: str, records: list[Record]) -> list[Record]:
    """The records without scores where only some have them: no loss can use half a column."""
    without = sum(not has_values(record, _SCORES) for record in records)
    if without in (0, len(records)):
        return records
    logger.warning(
        "%s: dropped all scores, %d of %d pairs lack them", adapter, without, len(records)
    )
    return [{n: value for n, value in record.items() if n not in _SCORES} for record in records]


def _messages(chat: Iterable[Row]) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in chat]


def _is_answered(chat: list[dict[str, str]]) -> bool:
    return len(chat) > 1 and chat[-1]["role"] == "assistant" and bool(chat[-1]["content"])


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


def _report(adapter: str, dropped: int, what: str) -> None:
    if dropped:
        logger.warning("%s: dropped %d unusable %s", adapter, dropped, what)
