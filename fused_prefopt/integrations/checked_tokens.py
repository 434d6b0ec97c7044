"""Token ids are checked where they are still on CPU: in the collator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fused_prefopt.checks import require_tokens


@dataclass
class CheckedTokens:
    """A collator whose batches' token ids all have a row in the model's input embedding.

    Args:
        collator: any, of batches with `input_ids`.
        vocab_size: rows of the input embedding.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    vocab_size: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The collator's batch.

        Raises:
            ValueError: a token id is negative, or at least `vocab_size`.
        """
        batch = self.collator(examples)
        for name, ids in batch.items():
            if name.endswith("input_ids"):
                require_tokens(name, ids, self.vocab_size)
        return batch
