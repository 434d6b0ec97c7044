"""The losses that peers fuse with their head, of per-sequence log-probs, written eagerly once.

They hold no reference model (its log-probs are zeros): a reference enters as two constants, and
Liger's fused losses take none that are known already.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# Small enough that no pair of the random batches saturates the sigmoid.
BETA = 0.02
KTO_BETA = 0.002
# Of losses of log-probs per token.
MEAN_BETA, GAMMA = 2.0, 0.5

Objective = Callable[[Tensor, Tensor], Tensor]


def dpo(sums: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Mean of ``−log σ(β (chosen − rejected))`` over the pairs, from sums (S,)."""
    chosen, rejected = sums.chunk(2)
    return -functional.logsigmoid(BETA * (chosen - rejected)).mean()


def simpo(sums: Tensor, lengths: Tensor) -> Tensor:
    """Mean of ``−log σ(β (chosen − rejected) − γ)``, log-probs per token."""
    chosen, rejected = (sums / lengths).chunk(2)
    return -functional.logsigmoid(MEAN_BETA * (chosen - rejected) - GAMMA).mean()


def cpo(sums: Tensor, lengths: Tensor) -> Tensor:
    """DPO plus the negative log-likelihood of the chosen tokens."""
    return dpo(sums) + _likelihood(sums, lengths)


def orpo(sums: Tensor, lengths: Tensor) -> Tensor:
    """The odds ratio of log-probs per token plus the negative log-likelihood of the chosen."""
    means = sums / lengths
    chosen, rejected = (means - torch.log1p(-means.exp())).chunk(2)
    return -BETA * functional.logsigmoid(chosen - rejected).mean() + _likelihood(sums, lengths)


def kto(sums: Tensor, lengths: Tensor) -> Tensor:
    """Mean of ``1 − σ(±β logp)``, the chosen half desirable, the KL zero."""
    chosen, rejected = sums.chunk(2)
    return (1 - torch.sigmoid(KTO_BETA * torch.cat([chosen, -rejected]))).mean()


def _likelihood(sums: Tensor, lengths: Tensor) -> Tensor:
    half = sums.shape[0] // 2
    return -sums[:half].sum() / lengths[:half].sum()


OBJECTIVES: dict[str, Objective] = {
    "dpo": dpo,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
    "kto": kto,
}
