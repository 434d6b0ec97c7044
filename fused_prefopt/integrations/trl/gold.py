"""Gold completions of pairs in TRL's trainer: tokenised by TRL, as a pair behind their own.

TRL's `TPOTrainer` keeps its tokenisation to itself. That of pairs gives the same token ids of a row
and of a second one behind it, both of whose sides are the gold completion.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from trl import extract_prompt

from fused_prefopt.data.columns import (
    CHOSEN,
    CHOSEN_IDS,
    COMPLETION_IDS,
    GOLD_IDS,
    GOLDS,
    PAIR_IDS,
    PROMPT,
    PROMPT_IDS,
    REJECTED,
    column_of,
    row_at,
)
from fused_prefopt.data.token_weights import refuse_token_weights
from fused_prefopt.integrations.trl.lists import Tokenise, share_prompt, uncut

Rows = Mapping[str, list[Any]]


def with_gold_ids(dataset: Any, name: str, args: Any, tokenise: Tokenise) -> Any:
    """Pairs with a gold completion as rows of token ids; others as they are.

    Args:
        dataset: rows of `chosen`, `rejected` and `gold` or, as TRL names it, `reference`, with a
            `prompt` or all beginning with it; or any other. It may be a stream.
        name: of the data set, as TRL calls it.
        args: of the trainer.
        tokenise: rows of pairs and the configuration to rows of pairs of token ids.

    Raises:
        ValueError: a row has no gold completion, or one without the prompt that its pair begins
            with, or there are weights of tokens.
    """
    first = next(iter(dataset))
    gold = column_of([first], GOLDS)
    if gold is None or CHOSEN_IDS in first:
        return dataset
    refuse_token_weights(first, f"{row_at(0)} of the {name} data")
    if PROMPT not in first:
        dataset = dataset.map(partial(_with_prompt, gold), with_indices=True)
    doubled = dataset.map(partial(_with_its_gold, gold), batched=True, with_indices=True)
    # Batches are of an even number of rows.
    return tokenise(doubled, uncut(args)).map(_joined, batched=True)


def _with_prompt(gold: str, row: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A row with the prompt that chosen and rejected begin with, as TRL finds it, on its own."""
    found = extract_prompt(row)
    start = found[PROMPT]
    if row[gold] is not None and row[gold][: len(start)] != start:
        raise ValueError(
            f"{gold}: got {row[gold]!r} in {row_at(index)}, wanted it to begin with"
            f" {start!r}, as chosen and rejected do; or give all rows a {PROMPT!r}"
        )
    return found | {gold: row[gold] and row[gold][len(start) :]}


def _with_its_gold(gold: str, rows: Rows, indices: list[int]) -> dict[str, list[Any]]:
    """Each row, and behind it the same with the gold completion on both sides."""
    for index, completion in zip(indices, rows[gold], strict=True):
        if not completion:
            raise ValueError(
                f"{gold}: got {completion!r} in {row_at(index)}, wanted a completion; drop the row"
            )
    sides = dict.fromkeys((CHOSEN, REJECTED), gold)
    return {
        name: [
            value
            for pair in zip(rows[name], rows[sides.get(name, name)], strict=True)
            for value in pair
        ]
        for name in rows
    }


def _joined(rows: Rows) -> dict[str, list[Any]]:
    """Each row of token ids with those of the one behind it as its `gold_ids`."""
    joined = {name: values[::2] for name, values in rows.items()} | {GOLD_IDS: []}
    for index, prompt in enumerate(rows[PROMPT_IDS][::2]):
        sides = [{PROMPT_IDS: prompt, COMPLETION_IDS: joined[each][index]} for each in PAIR_IDS]
        behind = (rows[each][2 * index + 1] for each in (PROMPT_IDS, CHOSEN_IDS))
        sides.append(dict(zip((PROMPT_IDS, COMPLETION_IDS), behind, strict=True)))
        share_prompt(sides)
        joined[PROMPT_IDS][index] = sides[0][PROMPT_IDS]
        for each, side in zip(PAIR_IDS, sides[:2], strict=True):
            joined[each][index] = side[COMPLETION_IDS]
        joined[GOLD_IDS].append(sides[2][COMPLETION_IDS])
    return joined
