"""Rated completions from documents: several per prompt, each with its own reward."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from fused_prefopt.data.corruptions import CORRUPTIONS
from fused_prefopt.data.docstrings import Document
from fused_prefopt.data.prompts import PromptPool


def make_points(
    documents: Iterable[Document],
    *,
    seed: int = 0,
    completions: int = 4,
    kinds: Sequence[str] = tuple(CORRUPTIONS),
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Rate the true continuation and some spoilt ones of every paragraph.

    Args:
        documents: one side of `split_documents`.
        seed: another seed gives other cuts and corruptions.
        completions: per prompt, the true one included; now and then one fewer, when two
            corruptions coincide.
        kinds: names in `CORRUPTIONS`.
        limit: number of prompts to keep, drawn evenly over all documents; None keeps all.

    Returns:
        Records with `prompt`, `completion` (texts), `reward` (1 for the true continuation,
        1 − severity for a spoilt one) and `group`, 0, 1, … per prompt. A prompt's completions
        stand together, the true one first; prompts come in a shuffled order.

    Raises:
        ValueError: `completions` is below 1, or fewer than two documents have a paragraph.
    """
    if completions < 1:
        raise ValueError(f"completions: got {completions}, wanted at least 1")
    pool = PromptPool(documents, seed)
    prompts = pool.prompts
    random.Random(f"{seed}/order").shuffle(prompts)
    records = []
    for group, prompt in enumerate(prompts[:limit]):
        rated = [(prompt.continuation, 1.0)] + [
            (corruption.text, 1.0 - corruption.severity)
            for _, corruption in pool.corrupted(prompt, completions - 1, kinds)
        ]
        records += [
            {"prompt": prompt.text, "completion": text, "reward": reward, "group": group}
            for text, reward in rated
        ]
    return records
