"""Weightings: how much a pair counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fused_prefopt.losses.needs import halves, per_token
from fused_prefopt.types import LogpBatch


@dataclass(frozen=True, kw_only=True)
class OnPolicyWeights:
    """WPO's ``w = exp(L̄_w − C̄_w) · exp(L̄_l − C̄_l)``: pairs the policy might write count more.

    C is `collision`, the sum over tokens of ``log Σ_v π_θ(v)²``, which makes a token sampled from
    the policy count 1; without it C = 0 and all weights are likelihoods.

    Source: WPO (Zhou et al. 2024, arXiv:2406.11827), eq. 2, with sampled alignment.
    """

    wants: ClassVar[frozenset[str]] = frozenset({"collision"})

    @torch.no_grad()
    def __call__(self, batch: LogpBatch) -> Tensor:
        """(P,) weights, detached."""
        logps = batch.policy if batch.collision is None else batch.policy - batch.collision
        chosen, rejected = halves(per_token(logps, batch))
        return (chosen + rejected).exp()
