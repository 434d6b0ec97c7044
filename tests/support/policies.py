"""Token log-probs and entropies with their gradients: ours and eager float64's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from truth import Case, Result, aligned, leaves_of, true_logits

from fused_prefopt import token_policy


def moved(values: Tensor, labels: Tensor) -> Tensor:
    """(S, T) of each row, at the label that it predicts, 0 elsewhere."""
    entries = torch.cat([torch.zeros_like(values[:, :1]), values[:, :-1]], 1)
    there = labels != -100
    there[:, 0] = False
    return entries.where(there, 0.0)


def eager_policy(case: Case) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (S, T), differentiable."""
    logps = true_logits(case).log_softmax(-1)
    return aligned(logps, case.labels), moved(-(logps.exp() * logps).sum(-1), case.labels)


def differentiated(case: Case, logps: Tensor, entropies: Tensor, seed: int = 2) -> Result:
    """Both under random upstream gradients; entropies stand in for a result's tokens."""
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(2, *case.labels.shape, generator=generator, dtype=torch.float64)
    (logps.double() * upstream[0] + entropies.double() * upstream[1]).sum().backward()
    grads = (case.hidden.grad, case.weight.grad, None if case.bias is None else case.bias.grad)
    return Result(logps.detach(), entropies.detach(), grads)


def policies(case: Case, needs: tuple[bool, bool, bool], **options: Any) -> tuple[Result, Result]:
    """Ours in the case's dtype, and the truth."""
    truth = leaves_of(case.double(), needs)
    truth = differentiated(truth, *eager_policy(truth))
    ours = leaves_of(case, needs)
    policy = token_policy(ours.hidden, ours.head, ours.labels, **options)
    return differentiated(ours, policy.logps, policy.entropies), truth
