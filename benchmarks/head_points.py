"""Points on a head alone: losses of log-probs beside float64, and the exact KL divergence.

A point's session holds its batch; candidates are checked against eager float64 before they are
timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.candidates import HEAD, NOTHING, OBJECTIVES, Candidate, forward, step
from benchmarks.counts import count
from benchmarks.measuring import Loop, Pass, Step, Timing, figures, relative, verdict
from benchmarks.memory import (
    MemoryOf,
    in_child,
    keep_freed_memory,
    memory_here,
    resident_peak,
    return_freed_memory,
)
from benchmarks.results import NO_TIME, RESULTS, Results, Row, failure
from benchmarks.shapes import (
    DTYPES,
    IGNORE_INDEX,
    LAPTOP,
    TINY,
    Problem,
    Shape,
    bare_matmul,
    make_problem,
)
from fused_prefopt import sequence_kl

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

    logp_error: float | None = None
    dhidden_error: float | None = None
    dweight_error: float | None = None
    status: str = NO_TIME


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

    size = _ROWS_AT_ONCE[hidden.device.type]
    slices = [slice(start, start + size) for start in range(0, len(targets), size)]
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
        return Accuracy(status=failure(error))
    hidden_error = weight_error = None
    if candidate.trains != NOTHING:
        hidden_error = relative(problem.hidden.grad, truth.dhidden)
    if candidate.trains == HEAD:
        weight_error = relative(problem.weight.grad, truth.dweight)
    wanted = truth.sums
    if sums.shape != wanted.shape:  # Those of the two halves are all that some peers give.
        wanted = wanted.view(2, -1).sum(1)
    logp_error = (sums.double() - wanted).abs().max().item()
    problem.clear()

    checked = {
        "log-probs": logp_error / wanted.abs().max().item(),
        "hidden's gradient": hidden_error or 0.0,
        "weight's gradient": weight_error or 0.0,
    }
    status = verdict(checked, problem.hidden.dtype)
    return Accuracy(logp_error, hidden_error, weight_error, status)


@dataclass(frozen=True)
class HeadPoint:
    """Candidates on one shape and dtype; its rows are those of the section `head`.

    Attributes:
        shape: of the batch.
        dtype: of the operands, a name of `DTYPES`.
        candidates: the most telling first.
        memory: candidate, problem, dtype → extra peak memory.
    """

    shape: Shape
    dtype: str
    candidates: tuple[Candidate, ...]
    memory: MemoryOf = memory_here
    rounds: int | None = None
    has_memory: bool = True

    @property
    def name(self) -> str:
        return f"{self.shape.name}, {self.shape.labelled_rows} rows, {self.dtype}"

    def rows(self) -> dict[str, Row]:
        return {candidate.name: self.row_of(candidate) for candidate in self.candidates}

    def row_of(self, candidate: Candidate) -> Row:
        """A row without figures."""
        return {
            **about(candidate, self.shape, self.dtype),
            **dict.fromkeys(("extra_bytes", "gradient_bytes")),
            **figures(None),
            **figures(None, "reused_"),
            "memory_status": "not measured",
            **asdict(Accuracy()),
        }

    def open(self, device: str, rows: Mapping[str, Row]) -> _HeadSession:
        return _HeadSession(self, make_problem(self.shape, DTYPES[self.dtype], device))


class GridPoint(HeadPoint):
    """The same with the forward timed by itself; its rows are those of the section `grid`."""

    def row_of(self, candidate: Candidate) -> Row:
        counts = count(candidate.name, self.shape, DTYPES[self.dtype].itemsize)
        row = super().row_of(candidate)
        return {
            **{name: value for name, value in row.items() if not name.startswith("reused_")},
            **dict.fromkeys(_FORWARD),
            "objective": candidate.objective,
            "flops": counts.flops if counts else None,
            "bytes": counts.moved if counts else None,
        }

    def open(self, device: str, rows: Mapping[str, Row]) -> _GridSession:
        return _GridSession(self, make_problem(self.shape, DTYPES[self.dtype], device))


_FORWARD = ("forward_ms", "forward_in_p", "forward_in_p_quartiles")


class _HeadSession:
    def __init__(self, point: HeadPoint, problem: Problem) -> None:
        self.point, self.problem = point, problem
        self._named = {candidate.name: candidate for candidate in point.candidates}
        # The last one alone: it is as large as the gradients in float64.
        self._truth: dict[str, Truth] = {}

    @cached_property
    def unit(self) -> Step:
        return bare_matmul(self.problem)

    def check(self, name: str) -> Row:
        candidate = self._named[name]
        if candidate.objective not in self._truth:
            self._truth = {candidate.objective: truth_of(self.problem, candidate.objective)}
        return asdict(assess(candidate, self.problem, self._truth[candidate.objective]))

    def steps(self, name: str) -> dict[str, Step]:
        self._truth.clear()
        return {name: partial(step, self._named[name], self.problem)}

    def figures(self, name: str, timings: Mapping[str, Timing], prefix: str) -> Row:
        return figures(timings[name], prefix)

    def release(self) -> None:
        # The unit holds logits of its own.
        self.__dict__.pop("unit", None)
        self._truth.clear()
        self.problem.clear()

    def memory(self, name: str) -> Row:
        found = self.point.memory(self._named[name], self.problem, self.point.dtype)
        return {
            "extra_bytes": found.extra,
            "gradient_bytes": found.gradients,
            "memory_status": found.status,
        }


class _GridSession(_HeadSession):
    def check(self, name: str) -> Row:
        found, candidate = super().check(name), self._named[name]
        if found["status"] == "ok" and candidate.trains != NOTHING:
            forward(candidate, self.problem)
        self.problem.clear()
        return found

    def steps(self, name: str) -> dict[str, Step]:
        found = super().steps(name)
        if self._named[name].trains != NOTHING:
            found[_forward_of(name)] = partial(forward, self._named[name], self.problem)
        return found

    def figures(self, name: str, timings: Mapping[str, Timing], prefix: str) -> Row:
        alone = figures(timings.get(_forward_of(name), timings[name]), "forward_")
        return figures(timings[name]) | {field: alone[field] for field in _FORWARD}


def _forward_of(name: str) -> str:
    return f"forward of {name}"


def about(candidate: Candidate, shape: Shape, dtype: str) -> Row:
    """The fields that say what a row is about."""
    return {
        "candidate": candidate.name,
        **shape.fields,
        "dtype": dtype,
        "trains": candidate.trains,
    }


# The reference is the policy with noise of this share of each tensor's standard deviation.
_DISTANCE = 0.05
# The loss of a KL's step is linear in both sums of each sequence.
_OF_KL, _OF_POLICY = 0.1, -0.05

Sums = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Pair:
    """A policy's batch, and hidden (S, T, D) and weight (V, D) of its reference."""

    policy: Problem
    hidden: Tensor
    weight: Tensor


