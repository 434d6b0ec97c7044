"""Reductions: from the pairs' losses to the batch's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_prefopt.checks import require_number
from fused_prefopt.losses.metrics import mean


@dataclass(frozen=True, kw_only=True)
class SoftMinimum:
    """Dr. DPO's ``−T log mean exp(−ℓ/T)``: pairs of large loss, probably mislabelled, count less.

    Of several processes the mean is over the pairs of all of them.

    Args:
        temperature: T > 0; the mean as T → ∞.

    Raises:
        ValueError: `temperature` is out of range.

    Source: Dr. DPO (Wu et al. 2024, arXiv:2407.07880), β′ the temperature.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        require_number("temperature", self.temperature, low=0, above=True)

    def __call__(self, losses: Tensor) -> Tensor:
        """0-d loss of (P,) losses; 0 without any."""
        if losses.shape[0] == 0:
            return mean(losses)
        total = torch.logsumexp(-losses / self.temperature, dim=0)
        return self.temperature * (math.log(losses.shape[0]) - total)
