"""Preference pairs from documents: the true continuation against a spoilt one."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from fused_prefopt.data.corruptions import CORRUPTIONS
from fused_prefopt.data.docstrings import Document
from fused_prefopt.data.prompts import PromptPool


def make_pairs(
    documents: Iterable[Document],
    *,
    seed: int = 0,
    flip_rate: float = 0.0,
    per_prompt: int = 1,
    kinds: Sequence[str] = tuple(CORRUPTIONS),
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Make one or more preference pairs of every paragraph.

    The same arguments give the same pairs in every process. `flip_rate` changes which side is
    called chosen and nothing else.

    Args:
        documents: one side of `split_documents`.
        seed: another seed gives other cuts, corruptions and flips.
        flip_rate: fraction of pairs with a wrong label, in [0, 1]; exactly round(rate · pairs).
        per_prompt: pairs per paragraph, each with another corruption.
        kinds: names in `CORRUPTIONS`.
        limit: number of pairs to keep, drawn evenly over all documents; None keeps all.

    Returns:
        Records with `prompt`, `chosen`, `rejected` (texts), `score_chosen` = 1,
        `score_rejected` = 1 − severity, `corruption` (the kind) and `flipped`. Pairs come in a
        shuffled order. A flipped pair has its texts exchanged and keeps its scores: the annotator
        was wrong about both, and only `flipped` tells.

    Raises:
        ValueError: `flip_rate` is outside [0, 1], or fewer than two documents have a paragraph.
    """
    if not 0 <= flip_rate <= 1:
        raise ValueError(f"flip_rate: got {flip_rate}, wanted a fraction in [0, 1]")
    pool = PromptPool(documents, seed)
    records: list[dict[str, Any]] = [
        {
            "prompt": prompt.text,
            "chosen": prompt.continuation,
            "rejected": corruption.text,
            "score_chosen": 1.0,
            "score_rejected": 1.0 - corruption.severity,
            "corruption": kind,
            "flipped": False,
        }
        for prompt in pool.prompts
        for kind, corruption in pool.corrupted(prompt, per_prompt, kinds)
    ]
    random.Random(f"{seed}/order").shuffle(records)
    records = records[:limit]
    flips = random.Random(f"{seed}/flips").sample(
        range(len(records)), round(flip_rate * len(records))
    )
    for index in flips:
        record = records[index]
        record["chosen"], record["rejected"] = record["rejected"], record["chosen"]
        record["flipped"] = True
    return records
