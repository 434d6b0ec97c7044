"""Weights of tokens in TRL's trainers, whose rows must then be token ids when they are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fused_prefopt.data.columns import (
    COMPLETION_IDS,
    COMPLETION_MASK,
    MISMATCHED,
    PAIR_IDS,
    SEGMENTS,
    TOKEN_WEIGHT_COLUMNS,
    TOKEN_WEIGHTS,
)
from fused_prefopt.data.token_weights import refuse_token_weights, spread, token_weights

# Columns that must reach the collators.
WEIGHT_COLUMNS = (*TOKEN_WEIGHT_COLUMNS, f"{MISMATCHED}{TOKEN_WEIGHTS}")


def require_ids_of_weights(row: Mapping[str, Any], where: str) -> None:
    """Raise ValueError if a row has weights of tokens, and texts or images instead of tokens.

    Args:
        row: the first of a data set.
        where: which one it is.
    """
    if not any(name in row for name in (*PAIR_IDS, COMPLETION_IDS)):
        refuse_token_weights(row, where)


@dataclass
class WeightedTokens:
    """A collator of rows of token ids that also lays out the weights of the tokens, where given.

    Args:
        collator: of TRL, or of this package, which may have laid them out already.
        pairwise: whether rows are pairs.
        max_length: to which the collator cuts, or None.
        truncation_mode: "keep_start" or "keep_end".
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    pairwise: bool
    max_length: int | None
    truncation_mode: str

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        sides: dict[str, tuple[str, ...]] = {"": PAIR_IDS}
        if not self.pairwise:
            sides = {prefix: (f"{prefix}{COMPLETION_IDS}",) for prefix in ("", MISMATCHED)}
        for prefix, columns in sides.items():
            name, mask = f"{prefix}{TOKEN_WEIGHTS}", batch.get(f"{prefix}{COMPLETION_MASK}")
            if mask is None or name in batch or SEGMENTS in batch:
                continue
            weights = token_weights(examples, columns, self.max_length, self.truncation_mode)
            if weights is not None:
                batch[name] = spread(weights, mask)
        return batch
