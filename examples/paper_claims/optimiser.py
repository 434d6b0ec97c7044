"""A plain training loop: AdamW, warm-up, cosine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

Batch = dict[str, Any]


def optimise(
    model: nn.Module,
    batches: Iterable[Batch],
    steps: int,
    learning_rate: float,
    loss_of: Callable[[Batch], Tensor],
) -> None:
    """Train a model; it is in eval mode afterwards.

    Args:
        model: whose weights are trained.
        batches: one for each step.
        steps: how many, for the schedule.
        learning_rate: at its highest, after a tenth of the steps.
        loss_of: scalar loss of a batch.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimiser, max(1, steps // 10), steps)
    model.train()
    for batch in batches:
        loss_of(batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    model.eval()
