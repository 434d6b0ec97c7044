"""Adapters: rows of public data sets become records of pairs, completions or lists of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fused_prefopt.data.columns import (
    CHOSEN,
    COMPLETION,
    COMPLETIONS,
    CONTENT,
    DESIRABLE,
    GROUP,
    LABELS,
    LIST_RATINGS,
    PAIR,
    PROMPT,
    RATINGS,
    REJECTED,
    REWARD,
    REWARDS,
    ROLE,
    SCORES,
    WEIGHT,
    column_of,
    has_values,
    read_value,
    require_columns,
    row_at,
)
from fused_prefopt.data.token_weights import refuse_token_weights

Row = Mapping[str, Any]
Record = dict[str, Any]
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_Triple = tuple[Any, Any, Any]
logger = logging.getLogger(__name__)


def preference(rows: Iterable[Row]) -> list[Record]:
    """Adapt rows that are already in TRL's preference format, text or chat.

    Args:
        rows: with `chosen` and `rejected`, strings or lists of messages, and optionally `prompt`,
            both `score_chosen` and `score_rejected`, and `weight`. Without `prompt`, it is what
            chosen and rejected begin with in common: whole messages, or text up to a space.

    Returns:
        Records with `prompt`, `chosen`, `rejected`, `weight` and, where all have them, the scores;
        other columns are dropped. Pairs whose chosen and rejected are equal, or one of which is
        empty, are dropped; log messages count them, and pairs without the scores of others.

    Raises:
        ValueError: a row has no `chosen` or no `rejected`, a score or weight that is no finite
            number, or weights of tokens.
    """

    def split(row: Row, where: str) -> _Triple | None:
        prompt, chosen, rejected = _with_prompt(row)
        return (prompt, chosen, rejected) if chosen and rejected and chosen != rejected else None

    return _pairs("preference", rows, split)


def ultrafeedback_binarized(rows: Iterable[Row]) -> list[Record]:
    """Adapt raw rows of `HuggingFaceH4/ultrafeedback_binarized` (its `*_prefs` splits).

    Args:
        rows: with `prompt`, `prompt_id`, `messages` (all three ignored), `chosen`, `rejected`
            (whole chats, lists of messages), `score_chosen`, `score_rejected` (1 to 10), and
            optionally `weight`.

    Returns:
        Records with `prompt` (the messages before the last turn), `chosen`, `rejected` (the last
        turn, a list of one assistant message), `weight` and, where all have them, the scores. Pairs
        with an empty answer, equal answers or two prompts are dropped; log messages count them,
        and pairs without the scores of others.

    Raises:
        ValueError: a row has no `chosen` or no `rejected`, or a score that is no finite number.
    """

    def split(row: Row, where: str) -> _Triple | None:
        chosen, rejected = _messages(row[CHOSEN]), _messages(row[REJECTED])
        answered = _is_answered(chosen) and _is_answered(rejected) and chosen != rejected
        if not answered or chosen[:-1] != rejected[:-1]:
            return None
        return chosen[:-1], chosen[-1:], rejected[-1:]

    return _pairs("ultrafeedback_binarized", rows, split)


def hh_rlhf(rows: Iterable[Row]) -> list[Record]:
    """Adapt rows of `Anthropic/hh-rlhf`: whole dialogues as texts.

    Args:
        rows: with `chosen` and `rejected`, texts of turns that begin with "\\n\\nHuman:" and
            "\\n\\nAssistant:", the same up to the last "\\n\\nAssistant:", and optionally `weight`.

    Returns:
        Records with `prompt`, which ends with that last "\\n\\nAssistant:", and `chosen`,
        `rejected`, what comes after it, and `weight`. Pairs with an empty answer, equal answers
        or two prompts are dropped; a log message counts them.

    Raises:
        ValueError: a row has no `chosen` or no `rejected`, or one that is no text.
    """

    def split(row: Row, where: str) -> _Triple | None:
        for name in PAIR:
            if not isinstance(row[name], str):
                kind = type(row[name]).__name__
                raise ValueError(f"{name}: got {kind} in {where}, wanted a text")
        (prompt, called, chosen), (other, _, rejected) = (
            row[name].rpartition(ASSISTANT) for name in PAIR
        )
        answered = called and chosen.strip() and rejected.strip() and chosen != rejected
        return (prompt + called, chosen, rejected) if answered and prompt == other else None

    return _pairs("hh_rlhf", rows, split, scores=())


def completions(rows: Iterable[Row]) -> list[Record]:
    """Adapt rows of single completions, rated or judged.

    Args:
        rows: with `prompt` and `completion`, texts or chats, and any of `reward`, `score` or
            `rating` (the first with values counts), `group`, `weight`, `desirable`, and `label`,
            TRL's name of the last.

    Returns:
        Records with those columns, the rating as `reward`, `label` as `desirable`; others are
        dropped.

    Raises:
        ValueError: a row has no prompt or no completion, a rating or weight that is no finite
            number, a label that is neither a bool nor 0 or 1, or weights of tokens.
    """
    rows = list(rows)
    rating = column_of(rows, RATINGS)
    records = []
    for index, row in enumerate(rows):
        where = row_at(index)
        require_columns(row, (PROMPT, COMPLETION), where)
        record = {name: row[name] for name in (PROMPT, COMPLETION)}
        for name, source in ((DESIRABLE, column_of([row], LABELS)), (REWARD, rating)):
            if source is not None and row.get(source) is not None:
                record[name] = read_value(source, row[source], where)
        if row.get(GROUP) is not None:
            record[GROUP] = row[GROUP]
        record |= weight_of(row, where)
        records.append(record)
    return records


def lists(rows: Iterable[Row]) -> list[Record]:
    """Adapt rows of lists: the rated completions of a prompt.

    Args:
        rows: with `prompt`, a text or a chat, `completions`, a list of such, and a number for each
            of them in `rewards`, `scores` or `ratings` (the first with values counts); optionally
            `weight`, the list's.

    Returns:
        Records with `prompt`, `completions`, `rewards` (floats) and `weight`. Completions that are
        empty or have no rating (None) are dropped, and lists without any; log messages count them.

    Raises:
        ValueError: a row has no prompt, no completions, not a rating for each, or one that is no
            finite number, a weight that is none, or weights of tokens.
    """
    rows = list(rows)
    rating = column_of(rows, LIST_RATINGS) or REWARDS
    records, dropped, empty = [], 0, 0
    for index, row in enumerate(rows):
        where = row_at(index)
        require_columns(row, (PROMPT, COMPLETIONS, rating), where)
        given, ratings = row[COMPLETIONS] or (), row[rating]
        if ratings is None or len(ratings) != len(given):
            got = "None" if ratings is None else f"{len(ratings)}"
            raise ValueError(
                f"{rating}: got {got} in {where}, wanted one for each of its {len(given)}"
                " completions"
            )
        kept = [
            pair for pair in zip(given, ratings, strict=True) if pair[0] and pair[1] is not None
        ]
        dropped += len(given) - len(kept)
        if not kept:
            empty += 1
            continue
        rewards = [read_value(rating, value, where) for _, value in kept]
        texts = [completion for completion, _ in kept]
        record = {PROMPT: row[PROMPT], COMPLETIONS: texts, REWARDS: rewards}
        records.append(record | weight_of(row, where))
    _report("lists", dropped, "completions")
    _report("lists", empty, "lists")
    return records


def ultrafeedback(rows: Iterable[Row]) -> list[Record]:
    """Adapt rows of `openbmb/UltraFeedback` to rated completions, grouped by prompt.

    The reward is `overall_score`, 1 to 10. Where that is missing, `fine-grained_score`, the mean
    of the aspect ratings, takes its place, stretched linearly from its 1 to 5 onto 1 to 10.

    Args:
        rows: with `instruction` and `completions`, a list of dicts with `response`,
            `overall_score` and `fine-grained_score`; a `weight` beside them is that of each.

    Returns:
        Records with `prompt` and `completion` (each a list of one message), `reward` (float),
        `group` (the row's index) and `weight`. Completions without a response or a score ("N/A",
        None) are dropped; a log message counts them.

    Raises:
        ValueError: a row has no `instruction` or no `completions`, or a weight that is no finite
            number >= 0.
    """
    records, dropped = [], 0
    for group, row in enumerate(rows):
        where = row_at(group)
        require_columns(row, ("instruction", "completions"), where)
        weight = weight_of(row, where)
        for completion in row["completions"]:
            reward = _ultrafeedback_reward(completion)
            if reward is None or not completion["response"] or not row["instruction"]:
                dropped += 1
                continue
            records.append(
                {
                    PROMPT: [{ROLE: "user", CONTENT: row["instruction"]}],
                    COMPLETION: [{ROLE: "assistant", CONTENT: completion["response"]}],
                    REWARD: reward,
                    GROUP: group,
                    **weight,
                }
            )
    _report("ultrafeedback", dropped, "completions")
    return records


def _pairs(
    adapter: str,
    rows: Iterable[Row],
    split: Callable[[Row, str], _Triple | None],
    scores: Iterable[str] = SCORES,
) -> list[Record]:
    """Records of pairs; `split` makes prompt, chosen and rejected of a row, or None of no use."""
    records, dropped = [], 0
    for index, row in enumerate(rows):
        where = row_at(index)
        require_columns(row, PAIR, where)
        triple = split(row, where)
        if triple is None:
            dropped += 1
            continue
        record = dict(zip((PROMPT, *PAIR), triple, strict=True)) | weight_of(row, where)
        if has_values(row, scores):
            record |= {name: read_value(name, row[name], where) for name in scores}
        records.append(record)
    _report(adapter, dropped, "pairs")
    without = sum(not has_values(record, scores) for record in records)
    if without in (0, len(records)):
        return records
    # No loss can use half a column.
    logger.warning(
        "%s: dropped all scores, %d of %d pairs lack them", adapter, without, len(records)
    )
    return [{n: value for n, value in record.items() if n not in scores} for record in records]


def weight_of(row: Row, where: str) -> dict[str, float]:
    """The weight of a row of texts, by the name of its column; {} where the data set has none.

    Args:
        row: of a data set.
        where: which one it is.

    Raises:
        ValueError: it is no finite number >= 0, or there are weights of tokens.
    """
    refuse_token_weights(row, where)
    return {WEIGHT: read_value(WEIGHT, row[WEIGHT], where)} if WEIGHT in row else {}


def _with_prompt(row: Row) -> _Triple:
    chosen, rejected = row[CHOSEN], row[REJECTED]
    if PROMPT in row:
        return row[PROMPT], chosen, rejected
    shortest = min(len(chosen), len(rejected))
    size = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)
    if isinstance(chosen, str):
        # The space goes with the completion, as most tokenizers join it to the next word.
        size = max(chosen.rfind(" ", 0, size), 0)
    return chosen[:size], chosen[size:], rejected[size:]


def _messages(chat: Iterable[Row]) -> list[dict[str, str]]:
    return [{name: message[name] for name in (ROLE, CONTENT)} for message in chat]


def _is_answered(chat: list[dict[str, str]]) -> bool:
    return len(chat) > 1 and chat[-1][ROLE] == "assistant" and bool(chat[-1][CONTENT])


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
