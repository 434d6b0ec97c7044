"""Twelve rated completions of five prompts as a batch, and what pairs there are of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from loss_cases import random_batch, vector

from fused_prefopt import LogpBatch

# Lists of 4, 1, 3, 2 and 2 completions, mixed; the fourth list is all one score, the first has a
# tie.
GROUPS = torch.tensor([7, 3, 7, 5, 9, 5, 7, 2, 9, 5, 7, 2])
SCORES = vector(2.0, 1.0, 0.5, 3.0, 1.0, -1.0, 2.0, 0.0, 1.0, 0.0, -1.0, 4.0)
# 4 completions with one tie: 5 pairs; none; 3; none; 1.
PAIRS = {7: 5, 3: 0, 5: 3, 9: 0, 2: 1}


def lists(**fields) -> LogpBatch:
    batch = random_batch(12, seed=4)
    fields = {"groups": GROUPS, "rewards": SCORES, "completions": None} | fields
    return dataclasses.replace(batch, **fields)


def beaten(winner: int) -> list[int]:
    return [j for j in range(12) if GROUPS[j] == GROUPS[winner] and SCORES[j] < SCORES[winner]]


def members(group: int) -> list[int]:
    return [i for i in range(12) if GROUPS[i] == group]


def mean_over_lists(of_list: Callable[[int], torch.Tensor | float]) -> torch.Tensor:
    return sum(of_list(group) for group in PAIRS) / len(PAIRS)


def part(batch: LogpBatch, rows: slice | list[int] | torch.Tensor) -> LogpBatch:
    fields = {name: getattr(batch, name) for name in batch.given}
    return LogpBatch(**{name: x[rows] if x.dim() else x for name, x in fields.items()})
