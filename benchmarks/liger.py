"""Liger's fused losses and its per-token function, each as a candidate's forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.objectives import BETA, GAMMA, KTO_BETA, MEAN_BETA, dpo
from benchmarks.shapes import IGNORE_INDEX, Problem

# Objective → class, its arguments, and whether its log-probs are per token.
_CHUNKED: dict[str, tuple[str, dict[str, Any], bool]] = {
    "dpo": ("DPO", {"beta": BETA, "use_ref_model": False}, False),
    "simpo": ("SimPO", {"beta": MEAN_BETA, "gamma": GAMMA, "compute_nll_loss": False}, True),
    "cpo": ("CPO", {"beta": BETA}, False),
    "orpo": ("ORPO", {"beta": BETA}, True),
    "kto": ("KTO", {"beta": KTO_BETA, "use_ref_model": False}, False),
}


def chunked(objective: str, problem: Problem) -> tuple[Tensor, Tensor]:
    """One of the chunked losses; of KTO only the sums of the two halves are returned, (2,)."""
    from liger_kernel import chunked_loss

    problem.require_no_softcap()
    name, arguments, per_token = _CHUNKED[objective]
    loss_of = getattr(chunked_loss, f"LigerFusedLinear{name}Loss")(**arguments)
    if objective == "kto":
        return _kto(loss_of, problem)
    loss, (chosen, rejected, *_) = loss_of(problem.weight, problem.hidden, problem.targets)
    logps = torch.cat([chosen, rejected])
    return (logps * problem.lengths if per_token else logps), loss


def per_token(problem: Problem) -> tuple[Tensor, Tensor]:
    """Its newest function: a negative log-likelihood for each row, any loss behind it."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    problem.require_no_softcap()
    losses = LigerFusedLinearScaledCrossEntropyFunction.apply(
        problem.hidden.flatten(0, 1),
        problem.weight,
        problem.targets.flatten(),
        1.0,
        IGNORE_INDEX,
    )
    sums = -losses.view(problem.targets.shape).sum(-1)
    return sums, dpo(sums)


def _kto(loss_of: Any, problem: Problem) -> tuple[Tensor, Tensor]:
    size = problem.shape.sequences
    desirable = torch.arange(size, device=problem.hidden.device) < size // 2
    loss, (chosen, rejected, *_) = loss_of(
        problem.hidden, problem.weight, problem.targets, preference_labels=desirable
    )
    return torch.stack([chosen, rejected]), loss
