"""The replay: the real code of ours and of peers, recorded without a GPU, played on device models.

It predicts the time, launches and bytes of a step with a large head, what the GPU waits for the
host, and the peak of what the step allocates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.candidates import (
    BETA,
    DEFAULTS,
    ENGINES,
    HEAD,
    NOTHING,
    OF_TRL,
    SOME,
    TRAINS,
    Candidate,
    forced,
    step,
    tight,
)
from benchmarks.device import MACHINES, Machine, play
from benchmarks.recording import Recording, host_seconds, record, spread_over
from benchmarks.results import Results, Row
from benchmarks.shapes import HEADS, LARGEST_OUTPUT, Problem, Shape

_LONG = 65536


@dataclass(frozen=True)
class ReplayCase:
    """A step that is replayed.

    Attributes:
        candidate: what runs, with the situation in `trains`.
        shape: of the batch and the head.
        host: whether the host's own code is measured too.
        bare: only its matmuls count: what a compiler may fuse away is not held against it.
    """

    candidate: Candidate
    shape: Shape
    host: bool = True
    bare: bool = False


def cases() -> list[ReplayCase]:
    """The default of ours beside TRL's and Liger's; then each path and engine, and tight memory."""
    found = []
    for shape in HEADS.values():
        for trains in DEFAULTS:
            found += [ReplayCase(each[trains], shape) for each in (DEFAULTS, OF_TRL)]
        if shape.softcap is None:
            dense = replace(shape, length=shape.length // 2 + 1, labelled=1.0)
            for name, given in (("all rows", shape), ("labelled rows", dense)):
                liger = Candidate(f"Liger: {name}", liger_dpo, HEAD)
                found.append(ReplayCase(liger, given, host=False, bare=True))
        found += [
            ReplayCase(forced(path, engine), shape, host=False)
            for path in TRAINS
            for engine in ENGINES
        ]
        found.append(ReplayCase(SOME, shape, host=False))
        for rows in (shape.labelled_rows, _LONG):
            given = replace(shape, sequences=shape.sequences * rows // shape.labelled_rows)
            for path in ("evaluate", "stash", "recompute"):
                found.append(ReplayCase(tight(path), given, host=False))
    return found


def run_replay(results: Results, say: Callable[[str], None]) -> None:
    """Replay every case on every machine; takes about a minute."""
    for machine in MACHINES:
        units = {shape.name: unit_seconds(machine, shape) for shape in HEADS.values()}
        for case in cases():
            row = replayed(case, machine, units[case.shape.name])
            results.put(row)
            say(f"{machine.name}, {case.shape.name}: {row['candidate']}: {row['in_p']:.2f} P")


def replayed(case: ReplayCase, machine: Machine, unit: float) -> Row:
    """A row of results.

    Args:
        case: what is replayed.
        machine: where.
        unit: seconds of P there.
    """
    recording = recorded(case, machine)
    events = [e for e in recording.events if e.size is not None or not case.bare]
    python = None
    if case.host:
        anchors = [event.name for event in events if event.anchor]
        with _peers_on_a_gpu():
            seconds = host_seconds(_on_host(case), machine, case.shape.hidden_size, anchors)
        python = spread_over(events, seconds)
    played = play(machine, events, python)
    gradients = _gradient_bytes(case)
    return {
        "gpu": machine.name,
        "candidate": case.candidate.name,
        **case.shape.fields,
        "dtype": "bf16",
        "trains": case.candidate.trains,
        "p_ms": round(1e3 * unit, 3),
        "ms": round(1e3 * played.seconds, 3),
        "in_p": round(played.seconds / unit, 3),
        "launches": played.launches,
        "moved_bytes": played.moved,
        "exposed_ms": None if python is None else round(1e3 * played.exposed, 3),
        "host_ms": None if python is None else round(1e3 * sum(python), 3),
        "extra_bytes": recording.peak - gradients,
        "gradient_bytes": gradients,
    }


def recorded(case: ReplayCase, machine: Machine) -> Recording:
    """The recording of a case on a machine."""
    problem = meta_problem(case.shape)
    with _peers_on_a_gpu():
        return record(partial(step, case.candidate, problem), case.shape.labelled_rows, machine)


def unit_seconds(machine: Machine, shape: Shape) -> float:
    """P: the labelled rows times the weight into an existing output, slab by slab."""
    rows, size = shape.labelled_rows, shape.hidden_size
    hidden, weight = _meta(rows, size), _meta(shape.vocab, size)
    slabs = weight.split(LARGEST_OUTPUT // (rows * hidden.itemsize))

    def products() -> None:
        for slab in slabs:
            torch.mm(hidden, slab.t(), out=_meta(rows, len(slab)))

    return play(machine, record(products, rows, machine).events).seconds


def liger_dpo(problem: Problem) -> tuple[Tensor, Tensor]:
    """Liger's DPO, not compiled: a compiler would hide its matmuls."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    problem.require_no_softcap()
    loss_of = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=False)
    loss, (chosen, rejected, *_) = loss_of(problem.weight, problem.hidden, problem.targets)
    return torch.cat([chosen, rejected]), loss


def _gradient_bytes(case: ReplayCase) -> int:
    shape, trains = case.shape, case.candidate.trains
    hidden = shape.rows * shape.hidden_size if trains != NOTHING else 0
    weight = shape.vocab * shape.hidden_size if trains == HEAD else 0
    return 2 * (hidden + weight)


def meta_problem(shape: Shape) -> Problem:
    """Of a shape, in bf16, without data."""
    return _problem(shape, torch.device("meta"))


def _problem(shape: Shape, device: torch.device) -> Problem:
    """Of a shape, in bf16; the values are whatever is there."""

    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    labels = empty(shape.sequences, shape.length, dtype=torch.int64)
    if device.type == "cpu":
        labels.zero_()[:, : shape.length - round(shape.length * shape.labelled)] = -100
    hidden = empty(shape.sequences, shape.length, shape.hidden_size)
    return Problem(shape, hidden, empty(shape.vocab, shape.hidden_size), labels)


def _meta(*size: int) -> Tensor:
    return torch.empty(size, dtype=torch.bfloat16, device="meta")


def _on_host(case: ReplayCase) -> Callable[[], object]:
    """The step on CPU tensors of hidden size 1, which the loops do not look at."""
    problem = _problem(replace(case.shape, hidden_size=1), torch.device("cpu"))
    return partial(step, case.candidate, problem)


@contextmanager
def _peers_on_a_gpu() -> Iterator[None]:
    """Within the block TRL's and Liger's functions do as they do on CUDA."""
    from trl.kernels import chunked_logprob

    def add(total: Tensor, left: Tensor, right: Tensor) -> None:
        torch.addmm(total, left, right, out=total)

    real = torch.tensor

    def tensor(value: Any, **options: Any) -> Tensor:
        # A number that is put on a device is no operator that could be recorded.
        placed = options.get("device") is not None and isinstance(value, float)
        return torch.full((), value, **options) if placed else real(value, **options)

    with (
        patch.object(chunked_logprob, "_use_triton", lambda device: True),
        patch.object(chunked_logprob, "_addmm_fp32", add),
        patch.object(torch, "tensor", tensor),
    ):
        yield