def make_pair(shape: Shape) -> Pair:
    """A random fp32 batch and a reference close to it, as one is in training."""
    problem = make_problem(shape, torch.float32)
    generator = torch.Generator().manual_seed(1)

    def near(value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=generator)
        return value + _DISTANCE * value.std() * noise

    return Pair(problem, near(problem.hidden), near(problem.weight))


def our_kl(pair: Pair) -> Sums:
    """KL and the policy's log-probs of each sequence, both (S,)."""
    problem = pair.policy
    out = sequence_kl(problem.hidden, problem.weight, pair.hidden, pair.weight, problem.labels)
    return out.kl, out.policy


def eager_kl(pair: Pair) -> Sums:
    """The same of the labelled rows, with the logits of both models in memory."""
    problem = pair.policy
    mask = problem.targets != IGNORE_INDEX
    logps = (problem.hidden[mask] @ problem.weight.t()).log_softmax(-1)
    with torch.no_grad():
        references = (pair.hidden[mask] @ pair.weight.t()).log_softmax(-1)
    kls = torch.nn.functional.kl_div(logps, references, reduction="none", log_target=True).sum(-1)
    picked = logps.gather(-1, problem.targets[mask].unsqueeze(-1)).squeeze(-1)
    zeros = logps.new_zeros(mask.shape)
    return zeros.masked_scatter(mask, kls).sum(-1), zeros.masked_scatter(mask, picked).sum(-1)


KL_CANDIDATES: Mapping[str, Callable[[Pair], Sums]] = {
    "ours": our_kl,
    "eager, labelled rows": eager_kl,
}


def kl_forward(run: Callable[[Pair], Sums], pair: Pair) -> Sums:
    """A forward that a backward may follow."""
    pair.policy.clear()
    for value in (pair.policy.hidden, pair.policy.weight):
        value.requires_grad_()
    return run(pair)


def kl_step(run: Callable[[Pair], Sums], pair: Pair) -> Tensor:
    """Forward and backward; returns the KLs (S,)."""
    kls, logps = kl_forward(run, pair)
    (_OF_KL * kls.sum() + _OF_POLICY * logps.sum()).backward()
    return kls.detach()


