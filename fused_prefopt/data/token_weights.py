"""Weights of a completion's tokens: read from features, and laid out as their labels are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_prefopt.data.columns import (
    PROMPT_IDS,
    TOKEN_WEIGHT_COLUMNS,
    WEIGHTS_OF_IDS,
    feature_at,
    require_columns,
)
from fused_prefopt.data.truncation import cut_side


def token_weights(
    features: Sequence[Mapping[str, Any]],
    completions: Iterable[str],
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
) -> list[Tensor] | None:
    """Weights of every feature's tokens, for one completion column after another.

    Args:
        features: rows of token ids.
        completions: columns of ids, such as `chosen_ids`, whose weights stand in
            `columns.WEIGHTS_OF_IDS`.
        max_length, truncation_mode: of the collator that cuts the tokens; see `cut_side`.

    Returns:
        (tokens,) float32 of each completion, cut as its tokens; None where no feature has weights.

    Raises:
        ValueError: a feature has no weights where another has some, not one a token, or one that is
            negative or not finite.
    """
    pairs = [(column, WEIGHTS_OF_IDS[column]) for column in completions]
    if not any(name in feature for feature in features for _, name in pairs):
        return None
    found = []
    for column, name in pairs:
        for index, feature in enumerate(features):
            where = feature_at(index, feature)
            require_columns(feature, (name,), where)
            weights = _read(name, feature[name], len(feature[column]), where)
            prompt = torch.empty(len(feature[PROMPT_IDS]))
            found.append(cut_side(prompt, weights, max_length, truncation_mode)[1])
    return found


def of_targets(weights: Sequence[Tensor], sequences: Tensor) -> Tensor:
    """Weights of the completions, chosen ones first, in the order of `shared_layout`'s targets."""
    pairs = len(weights) // 2
    counts = sequences.bincount(minlength=len(weights)).tolist()
    order = [side * pairs + pair for pair in range(pairs) for side in range(2)]
    # Nothing predicts the first token behind an empty prompt, which is no target.
    return torch.cat([weights[each][len(weights[each]) - counts[each] :] for each in order])


def spread(weights: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Weights at the places of their tokens, 0 at all others.

    Args:
        weights: of each completion, in the order of the mask's ones.
        mask: `completion_mask`, (S, L) or (1, N), with a one for each weight.

    Raises:
        ValueError: it has more ones, or fewer.
    """
    values, places = torch.cat(list(weights)), int(mask.sum())
    if len(values) != places:
        raise ValueError(
            f"token_weights: got {len(values)} for {places} tokens of completions in the batch,"
            " wanted one each; does the collator cut them to another length?"
        )
    return torch.zeros(mask.shape).masked_scatter(mask.bool(), values)


def refuse_token_weights(row: Mapping[str, Any], where: str) -> None:
    """Raise ValueError if a row of texts or chats has weights of tokens, which it has none of yet.

    Args:
        row: a record.
        where: which row it is.
    """
    for name in TOKEN_WEIGHT_COLUMNS:
        if row.get(name) is not None:
            columns = " and ".join(ids for ids, each in WEIGHTS_OF_IDS.items() if each == name)
            raise ValueError(
                f"{name}: got some with texts in {where}, whose tokens they cannot belong to; give"
                f" a trainer or collator token ids (prompt_ids, {columns}) with them, or the row a"
                " weight in 'weight'"
            )


def _read(name: str, values: Any, tokens: int, where: str) -> Tensor:
    try:
        weights = torch.as_tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: {where} is no list of numbers: {error}") from error
    if weights.shape != (tokens,):
        raise ValueError(
            f"{name}: got shape {tuple(weights.shape)} in {where}, wanted one number for each of"
            f" its {tokens} tokens"
        )
    bad = weights.isfinite().logical_and(weights >= 0).logical_not()
    if bad.any():
        place = int(bad.nonzero()[0])
        raise ValueError(
            f"{name}: got {float(weights[place])} at token {place} of {where}, wanted finite"
            " numbers >= 0"
        )
    return weights
