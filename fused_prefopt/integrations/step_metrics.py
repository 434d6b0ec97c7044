"""Metrics of training steps: kept where they are until they are logged, then means over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Name → (value, weight) of one step.
Step = Mapping[str, tuple[float, float]]


class StepMetrics:
    """Metrics of the steps since the last log, on their own device, so that no step waits for it.

    What is logged is TRL's: of every step the mean over the batch of all ranks, then the mean over
    the steps that have a value.
    """

    def __init__(self) -> None:
        self._names: list[list[str]] = []
        self._values: list[Tensor] = []

    def add(self, metrics: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Keep a step's metrics.

        Args:
            metrics: 0-d tensors of this rank, means over its batch.
            weights: 0-d tensors, how many pairs, completions or tokens each is a mean over; 0
                where it has no value.
        """
        pairs = [torch.stack([metrics[name].double(), weights[name].double()]) for name in metrics]
        if pairs:
            self._names.append(list(metrics))
            self._values.append(torch.stack(pairs))

    def forget(self) -> None:
        """Drop what was kept."""
        self._names, self._values = [], []

    def pop(self) -> dict[str, float]:
        """Means over ranks and steps since the last call. Every rank must make the call."""
        steps: list[Step] = []
        if self._values:
            numbers = iter(torch.cat(self._values).tolist())
            steps = [{name: tuple(next(numbers)) for name in names} for names in self._names]
        self.forget()
        ranks = [steps]
        if dist.is_available() and dist.is_initialized():
            # As objects: a rank without a batch has no names to agree on.
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, steps)
            ranks = gathered
        longest = max(len(steps) for steps in ranks)
        merged = [_merged([steps[i] for steps in ranks if i < len(steps)]) for i in range(longest)]
        names = dict.fromkeys(name for step in merged for name in step)
        return {name: _mean([step[name] for step in merged if name in step]) for name in names}


def _merged(ranks: list[Step]) -> dict[str, float]:
    """One step of all ranks: weighted means, standard deviations of the whole, exact margins."""
    means = {}
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        parts = [rank[name] for rank in ranks if name in rank and rank[name][1] > 0]
        if parts:
            means[name] = _weighted(parts)
    for name in [name for name in means if name.endswith("/std") and len(ranks) > 1]:
        center = f"{name.removesuffix('/std')}/mean"
        squares = [
            (rank[name][0] ** 2 + rank[center][0] ** 2, rank[name][1])
            for rank in ranks
            if name in rank and rank[name][1] > 0
        ]
        means[name] = max(0.0, _weighted(squares) - means[center] ** 2) ** 0.5
    halves = [means[name] for name in ("rewards/chosen", "rewards/rejected") if name in means]
    if len(halves) == 2:
        means["rewards/margins"] = halves[0] - halves[1]
    else:
        means.pop("rewards/margins", None)
    return means


def _weighted(parts: list[tuple[float, float]]) -> float:
    return sum(value * weight for value, weight in parts) / sum(weight for _, weight in parts)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
