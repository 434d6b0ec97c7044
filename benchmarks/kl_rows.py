"""What the exact KL divergence from a reference model takes: `sequence_kl` beside eager PyTorch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.accuracy import failure
from benchmarks.child import in_child, peak, start_peak
from benchmarks.malloc import keep_freed_memory, return_freed_memory
from benchmarks.results import RESULTS, Results, Row
from benchmarks.shapes import (
    IGNORE_INDEX,
    LAPTOP,
    TINY,
    Problem,
    Shape,
    bare_matmul,
    make_problem,
)
from benchmarks.suite import figures
from benchmarks.timing import rounds
from fused_prefopt import sequence_kl

# Of the reference: the policy with noise of this share of each tensor's standard deviation.
_DISTANCE = 0.05
# The loss is linear in both sums of each sequence.
_OF_KL, _OF_POLICY = 0.1, -0.05
_ROWS_AT_ONCE = 128

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


def ours(pair: Pair) -> Sums:
    """KL and the policy's log-probs of each sequence, both (S,)."""
    problem = pair.policy
    out = sequence_kl(problem.hidden, problem.weight, pair.hidden, pair.weight, problem.labels)
    return out.kl, out.policy


def eager(pair: Pair) -> Sums:
    """The same of the labelled rows, with the logits of both models in memory."""
    problem = pair.policy
    mask = problem.targets != IGNORE_INDEX
    logps = (problem.hidden[mask] @ problem.weight.t()).log_softmax(-1)
    with torch.no_grad():
        references = (pair.hidden[mask] @ pair.weight.t()).log_softmax(-1)
    kls = torch.nn.functional.kl_div(logps, references, reduction="none", log_target=True).sum(-1)
    picked = logps.gather(-1, problem.targets[mask].unsqueeze(-1)).squeeze(-1)
    zeros = logps.new_zeros(mask.shape)
    return tuple(zeros.masked_scatter(mask, rows).sum(-1) for rows in (kls, picked))  # type: ignore[return-value]


CANDIDATES: Mapping[str, Callable[[Pair], Sums]] = {"ours": ours, "eager, labelled rows": eager}


def forward(run: Callable[[Pair], Sums], pair: Pair) -> Sums:
    """A forward that a backward may follow."""
    pair.policy.clear()
    for value in (pair.policy.hidden, pair.policy.weight):
        value.requires_grad_()
    return run(pair)


def step(run: Callable[[Pair], Sums], pair: Pair) -> Tensor:
    """Forward and backward; returns the KLs (S,)."""
    kls, logps = forward(run, pair)
    (_OF_KL * kls.sum() + _OF_POLICY * logps.sum()).backward()
    return kls.detach()


def run_kl(
    folder: Path = RESULTS / "cpu",
    say: Callable[[str], None] = print,
    *,
    shape: Shape = LAPTOP,
    count: int = 7,
    seconds: float = 60.0,
) -> None:
    """Measure on this CPU into `kl.json`, in about two minutes.

    Args:
        folder: of the results.
        say: gets a line of progress now and then.
        shape: of the batch.
        count: rounds of the timings at most.
        seconds: no round is begun after these.
    """
    keep_freed_memory()
    results = Results(folder / "kl.json", "kl")
    pair = make_pair(shape)
    truth = _truth(pair)
    rows = {name: _row(name, shape) for name in CANDIDATES}
    steps: dict[str, Callable[[], object]] = {}
    for name, run in CANDIDATES.items():
        rows[name] |= _errors(run, pair, truth)
        say(f"{name}: {rows[name]['status']}")
        if rows[name]["status"] == "ok":
            steps[name] = partial(step, run, pair)
            steps[f"forward of {name}"] = partial(forward, run, pair)
    for timed in rounds(steps, bare_matmul(pair.policy), count, seconds=seconds):
        for name in CANDIDATES:
            if name in timed:
                rows[name] |= figures(timed[name], "")
                rows[name] |= figures(timed[f"forward of {name}"], "forward_")
                results.put(rows[name])
    pair.policy.clear()
    for name in CANDIDATES:
        rows[name] |= _memory(name, shape)
        results.put(rows[name])
        say(f"{name}: {rows[name]['forward_in_p']} P forward, {rows[name]['in_p']} P in all")


def _row(name: str, shape: Shape) -> Row:
    """A row without figures."""
    return {
        "candidate": name,
        **shape.fields,
        "dtype": "fp32",
        "extra_bytes": None,
        **figures(None, ""),
        **figures(None, "forward_"),
    }


def _truth(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 KLs (S,), and gradients of hidden and weight; a few rows at a time."""
    problem = pair.policy
    mask = problem.targets != IGNORE_INDEX
    weight = problem.weight.detach().double().requires_grad_()
    hidden = problem.hidden.detach()[mask].double().requires_grad_()
    targets, others, other = problem.targets[mask], pair.hidden[mask].double(), pair.weight.double()
    found = []
    for rows in torch.arange(len(targets)).split(_ROWS_AT_ONCE):
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
    return sums, dhidden, weight.grad


def _errors(run: Callable[[Pair], Sums], pair: Pair, truth: tuple[Tensor, ...]) -> Row:
    """Largest error of a KL in nats, and relative ones of the gradients."""
    names = ("kl_error", "dhidden_error", "dweight_error")
    try:
        kls = step(run, pair)
    except (RuntimeError, MemoryError) as error:
        return {**dict.fromkeys(names), "status": failure(error)}
    problem = pair.policy
    values = [float((kls.double() - truth[0]).abs().max())]
    for value, wanted in zip((problem.hidden, problem.weight), truth[1:], strict=True):
        assert value.grad is not None
        values.append(float((value.grad.double() - wanted).norm() / wanted.norm()))
    problem.clear()
    return {**dict(zip(names, values, strict=True)), "status": "ok"}


def _memory(name: str, shape: Shape) -> Row:
    """Peak of a step beyond its inputs and gradients, in bytes."""
    try:
        return {"extra_bytes": in_child(_extra_bytes, name, shape)}
    except ChildProcessError:
        return {"extra_bytes": None}


def _extra_bytes(name: str, shape: Shape) -> int:
    return_freed_memory()
    run = CANDIDATES[name]
    step(run, make_pair(replace(TINY, name=shape.name)))
    pair = make_pair(shape)
    gc.collect()
    before = start_peak()
    step(run, pair)
    return peak() - before - pair.policy.gradient_bytes
