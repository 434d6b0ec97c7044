"""What is measured on a head: float64 truths, candidates beside them, points, rows and memory."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("psutil")

from benchmarks import candidates as candidates_module  # noqa: E402
from benchmarks import head_points, memory  # noqa: E402
from benchmarks.candidates import (  # noqa: E402
    CANDIDATES,
    HEAD,
    NOTHING,
    OBJECTIVES,
    OTHER_LOSSES,
    Candidate,
    dpo,
    ours_with_room,
)
from benchmarks.head_points import (  # noqa: E402
    KL_CANDIDATES,
    Accuracy,
    Pair,
    assess,
    eager_kl,
    kl_errors,
    kl_truth,
    make_pair,
    truth_of,
)
from benchmarks.memory import peak_memory  # noqa: E402
from benchmarks.shapes import DTYPES, TINY, Problem, Shape, make_problem  # noqa: E402

CAPPED = replace(TINY, name="capped", softcap=5.0)


def unable(problem: object) -> tuple[Tensor, Tensor]:
    raise ModuleNotFoundError("No module named 'absent'", name="absent")


def halved(problem: Problem) -> tuple[Tensor, Tensor]:
    sums, loss = CANDIDATES["eager"].forward(problem)
    return sums, loss / 2


@pytest.mark.parametrize("shape", [TINY, CAPPED], ids=lambda shape: shape.name)
def test_truth_is_eager_float64(shape: Shape) -> None:
    problem = make_problem(shape, torch.float64)
    truth = truth_of(problem)
    hidden, weight = (x.clone().requires_grad_() for x in (problem.hidden, problem.weight))
    logits = hidden @ weight.t()
    if shape.softcap is not None:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), problem.targets.flatten(), reduction="none"
    )
    sums = -losses.view(problem.targets.shape).sum(1)
    dpo(sums).backward()
    torch.testing.assert_close(truth.sums, sums.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(truth.dhidden, hidden.grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(truth.dweight, weight.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [TINY, CAPPED], ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", [name for name in CANDIDATES if name not in OTHER_LOSSES])
def test_a_candidate_is_right_or_says_why_not(name: str, shape: Shape, dtype: str) -> None:
    candidate = CANDIDATES[name]
    problem = make_problem(shape, DTYPES[dtype])
    # What compiles does so once; Liger's loss, which takes longest, in a slow test below.
    compiles = (shape, dtype) == (TINY, "fp32") and name != "Liger"
    with nullcontext() if compiles else torch.compiler.set_stance("force_eager"):
        found = assess(candidate, problem, truth_of(problem))
    if found.status != "ok":
        assert not candidate.ours
        assert found.status.startswith(("wrong: ", "unavailable: ", "failed: "))
        return
    assert found.logp_error is not None and found.logp_error < (1e-4 if dtype == "fp32" else 1)
    assert (found.dhidden_error is None) == (candidate.trains == NOTHING)
    assert (found.dweight_error is None) == (candidate.trains != HEAD)
    for error in (found.dhidden_error, found.dweight_error):
        assert error is None or error < (1e-5 if dtype == "fp32" else 2e-2)


@pytest.mark.slow
def test_ligers_loss_is_right_as_it_compiles() -> None:
    pytest.importorskip("liger_kernel")
    problem = make_problem(TINY, torch.float32)
    found = assess(CANDIDATES["Liger"], problem, truth_of(problem))
    assert found.status == "ok"
    assert found.dhidden_error is not None and found.dhidden_error < 1e-5
    assert found.dweight_error is not None and found.dweight_error < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_a_peer_with_another_loss_is_right(name: str, dtype: str) -> None:
    pytest.importorskip("liger_kernel")
    problem = make_problem(TINY, DTYPES[dtype])
    truth = truth_of(problem, CANDIDATES[name].objective)
    with torch.compiler.set_stance("force_eager"):
        found = assess(CANDIDATES[name], problem, truth)
    assert found.status == "ok"
    assert found.dweight_error is not None and found.dweight_error < 5e-2


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_those_of_the_papers(name: str) -> None:
    sums = torch.tensor([-6.0, -2.0], dtype=torch.float64)
    lengths = torch.tensor([3, 4])

    def logistic(x: float) -> float:
        return math.log1p(math.exp(-x))

    odds = [mean - math.log1p(-math.exp(mean)) for mean in (-2.0, -0.5)]
    wanted = {
        "dpo": logistic(0.02 * -4),
        "simpo": logistic(2.0 * -1.5 - 0.5),
        "cpo": logistic(0.02 * -4) + 2.0,
        "orpo": 0.02 * logistic(odds[0] - odds[1]) + 2.0,
        "kto": 1 - (1 / (1 + math.exp(0.012)) + 1 / (1 + math.exp(-0.004))) / 2,
    }
    assert OBJECTIVES[name](sums, lengths).item() == pytest.approx(wanted[name], rel=1e-12)


def test_wrong_and_missing_peers_are_named() -> None:
    problem = make_problem(TINY, torch.float32)
    truth = truth_of(problem)
    wrong = assess(Candidate("halved", halved), problem, truth)
    off = [f"{name}'s gradient off by 5.0e-01" for name in ("hidden", "weight")]
    assert wrong.status == "wrong: " + ", ".join(off)
    missing = assess(Candidate("absent", unable), problem, truth)
    assert missing == Accuracy(status="unavailable: needs absent")
    other = assess(CANDIDATES["eager"], problem, truth_of(problem, "simpo"))
    assert other.status.startswith("wrong: hidden's gradient off by")
    spoiled = make_problem(TINY, torch.float32)
    spoiled.weight[3] = math.nan
    assert assess(CANDIDATES["eager"], spoiled, truth).status.startswith("wrong: log-probs")


def test_local_gets_the_room_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[float] = []
    real = candidates_module.ours
    monkeypatch.setattr(
        candidates_module,
        "ours",
        lambda *a, **options: [rooms.append(options["workspace_mb"]), real(*a)][1],
    )
    ours_with_room("local", "auto", make_problem(TINY, torch.float32))
    assert rooms == [512 + 1.125 * 4 * TINY.labelled_rows * TINY.vocab / 2**20]


def test_what_the_loop_needs_is_there_without_peers_and_extras() -> None:
    absent = ("psutil", "matplotlib", "triton", "trl", "liger_kernel", "cut_cross_entropy")
    absent += ("transformers", "tabulate", "pytest_benchmark", "omegaconf", "rich")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent!r}))
import benchmarks.__main__
from benchmarks.candidates import CANDIDATES
from benchmarks.head_points import GridPoint
from benchmarks.measuring import Loop
from benchmarks.memory import not_measured
from benchmarks.results import machine
from benchmarks.shapes import TINY
names = ("ours: local", "TRL", "Liger", "cut-cross-entropy", "Liger: per token")
rows = {{}}
class Kept:
    def put(self, row): rows[row["candidate"]] = row["status"]
point = GridPoint(TINY, "fp32", tuple(CANDIDATES[name] for name in names), not_measured)
Loop(Kept(), count=1, say=lambda text: None).measure([point])
assert machine()["memory_gib"] >= 1
print(rows)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == {
        "ours: local": "ok",
        "TRL": "unavailable: needs trl.kernels",
        "Liger": "unavailable: needs liger_kernel",
        "Liger: per token": "unavailable: needs liger_kernel.ops",
        "cut-cross-entropy": "unavailable: needs cut_cross_entropy",
    }


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    yield make_pair(TINY)


@pytest.mark.parametrize("name", KL_CANDIDATES)
def test_kls_agree_with_float64(name: str, pair: Pair) -> None:
    truth = kl_truth(pair)
    found = kl_errors(KL_CANDIDATES[name], pair, truth)
    assert (truth.sums > 0.01).all()
    assert found.pop("status") == "ok" and max(found.values()) <= 1e-5


def test_a_kl_that_is_wrong_shows_it(pair: Pair) -> None:
    def wrong(pair: Pair) -> tuple[Tensor, Tensor]:
        kls, logps = eager_kl(pair)
        return 1.01 * kls, logps

    found = kl_errors(wrong, pair, kl_truth(pair))
    assert found["kl_error"] > 1e-4 and found["dweight_error"] > 1e-4


@pytest.mark.slow
def test_memory_of_a_child_follows_the_live_tensors() -> None:
    shape = Shape("memory", 4, 128, 32, 20_000)
    logits = 4 * shape.rows * shape.vocab
    eager = peak_memory(CANDIDATES["eager"], shape, "fp32")
    ours = peak_memory(CANDIDATES["ours: recompute"], shape, "fp32")
    assert (eager.status, ours.status) == ("ok", "ok")
    assert eager.gradients == ours.gradients == 4 * 32 * (shape.rows + shape.vocab)
    assert eager.extra is not None and 1.9 * logits < eager.extra < 5 * logits
    assert ours.extra is not None and ours.extra < 0.5 * logits
    small = replace(shape, length=64)
    kl = memory.in_child(head_points._kl_extra, "eager, labelled rows", small)
    assert kl > 4 * 2 * small.labelled_rows * small.vocab


def test_memory_is_skipped_where_it_cannot_fit() -> None:
    shape = replace(TINY, vocab=10**13)
    assert peak_memory(CANDIDATES["eager"], shape, "fp32").status.startswith("skipped: ")
