"""Who is measured: our paths and their peers, each as one forward and backward of the same DPO.

The loss is DPO without a reference model (its log-probs are zeros): a reference enters as two
constants, and Liger's fused loss takes none that are known already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.shapes import IGNORE_INDEX, Problem
from fused_prefopt import LMHead, sequence_logps

# Small enough that no pair of the random batches saturates the sigmoid.
BETA = 0.02

# Fields of a candidate: which gradients a step asks for.
NOTHING, HIDDEN, HEAD = "nothing", "hidden", "hidden and head"

Forward = Callable[[Problem], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Candidate:
    """One implementation under one demand.

    Attributes:
        name: what results are filed under.
        forward: problem → per-sequence log-probs (S,) and the loss.
        trains: which gradients the step asks for.
        logits_copies: fp32 (S * T, V) tensors that are alive at its peak; 0 where it builds none.
        ours: whether it is `fused_prefopt`.
        compiles: whether its first step on a shape compiles code.
    """

    name: str
    forward: Forward
    trains: str = HEAD
    logits_copies: float = 0.0
    ours: bool = False
    compiles: bool = False


def dpo(sums: Tensor) -> Tensor:
    """Mean of ``−log σ(β (chosen − rejected))`` over the pairs, from sums (S,)."""
    chosen, rejected = sums.chunk(2)
    return -functional.logsigmoid(BETA * (chosen - rejected)).mean()


def step(candidate: Candidate, problem: Problem) -> Tensor:
    """One forward, and a backward where the candidate trains something; returns the sums (S,)."""
    problem.clear()
    problem.hidden.requires_grad_(candidate.trains != NOTHING)
    problem.weight.requires_grad_(candidate.trains == HEAD)
    with torch.set_grad_enabled(candidate.trains != NOTHING):
        sums, loss = candidate.forward(problem)
        if candidate.trains != NOTHING:
            loss.backward()
    return sums.detach()


def _ours(path: str, problem: Problem) -> tuple[Tensor, Tensor]:
    head = LMHead(problem.weight, softcap=problem.shape.softcap)
    out = sequence_logps(problem.hidden, head, problem.labels, path=path)
    return out.sums, dpo(out.sums)


def _eager(problem: Problem) -> tuple[Tensor, Tensor]:
    """As Hugging Face models and losses compute it: the logits of every row, then fp32."""
    logits = (problem.hidden @ problem.weight.t())[:, :-1].float()
    logps = _capped(logits, problem).log_softmax(-1)
    targets = problem.labels[:, 1:]
    mask = targets != IGNORE_INDEX
    picked = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    sums = (picked * mask).sum(-1)
    return sums, dpo(sums)


def _eager_labelled(problem: Problem) -> tuple[Tensor, Tensor]:
    """The same on the labelled rows only."""
    mask = problem.targets != IGNORE_INDEX
    logits = (problem.hidden[mask] @ problem.weight.t()).float()
    logps = _capped(logits, problem).log_softmax(-1)
    return _scored(logps.gather(-1, problem.targets[mask].unsqueeze(-1)).squeeze(-1), mask)


def _trl(problem: Problem) -> tuple[Tensor, Tensor]:
    """As `trl.trainer.add_fused_lm_head` calls it, with its token compaction (which TRL leaves out
    on CPU) and log-probs alone (DPOTrainer also asks for three metrics)."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    targets = problem.labels[:, 1:]
    mask = targets != IGNORE_INDEX
    logps = ChunkedLogProbFunction.apply(
        problem.hidden[:, :-1][mask],
        problem.weight,
        None,
        targets[mask],
        1.0,
        _CHUNKED_LOGPROB_CHUNK_SIZE,
        problem.shape.softcap,
        1.0,
        ("log_probs",),
    )[0]
    return _scored(logps, mask)


def _liger(problem: Problem) -> tuple[Tensor, Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    _require_no_softcap(problem)
    loss_of = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)
    loss, (chosen, rejected, *_) = loss_of(problem.weight, problem.hidden, problem.targets)
    return torch.cat([chosen, rejected]), loss


def _cut_cross_entropy(problem: Problem) -> tuple[Tensor, Tensor]:
    """Its Triton kernels need CUDA; elsewhere it offers its own compiled PyTorch."""
    from cut_cross_entropy import linear_cross_entropy

    losses = linear_cross_entropy(
        problem.hidden,
        problem.weight,
        problem.targets,
        ignore_index=IGNORE_INDEX,
        softcap=problem.shape.softcap,
        reduction="none",
        impl="cce" if problem.hidden.is_cuda else "torch_compile",
    )
    sums = -losses.float().sum(-1)
    return sums, dpo(sums)


def _torch_linear_cross_entropy(problem: Problem) -> tuple[Tensor, Tensor]:
    # Looked up by name: torch has both from 2.13 on, older ones fail here and are reported so.
    fused: Any = getattr(functional, "linear_cross_entropy")  # noqa: B009
    options: Any = getattr(torch.nn, "LinearCrossEntropyOptions")  # noqa: B009
    _require_no_softcap(problem)
    mask = problem.targets != IGNORE_INDEX
    losses = fused(
        problem.hidden[mask],
        problem.weight,
        problem.targets[mask],
        reduction="none",
        options=options(),
    )
    return _scored(-losses.float(), mask)


def _scored(logps: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and loss from the log-probs (n,) of the rows that `mask` (S, T) selects."""
    sums = logps.new_zeros(mask.shape).masked_scatter(mask, logps).sum(-1)
    return sums, dpo(sums)


def _capped(logits: Tensor, problem: Problem) -> Tensor:
    cap = problem.shape.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _require_no_softcap(problem: Problem) -> None:
    if problem.shape.softcap is not None:
        raise NotImplementedError("has no softcap")


_ALL = (
    Candidate("ours: evaluate", partial(_ours, "evaluate"), NOTHING, ours=True),
    Candidate("ours: stash", partial(_ours, "stash"), HIDDEN, ours=True),
    Candidate("ours: local", partial(_ours, "local"), HEAD, ours=True),
    Candidate("ours: recompute", partial(_ours, "recompute"), HEAD, ours=True),
    Candidate("ours: auto", partial(_ours, "auto"), HEAD, ours=True),
    Candidate("TRL: no gradient", _trl, NOTHING),
    Candidate("TRL: frozen head", _trl, HIDDEN),
    Candidate("TRL", _trl),
    Candidate("Liger", _liger, compiles=True),
    Candidate("cut-cross-entropy", _cut_cross_entropy, compiles=True),
    Candidate("torch linear_cross_entropy", _torch_linear_cross_entropy),
    Candidate("eager, labelled rows", _eager_labelled, logits_copies=2.0),
    Candidate("eager", _eager, logits_copies=4.0),
)
CANDIDATES = {candidate.name: candidate for candidate in _ALL}
# On one shape the automatic choice is one of our paths, so only the sweep measures it.
ON_ONE_SHAPE = tuple(name for name in CANDIDATES if name != "ours: auto")
IN_SWEEP = ("ours: auto", "ours: recompute", "TRL", "eager")
