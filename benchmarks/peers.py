"""Who is measured: our paths and their peers, each as one forward and backward of the same loss.

The loss is DPO, but for peers that fuse another one with their head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import liger
from benchmarks.objectives import dpo
from benchmarks.shapes import IGNORE_INDEX, Problem
from fused_prefopt import LMHead, sequence_logps

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
        objective: the loss, a name of `OBJECTIVES`.
    """

    name: str
    forward: Forward
    trains: str = HEAD
    logits_copies: float = 0.0
    ours: bool = False
    compiles: bool = False
    objective: str = "dpo"


def step(candidate: Candidate, problem: Problem) -> Tensor:
    """One forward, and a backward where the candidate trains something; returns the sums (S,)."""
    sums, loss = forward(candidate, problem)
    if candidate.trains != NOTHING:
        loss.backward()
    return sums.detach()


def forward(candidate: Candidate, problem: Problem) -> tuple[Tensor, Tensor]:
    """A forward that a backward may follow: the sums and the loss."""
    problem.clear()
    problem.hidden.requires_grad_(candidate.trains != NOTHING)
    problem.weight.requires_grad_(candidate.trains == HEAD)
    with torch.set_grad_enabled(candidate.trains != NOTHING):
        return candidate.forward(problem)


def ours(path: str, problem: Problem, **options: Any) -> tuple[Tensor, Tensor]:
    """`sequence_logps` on a path, with its other options."""
    head = LMHead(problem.weight, softcap=problem.shape.softcap)
    # As trainers do: counting them would wait for a GPU.
    options = {"num_labels": problem.shape.labelled_rows, **options}
    out = sequence_logps(problem.hidden, head, problem.labels, path=path, **options)
    return out.sums, dpo(out.sums)


def ours_with_room(path: str, engine: str, problem: Problem) -> tuple[Tensor, Tensor]:
    """The default workspace; `local` gets the probabilities that it keeps, an eighth more for what
    goes with the rows, and 512 MiB."""
    kept = problem.shape.labelled_rows * problem.shape.vocab * problem.hidden.element_size()
    room = kept * 1.125 / 2**20 + 512 if path == "local" else None
    return ours(path, problem, engine=engine, workspace_mb=room)


def _half_kept(problem: Problem) -> tuple[Tensor, Tensor]:
    """With room for the probabilities of half of the rows, and for a tile beside them."""
    shape, hidden = problem.shape, problem.hidden
    kept = shape.labelled_rows * shape.vocab * hidden.element_size() / 2
    return ours("auto", problem, workspace_mb=1.0625 * kept / 2**20 + 16)


def _eager(problem: Problem) -> tuple[Tensor, Tensor]:
    """As Hugging Face models and losses compute it: the logits of every row, then fp32."""
    sums = _eager_sums(problem.hidden, problem.weight, problem.labels, problem.shape.softcap)
    return sums, dpo(sums)


def _eager_single(problem: Problem) -> tuple[Tensor, Tensor]:
    """With fp32 logits, from operands in fp32."""
    operands = problem.hidden.float(), problem.weight.float()
    sums = _eager_sums(*operands, problem.labels, problem.shape.softcap)
    return sums, dpo(sums)


def _eager_compiled(problem: Problem) -> tuple[Tensor, Tensor]:
    sums = _compiled()(problem.hidden, problem.weight, problem.labels, problem.shape.softcap)
    return sums, dpo(sums)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_eager_sums, dynamic=False)


def _eager_sums(hidden: Tensor, weight: Tensor, labels: Tensor, cap: float | None) -> Tensor:
    logits = (hidden @ weight.t())[:, :-1].float()
    logps = _capped(logits, cap).log_softmax(-1)
    targets = labels[:, 1:]
    mask = targets != IGNORE_INDEX
    picked = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (picked * mask).sum(-1)


