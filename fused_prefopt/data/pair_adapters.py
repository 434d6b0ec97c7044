"""Adapters of preference pairs: rows of public datasets become this package's records."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from fused_prefopt.data.columns import (
    PAIR,
    SCORES,
    finite_number,
    has_values,
    require_columns,
    row_at,
)
from fused_prefopt.data.recognition import ASSISTANT

Row = Mapping[str, Any]
Record = dict[str, Any]
logger = logging.getLogger(__name__)


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
        ValueError: a row has no `chosen` or no `rejected`, or a score that is no finite number.
    """
    records, dropped = [], 0
    for index, row in enumerate(rows):
        require_columns(row, PAIR, row_at(index))
        prompt, chosen, rejected = _with_prompt(row)
        if chosen and rejected and chosen != rejected:
            record = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            records.append(record | _scores(row, index))
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
        ValueError: a row has no `chosen` or no `rejected`, or a score that is no finite number.
    """
    records, dropped = [], 0
    for index, row in enumerate(rows):
        require_columns(row, PAIR, row_at(index))
        chosen, rejected = _messages(row["chosen"]), _messages(row["rejected"])
        answered = _is_answered(chosen) and _is_answered(rejected) and chosen != rejected
        if answered and chosen[:-1] == rejected[:-1]:
            record = {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
            records.append(record | _scores(row, index))
        else:
            dropped += 1
    _report("ultrafeedback_binarized", dropped, "pairs")
    return _scored_alike("ultrafeedback_binarized", records)


def hh_rlhf(rows: Iterable[Row]) -> list[Record]:
    """Adapt rows of `Anthropic/hh-rlhf`: whole dialogues as texts.

    Args:
        rows: with `chosen` and `rejected`, texts of turns that begin with "\\n\\nHuman:" and
            "\\n\\nAssistant:", the same up to the last "\\n\\nAssistant:".

    Returns:
        Records with `prompt`, which ends with that last "\\n\\nAssistant:", and `chosen`,
        `rejected`, what comes after it. Pairs with an empty answer, equal answers or two prompts
        are dropped; a log message counts them.

    Raises:
        ValueError: a row has no `chosen` or no `rejected`, or one that is no text.
    """
    records, dropped = [], 0
    for index, row in enumerate(rows):
        require_columns(row, PAIR, row_at(index))
        for name in PAIR:
            if not isinstance(row[name], str):
                kind = type(row[name]).__name__
                raise ValueError(f"{name}: got {kind} in {row_at(index)}, wanted a text")
        (prompt, called, chosen), (other, _, rejected) = (
            row[name].rpartition(ASSISTANT) for name in PAIR
        )
        answered = called and chosen.strip() and rejected.strip() and chosen != rejected
        if answered and prompt == other:
            records.append({"prompt": prompt + called, "chosen": chosen, "rejected": rejected})
        else:
            dropped += 1
    _report("hh_rlhf", dropped, "pairs")
    return records


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


def _scores(row: Row, index: int) -> dict[str, float]:
    if not has_values(row, SCORES):
        return {}
    return {name: finite_number(name, row[name], row_at(index)) for name in SCORES}


def _scored_alike(adapter: str, records: list[Record]) -> list[Record]:
    """The records without scores where only some have them: no loss can use half a column."""
    without = sum(not has_values(record, SCORES) for record in records)
    if without in (0, len(records)):
        return records
    logger.warning(
        "%s: dropped all scores, %d of %d pairs lack them", adapter, without, len(records)
    )
    return [{n: value for n, value in record.items() if n not in SCORES} for record in records]


def _messages(chat: Iterable[Row]) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in chat]


def _is_answered(chat: list[dict[str, str]]) -> bool:
    return len(chat) > 1 and chat[-1]["role"] == "assistant" and bool(chat[-1]["content"])


def _report(adapter: str, dropped: int, what: str) -> None:
    if dropped:
        logger.warning("%s: dropped %d unusable %s", adapter, dropped, what)
