"""A plain training loop: shuffled batches, AdamW, warm-up, cosine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from fused_prefopt.data import GroupBatchSampler

Batch = dict[str, Any]


def shuffled_batches(
    features: Sequence[dict[str, Any]],
    groups: Sequence[int],
    collator: Callable[[list[dict[str, Any]]], Batch],
    size: int,
    seed: int,
) -> Iterator[Batch]:
    """Collated batches, epoch after epoch, without end.

    Args:
        features: of the data set.
        groups: of each feature; what has the same stays in one batch.
        collator: makes a batch of features.
        size: features of a batch.
        seed: of the order.
    """
    sampler = GroupBatchSampler(groups, size, seed=seed)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        for indices in sampler:
            yield collator([features[index] for index in indices])


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

    Raises:
        FloatingPointError: `update` does.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimiser, max(1, steps // 10), steps)
    model.train()
    for batch in batches:
        update(model, optimiser, loss_of(batch))
        schedule.step()
    model.eval()


def update(model: nn.Module, optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down a loss, with a gradient of norm 1 at most.

    Args:
        model: whose weights are trained.
        optimiser: of its weights.
        loss: scalar.

    Raises:
        FloatingPointError: the loss or its gradient is not finite; no weight has moved.
    """
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not (loss.isfinite() and norm.isfinite()):
        raise FloatingPointError(
            f"got a loss of {loss.item():.4g} whose gradient has the norm {norm.item():.4g}, needs"
            " finite numbers; the weights are those before this step: look at the data and the"
            " learning rate"
        )
    optimiser.step()
    optimiser.zero_grad()
