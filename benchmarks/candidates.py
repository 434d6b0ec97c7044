"""Candidates: our paths and their peers, each as one forward and backward of the same loss.

The loss is DPO, but for peers that fuse another one with their head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.shapes import IGNORE_INDEX, Problem
from fused_prefopt import LMHead, sequence_logps

# The objectives hold no reference model (its log-probs are zeros): a reference enters as two
# constants, and Liger's fused losses take none that are known already.

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


# Objective → class, its arguments, and whether its log-probs are per token.
_LIGER: dict[str, tuple[str, dict[str, Any], bool]] = {
    "dpo": ("DPO", {"beta": BETA, "use_ref_model": False}, False),
    "simpo": ("SimPO", {"beta": MEAN_BETA, "gamma": GAMMA, "compute_nll_loss": False}, True),
    "cpo": ("CPO", {"beta": BETA}, False),
    "orpo": ("ORPO", {"beta": BETA}, True),
    "kto": ("KTO", {"beta": KTO_BETA, "use_ref_model": False}, False),
}


def liger_chunked(objective: str, problem: Problem) -> tuple[Tensor, Tensor]:
    """One of the chunked losses; of KTO only the sums of the two halves are returned, (2,)."""
    from liger_kernel import chunked_loss

    problem.require_no_softcap()
    name, arguments, per_token = _LIGER[objective]
    loss_of = getattr(chunked_loss, f"LigerFusedLinear{name}Loss")(**arguments)
    if objective == "kto":
        return _liger_kto(loss_of, problem)
    loss, (chosen, rejected, *_) = loss_of(problem.weight, problem.hidden, problem.targets)
    logps = torch.cat([chosen, rejected])
    return (logps * problem.lengths if per_token else logps), loss


def liger_per_token(problem: Problem) -> tuple[Tensor, Tensor]:
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


def _liger_kto(loss_of: Any, problem: Problem) -> tuple[Tensor, Tensor]:
    size = problem.shape.sequences
    desirable = torch.arange(size, device=problem.hidden.device) < size // 2
    loss, (chosen, rejected, *_) = loss_of(
        problem.hidden, problem.weight, problem.targets, preference_labels=desirable
    )
    return torch.stack([chosen, rejected]), loss


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
    Candidate("Liger", partial(liger_chunked, "dpo"), compiles=True),
    Candidate("Liger: per token", liger_per_token),
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
        Candidate(f"Liger: {name}", partial(liger_chunked, name), compiles=True, objective=name)
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


# Path → what a step on it trains.
TRAINS = {"evaluate": NOTHING, "stash": HIDDEN, "local": HEAD, "recompute": HEAD}
ENGINES = ("cublas", "triton")


def forced(path: str, engine: str) -> Candidate:
    """A path on an engine, in the default workspace; `local` gets what it needs."""
    run = partial(ours_with_room, path, engine)
    return Candidate(f"ours: {path}, {engine}", run, TRAINS[path], ours=True)


AUTO = replace(CANDIDATES["ours: auto"], name="ours: auto, auto")
# What a caller gets who asks for nothing, by what the step trains; and TRL's there.
DEFAULTS = {NOTHING: forced("evaluate", "auto"), HIDDEN: forced("stash", "auto"), HEAD: AUTO}
OF_TRL = {
    NOTHING: CANDIDATES["TRL: no gradient"],
    HIDDEN: CANDIDATES["TRL: frozen head"],
    HEAD: CANDIDATES["TRL"],
}
# Some rows' probabilities are kept, not all.
SOME = replace(
    AUTO, name="ours: auto, 1024 MiB", forward=partial(ours, "auto", workspace_mb=1024.0)
)

# MiB of the smallest workspace that the replay has a goal for.
TIGHT = 256


def tight_name(path: str) -> str:
    """Of a path in the smallest workspace that a goal is set for."""
    return f"ours: {path} in {TIGHT} MiB"


def tight(path: str) -> Candidate:
    """A path in as little memory."""
    run = partial(ours, path, workspace_mb=TIGHT)
    return Candidate(tight_name(path), run, TRAINS[path], ours=True)