def kl_truth(pair: Pair) -> Truth:
    """Float64 KLs as the sums, and gradients; a few rows at a time."""
    problem = pair.policy
    mask = problem.targets != IGNORE_INDEX
    weight = problem.weight.detach().double().requires_grad_()
    hidden = problem.hidden.detach()[mask].double().requires_grad_()
    targets, others, other = problem.targets[mask], pair.hidden[mask].double(), pair.weight.double()
    found = []
    for rows in torch.arange(len(targets)).split(_ROWS_AT_ONCE["cpu"]):
        logps = (hidden[rows] @ weight.t()).log_softmax(-1)
        references = (others[rows] @ other.t()).log_softmax(-1)
        kls = (references.exp() * (references - logps)).sum(-1)
        picked = logps.gather(-1, targets[rows].unsqueeze(-1))
        (_OF_KL * kls.sum() + _OF_POLICY * picked.sum()).backward()
        found.append(kls.detach())
    assert hidden.grad is not None and weight.grad is not None
    dhidden = torch.zeros_like(problem.hidden, dtype=torch.float64)
    dhidden[mask] = hidden.grad
    sums = dhidden.new_zeros(mask.shape).masked_scatter(mask, torch.cat(found)).sum(-1)
    return Truth(sums, dhidden, weight.grad)


@dataclass(frozen=True)
class KlPoint:
    """`sequence_kl` beside eager PyTorch on one shape in fp32, on a CPU."""

    shape: Shape
    rounds: int | None = None
    has_memory: bool = True

    @property
    def name(self) -> str:
        return f"KL, {self.shape.name}"

    def rows(self) -> dict[str, Row]:
        fields = {**self.shape.fields, "dtype": "fp32", "status": NO_TIME}
        empty = {**figures(None), **figures(None, "forward_"), **dict.fromkeys(_KL_FIGURES)}
        return {name: {"candidate": name, **fields, **empty} for name in KL_CANDIDATES}

    def open(self, device: str, rows: Mapping[str, Row]) -> KlSession:
        return KlSession(self.shape)


_KL_FIGURES = ("extra_bytes", "kl_error", "dhidden_error", "dweight_error")


class KlSession:
    """A pair of models' batches, and the truth until the steps are timed."""

    def __init__(self, shape: Shape) -> None:
        self.pair = make_pair(shape)
        self._truth: Truth | None = kl_truth(self.pair)

    @cached_property
    def unit(self) -> Step:
        return bare_matmul(self.pair.policy)

    def check(self, name: str) -> Row:
        """The largest error of a KL in nats, and relative ones of the gradients."""
        assert self._truth is not None
        return kl_errors(KL_CANDIDATES[name], self.pair, self._truth)

    def steps(self, name: str) -> dict[str, Step]:
        self._truth, run = None, KL_CANDIDATES[name]
        forward_step = partial(kl_forward, run, self.pair)
        return {name: partial(kl_step, run, self.pair), _forward_of(name): forward_step}

    def figures(self, name: str, timings: Mapping[str, Timing], prefix: str) -> Row:
        return figures(timings[name]) | figures(timings[_forward_of(name)], "forward_")

    def release(self) -> None:
        self.__dict__.pop("unit", None)
        self.pair.policy.clear()

    def memory(self, name: str) -> Row:
        """Peak of a step beyond its inputs and gradients, in a process of its own."""
        try:
            return {"extra_bytes": in_child(_kl_extra, name, self.pair.policy.shape)}
        except ChildProcessError:
            return {"extra_bytes": None}


def kl_errors(run: Callable[[Pair], Sums], pair: Pair, truth: Truth) -> Row:
    """Fields of a row; who is less exact than it should be is shown, not left out."""
    kls, problem = kl_step(run, pair), pair.policy
    found = {
        "kl_error": float((kls.double() - truth.sums).abs().max()),
        "dhidden_error": relative(problem.hidden.grad, truth.dhidden),
        "dweight_error": relative(problem.weight.grad, truth.dweight),
        "status": "ok",
    }
    problem.clear()
    return found


def _kl_extra(name: str, shape: Shape) -> int:
    return_freed_memory()
    run = KL_CANDIDATES[name]
    kl_step(run, make_pair(replace(TINY, name=shape.name)))
    pair = make_pair(shape)
    return resident_peak(partial(kl_step, run, pair)) - pair.policy.gradient_bytes


def run_kl(
    folder: Path = RESULTS / "cpu",
    say: Callable[[str], None] = print,
    *,
    shape: Shape = LAPTOP,
    count: int = 7,
) -> None:
    """Measure the KL divergence on this CPU into `kl.json`, in about two minutes.

    Args:
        folder: of the results.
        say: gets a line of progress now and then.
        shape: of the batch.
        count: rounds of the timings at most.
    """
    keep_freed_memory()
    results = Results(folder / "kl.json", "kl")
    Loop(results, count=count, passes=(Pass(60.0),), say=say).measure([KlPoint(shape)])
