"""Kept probabilities on the Triton engines, interpreted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_kept_probabilities import (
    EVERYTHING,
    check_low_rank,
    cut,
    keep,
    labelled,
    one_pass,
    plan_of,
    watch,
)
from torch import Tensor
from truth import (
    TRANSFORMS,
    Case,
    assert_gradients,
    largest_error,
    leaves_of,
    make_case,
    relative,
    true_logps,
    true_result,
)

from fused_prefopt import token_logps
from fused_prefopt.ops import head_rows
from fused_prefopt.ops.cublas_engine import CublasEngine
from fused_prefopt.ops.cutting import Tiles
from fused_prefopt.ops.head_math import HeadMath
from fused_prefopt.ops.tile import RowGradients, RowStatistics, Tile
from fused_prefopt.ops.triton_engine import TritonEngine

pytestmark = pytest.mark.interpreted

TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Rows, entries of a slab, those multiplied at a time, whether rows are gathered once.
TILINGS = {
    "planned": None,
    "slabs": (10**6, 64, 32, False),
    "both": (7, 64, 32, True),
    "narrow": (3, 32, 32, False),
}
# What a role gets where the choice is the architecture's.
MIXES = {
    "cublas": {},
    "triton": {},
    "cublas keeps": {"keep": "cublas", "kept": "cublas", "fold": "triton", "rebuild": "triton"},
    "triton keeps": {"keep": "triton", "kept": "triton", "fold": "cublas", "rebuild": "cublas"},
}


def choose(monkeypatch, mix: str) -> str:
    """Give the roles their engines; the name to ask for."""
    if not MIXES[mix]:
        return mix
    monkeypatch.setattr(head_rows, "role_engine", lambda name, role, *_: MIXES[mix][role])
    return "triton"


def in_slabs_of(engine: str) -> int:
    """Slabs start where the parts of a program do."""
    return 1 if engine == "cublas" else 32


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("kept", [1, 13, 0])
@pytest.mark.parametrize("mix", MIXES)
def test_gradients_of_some_kept_rows_match_float64(mix, kept, transform, tiling, monkeypatch):
    case = make_case(4, 7, 7, 101, **TRANSFORMS[transform])
    rows = labelled(case)
    assert rows > 13
    # 0 stands for all: `local`.
    kept = kept % rows or rows
    engine = choose(monkeypatch, mix)
    keep(monkeypatch, kept)
    cut(monkeypatch, TILINGS[tiling], in_slabs_of(mix))
    seen = watch(monkeypatch, CublasEngine, TritonEngine)
    truth = true_result(case, needs=EVERYTHING)
    got = one_pass(case, engine=engine)
    assert largest_error(got.tokens, truth.tokens) <= 1e-5
    assert_gradients(got, truth, 3e-6)
    slabs = sum(seen.kept) // kept
    assert slabs > 0 and sum(seen.kept) == slabs * kept
    assert (kept == rows) == (not seen.built)
    seen.kept.clear()
    again = one_pass(case, lost=True, engine=engine)
    assert not seen.kept and seen.built
    assert_gradients(again, truth, 3e-6)
    assert torch.equal(again.tokens, got.tokens)


@pytest.mark.parametrize("mix", MIXES)
def test_the_plan_names_what_is_kept(mix, monkeypatch):
    case = make_case(4, 9, 7, 101)
    keep(monkeypatch, 13)
    found = plan_of(case, engine=choose(monkeypatch, mix))
    assert found.path == "recompute" and found.kept_rows == 13
    assert found.cost == 4 - 13 / labelled(case)


@pytest.mark.parametrize("engine", ["cublas", "triton"])
@pytest.mark.parametrize("workspace_mb", [0.3, 0.35])
@pytest.mark.usefixtures("tiny_tiles")
def test_the_planner_keeps_what_the_workspace_holds(engine, workspace_mb, monkeypatch):
    case = make_case(6, 80, 9, 197, **TRANSFORMS["all"])
    rows = labelled(case)
    found = plan_of(case, engine=engine, workspace_mb=workspace_mb)
    assert found.path == "recompute" and 0 < found.kept_rows < rows
    seen = watch(monkeypatch, CublasEngine, TritonEngine)
    got = one_pass(case, engine=engine, workspace_mb=workspace_mb)
    assert_gradients(got, true_result(case, needs=EVERYTHING), 3e-6)
    assert seen.built and sum(seen.kept) % found.kept_rows == 0


@pytest.mark.parametrize("kept", [11, 10**6])
@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("mix", MIXES)
def test_gradients_of_low_rank_terms(mix, transform, kept, monkeypatch):
    keep(monkeypatch, kept)
    cut(monkeypatch, (9, 32, 32, False))
    check_low_rank(transform, choose(monkeypatch, mix), 3e-6)


# The interpreter multiplies no bf16 tiles.
NARROW = [
    ("cublas", torch.float32),
    ("cublas", torch.bfloat16),
    ("cublas", torch.float16),
    ("triton", torch.float16),
]


@pytest.mark.parametrize("tiling", ["planned", "both"])
@pytest.mark.parametrize("transform", ["plain", "softcap", "all"])
@pytest.mark.parametrize("kept", [13, 0])
@pytest.mark.parametrize(("engine", "dtype"), NARROW)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_narrow_operands(engine, dtype, kept, transform, tiling, monkeypatch):
    case = make_case(4, 9, 24, 101, dtype=dtype, **TRANSFORMS[transform])
    keep(monkeypatch, kept or labelled(case))
    cut(monkeypatch, TILINGS[tiling], in_slabs_of(engine))
    finished = count_finishes(monkeypatch)
    truth = true_result(case, needs=EVERYTHING)
    got = one_pass(case, engine=engine)
    assert largest_error(got.tokens, truth.tokens) <= 1e-5
    assert_gradients(got, truth, TOLERANCE[dtype])
    # fp16's probabilities are kept in fp32, and a bias's gradient sums the tiles.
    factored = engine == "cublas" and dtype != torch.float16 and not kept
    assert bool(finished) == (factored and transform != "all")


def count_finishes(monkeypatch) -> list[int]:
    """Rows of each call of `finish_kept` from now on."""
    finished = []
    real = CublasEngine.finish_kept

    def finish(self, kept: Tensor, *rest) -> Tensor:
        finished.append(kept.shape[0])
        return real(self, kept, *rest)

    monkeypatch.setattr(CublasEngine, "finish_kept", finish)
    return finished


def jumping(dtype: torch.dtype, jump: float, **options) -> Case:
    """A case whose first 32 entries are likely only until the others come, `jump` nats above.

    One row is nearly certain of its target.
    """
    case = make_case(4, 9, 24, 101, dtype=torch.float64, largest=9.0, bias=True, **options)
    case.bias.zero_()[:32] = -jump
    labels = case.labels.clamp(min=-100)
    labels[labels >= 0] = labels[labels >= 0] % 69 + 32
    labels[0, 3] = 77
    hidden = case.hidden.clone()
    direction = case.weight[77] / case.weight[77].norm()
    # p − 1 of about −1e-3.
    others = case.weight @ direction
    others[77] = -torch.inf
    hidden[0, 2] = direction * 6.5 / (case.weight[77] @ direction - others.max())
    return replace(case, hidden=hidden, labels=labels).rounded(dtype)


@pytest.mark.parametrize("tiling", ["narrow", "slabs"])
@pytest.mark.parametrize("jump", [0.0, 40.0, 59.0, 75.0])
@pytest.mark.parametrize("softcap", [None, 80.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_references_far_below_the_log_sum_exp(dtype, softcap, jump, tiling, monkeypatch):
    case = jumping(dtype, jump, softcap=softcap)
    cut(monkeypatch, TILINGS[tiling])
    finished = count_finishes(monkeypatch)
    needs = (True, True, False)
    ours, exact = leaves_of(case, needs), leaves_of(case.double(), needs)
    tokens = token_logps(ours.hidden, ours.head, ours.labels, path="local", engine="cublas")
    truth = true_logps(exact)
    assert largest_error(tokens, truth) <= 2e-5
    p = truth[0, 3].exp().item()
    assert 0.99 < p < 1 - 1e-6
    upstream = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3)).double()
    upstream[1] = 0.0
    upstream[2] *= 1e-9
    (tokens.double() * upstream).sum().backward()
    (truth * upstream).sum().backward()
    assert finished == [labelled(case)]
    assert relative(ours.weight.grad, exact.weight.grad) <= TOLERANCE[dtype]
    assert not ours.hidden.grad[1].any()
    # Row by row: the nearly certain one and the tiny ones keep their digits as well.
    wide = 3e-4 if dtype == torch.float32 else 2.5e-2
    for got, wanted in zip(
        ours.hidden.grad.flatten(0, 1), exact.hidden.grad.flatten(0, 1), strict=True
    ):
        assert relative(got, wanted) <= wide


@pytest.mark.parametrize("tiling", ["narrow", "slabs"])
@pytest.mark.parametrize("jump", [0.0, 40.0, 75.0])
@pytest.mark.parametrize("softcap", [None, 80.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_frozen_head_leaves_nearly_certain_rows_their_digits(
    dtype, softcap, jump, tiling, monkeypatch
):
    case = jumping(dtype, jump, softcap=softcap)
    cut(monkeypatch, TILINGS[tiling])
    needs = (True, False, False)
    ours, exact = leaves_of(case, needs), leaves_of(case.double(), needs)
    tokens = token_logps(ours.hidden, ours.head, ours.labels, path="stash", engine="cublas")
    truth = true_logps(exact)
    assert 0.99 < truth[0, 3].exp().item() < 1 - 1e-6
    upstream = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3)).double()
    (tokens.double() * upstream).sum().backward()
    (truth * upstream).sum().backward()
    wide = 3e-4 if dtype == torch.float32 else 2.5e-2
    for got, wanted in zip(
        ours.hidden.grad.flatten(0, 1), exact.hidden.grad.flatten(0, 1), strict=True
    ):
        assert relative(got, wanted) <= wide


@pytest.mark.parametrize("width", [5, 64, 101])
@pytest.mark.parametrize("jump", [0.0, 59.0, 75.0])
@pytest.mark.parametrize("softcap", [None, 80.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_finished_gradient_is_the_gradient(dtype, softcap, jump, width):
    generator = torch.Generator().manual_seed(0)
    rows, vocab, size = 12, 101, 16
    math = HeadMath(softcap, 1.0, 1.0, dtype)
    hidden = torch.randn(rows, size, generator=generator)
    weight = torch.randn(vocab, size, generator=generator)
    weight *= 8 / (hidden @ weight.t()).abs().max()
    bias = torch.zeros(vocab)
    bias[:5] = -jump
    # Before the shard, after it, and everywhere inside.
    targets = torch.tensor([-3, 101, 250, 0, 4, 5, 63, 64, 99, 100, 31, 17])
    logits = hidden.double() @ weight.double().t() + bias.double()
    # Row 9 is nearly certain of its target.
    hidden[9] += weight[100] * (13 - logits[9, 100]).item() / weight[100].square().sum()
    logits = hidden.double() @ weight.double().t() + bias.double()
    slope = torch.ones_like(logits)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
        slope = 1 - (logits / softcap) ** 2
    statistics = RowStatistics.empty(rows, torch.float32, torch.device("cpu"))
    engine = CublasEngine(math, Tiles(rows, width, width, rows, True), torch.device("cpu"))
    kept, maxima = torch.full((rows, vocab), torch.nan, dtype=math.kept), torch.empty(1, rows)
    for first in range(0, vocab, width):
        slab = slice(first, min(first + width, vocab))
        tile = Tile(hidden, weight[slab], bias[slab], targets, first)
        engine.fold_and_keep(tile, statistics, kept, maxima)
    behind = statistics.maximum - maxima[0]
    assert (behind <= math.slack).all()
    if width == 5 and jump == 59:
        assert behind.max() > 35
    logsumexps = logits.logsumexp(1)
    inside = (targets >= 0) & (targets < vocab)
    own = logits.gather(1, targets.clamp(0, vocab - 1)[:, None])[:, 0]
    logps = torch.where(inside, own - logsumexps, -3.0)
    scale = torch.randn(rows, generator=generator)
    scale[3] = 0.0
    residuals = math.target_residual(logps.float(), logsumexps.float())
    numbers = RowGradients(statistics.logsumexps(), residuals, scale)
    whole = torch.empty(rows, vocab)
    engine.kept_gradient(kept.clone(), maxima, engine.part_width, 0, targets, numbers, whole, False)
    before = kept.clone()
    factor = engine.finish_kept(kept, maxima, targets, numbers)
    wanted = logits.softmax(1)
    wanted[inside, targets[inside]] -= 1
    wanted = wanted * slope * scale.double()[:, None]
    got = factor.double()[:, None] * kept.double()
    assert kept.isfinite().all() and factor.isfinite().all()
    unit = 1e-5 if dtype == torch.float32 else 8e-3
    for row in range(rows):
        # Of the others' entries, and of the target's own, however near to 1 its p is.
        assert relative(got[row], wanted[row]) <= unit, row
        assert relative(whole[row].double(), wanted[row]) <= unit, row
    at = torch.arange(rows)[inside], targets[inside]
    error = (got[at] - wanted[at]).abs()
    assert (error <= 30 * unit * wanted[at].abs() + 1e-12).all()
    # Only the targets' entries are written.
    before[at], kept[at] = 0, 0
    assert torch.equal(before, kept)
    assert not got[3].any()