def _eager_labelled(problem: Problem) -> tuple[Tensor, Tensor]:
    """The same on the labelled rows only."""
    mask = problem.targets != IGNORE_INDEX
    logits = (problem.hidden[mask] @ problem.weight.t()).float()
    logps = _capped(logits, problem.shape.softcap).log_softmax(-1)
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


def _cut_cross_entropy(problem: Problem, **options: Any) -> tuple[Tensor, Tensor]:
    """Its Triton kernels need CUDA; elsewhere it offers its own compiled PyTorch."""
    from cut_cross_entropy import linear_cross_entropy

    if options and not problem.hidden.is_cuda:
        raise NotImplementedError("filters its gradient on CUDA only")

    losses = linear_cross_entropy(
        problem.hidden,
        problem.weight,
        problem.targets,
        ignore_index=IGNORE_INDEX,
        softcap=problem.shape.softcap,
        reduction="none",
        impl="cce" if problem.hidden.is_cuda else "torch_compile",
        **options,
    )
    sums = -losses.float().sum(-1)
    return sums, dpo(sums)


def _torch_linear_cross_entropy(problem: Problem) -> tuple[Tensor, Tensor]:
    # Looked up by name: torch has both from 2.13 on, older ones fail here and are reported so.
    fused: Any = getattr(functional, "linear_cross_entropy")  # noqa: B009
    options: Any = getattr(torch.nn, "LinearCrossEntropyOptions")  # noqa: B009
    problem.require_no_softcap()
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


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


_ALL = (
    Candidate("ours: evaluate", partial(ours, "evaluate"), NOTHING, ours=True),
    Candidate("ours: stash", partial(ours, "stash"), HIDDEN, ours=True),
    Candidate("ours: local", partial(ours, "local"), HEAD, ours=True),
    Candidate("ours: half kept", _half_kept, HEAD, ours=True),
    Candidate("ours: recompute", partial(ours, "recompute"), HEAD, ours=True),
    Candidate("ours: auto", partial(ours, "auto"), HEAD, ours=True),
    Candidate("TRL: no gradient", _trl, NOTHING),
    Candidate("TRL: frozen head", _trl, HIDDEN),
    Candidate("TRL", _trl),
    Candidate("Liger", partial(liger.chunked, "dpo"), compiles=True),
    Candidate("Liger: per token", liger.per_token),
    Candidate("cut-cross-entropy", _cut_cross_entropy, compiles=True),
    Candidate(
        "cut-cross-entropy: full gradient",
        partial(_cut_cross_entropy, filter_eps=None),
        compiles=True,
    ),
    Candidate("torch linear_cross_entropy", _torch_linear_cross_entropy),
    Candidate("eager, compiled", _eager_compiled, logits_copies=4.0, compiles=True),
    Candidate("eager, fp32 logits", _eager_single, logits_copies=4.0),
    Candidate("eager, labelled rows", _eager_labelled, logits_copies=2.0),
    Candidate("eager", _eager, logits_copies=4.0),
    *(
        Candidate(f"Liger: {name}", partial(liger.chunked, name), compiles=True, objective=name)
        for name in ("simpo", "cpo", "orpo", "kto")
    ),
)
CANDIDATES = {candidate.name: candidate for candidate in _ALL}
# Peers that fuse a loss other than DPO.
OTHER_LOSSES = tuple(c.name for c in _ALL if c.objective != "dpo")
# Slow ones, and those that stand for a variant of another: only the grid measures them.
IN_GRID = (
    "Liger: per token",
    "cut-cross-entropy: full gradient",
    "torch linear_cross_entropy",
    "eager, compiled",
    "eager, fp32 logits",
)
# On one shape the automatic choice is one of our paths, so only the sweep measures it.
ON_ONE_SHAPE = tuple(c for c in CANDIDATES if c not in ("ours: auto", *IN_GRID, *OTHER_LOSSES))
IN_SWEEP = ("ours: auto", "ours: recompute", "TRL", "eager")
