"""Error against float64, and whether a candidate computes the right thing at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.objectives import OBJECTIVES
from benchmarks.peers import HEAD, NOTHING, Candidate, step
from benchmarks.shapes import IGNORE_INDEX, Problem

# A candidate beyond these relative errors is wrong, not imprecise.
WRONG_BEYOND = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
# A GPU reads the whole weight for each part of the rows.
_ROWS_AT_ONCE = {"cpu": 128, "cuda": 512}


@dataclass(frozen=True)
class Truth:
    """Float64 results on the same inputs: sums (S,), dhidden (S, T, D), dweight (V, D)."""

    sums: Tensor
    dhidden: Tensor
    dweight: Tensor


@dataclass(frozen=True)
class Accuracy:
    """Errors of one step.

    Attributes:
        logp_error: largest |error| of a sequence's log-prob, in nats.
        dhidden_error, dweight_error: ‖error‖ / ‖truth‖, or None where no such gradient is asked.
        status: "ok", or what is wrong.
    """

    logp_error: float | None
    dhidden_error: float | None
    dweight_error: float | None
    status: str


def truth_of(problem: Problem, objective: str = "dpo") -> Truth:
    """Eager float64, a few rows at a time: sums first, then the gradients of the loss."""
    mask = problem.targets != IGNORE_INDEX
    weight = problem.weight.detach().double().requires_grad_()
    hidden = problem.hidden.detach()[mask].double().requires_grad_()
    targets = problem.targets[mask]
    cap = problem.shape.softcap

    def logps(rows: slice) -> Tensor:
        logits = hidden[rows] @ weight.t()
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits.log_softmax(-1).gather(-1, targets[rows].unsqueeze(-1)).squeeze(-1)

    step = _ROWS_AT_ONCE[hidden.device.type]
    slices = [slice(start, start + step) for start in range(0, len(targets), step)]
    with torch.no_grad():
        tokens = torch.cat([logps(rows) for rows in slices])
        sums = tokens.new_zeros(mask.shape).masked_scatter(mask, tokens).sum(-1)
    sums.requires_grad_()
    (per_sequence,) = torch.autograd.grad(OBJECTIVES[objective](sums, mask.sum(1)), sums)
    upstream = per_sequence.unsqueeze(1).expand(mask.shape)[mask]
    for rows in slices:
        (logps(rows) * upstream[rows]).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    dhidden = torch.zeros_like(problem.hidden, dtype=torch.float64)
    dhidden[mask] = hidden.grad
    return Truth(sums.detach(), dhidden, weight.grad)


def assess(candidate: Candidate, problem: Problem, truth: Truth) -> Accuracy:
    """Run a candidate once and compare it with the truth; its failure becomes its status."""
    try:
        sums = step(candidate, problem)
    except Exception as error:
        return Accuracy(None, None, None, failure(error))
    hidden_error = weight_error = None
    if candidate.trains != NOTHING:
        hidden_error = _relative(problem.hidden.grad, truth.dhidden)
    if candidate.trains == HEAD:
        weight_error = _relative(problem.weight.grad, truth.dweight)
    wanted = truth.sums
    if sums.shape != wanted.shape:  # Those of the two halves are all that some peers give.
        wanted = wanted.view(2, -1).sum(1)
    logp_error = (sums.double() - wanted).abs().max().item()
    problem.clear()

    limit = WRONG_BEYOND[problem.hidden.dtype]
    checked = {
        "log-probs": logp_error / wanted.abs().max().item(),
        "hidden's gradient": hidden_error or 0.0,
        "weight's gradient": weight_error or 0.0,
    }
    wrong = [f"{what} off by {error:.1e}" for what, error in checked.items() if not error <= limit]
    status = "wrong: " + ", ".join(wrong) if wrong else "ok"
    return Accuracy(logp_error, hidden_error, weight_error, status)


def failure(error: Exception) -> str:
    """The status of a candidate that has raised, in one line without paths."""
    if isinstance(error, ImportError) and error.name:
        return f"unavailable: needs {error.name}"
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    text = " ".join(word for word in first.split() if "/" not in word)[:120]
    if isinstance(error, ImportError):
        return f"unavailable: {text}"
    return f"failed: {type(error).__name__}: {text}".rstrip(": ")


def _relative(value: Tensor | None, wanted: Tensor) -> float:
    if value is None:
        return float("inf")
    return ((value.double() - wanted).norm() / wanted.norm()).item()
