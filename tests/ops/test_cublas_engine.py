"""The cuBLAS engine: references far below the log-sum-exp, gradients in place."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from machines import OP, dtypes, per_machine
from test_kept_probabilities import (
    EVERYTHING,
    SLABS,
    VOCAB,
    cut,
    in_slabs_of,
    keep,
    labelled,
    one_pass,
)
from torch import Tensor
from truth import (
    KERNEL_ENGINES,
    TRANSFORMS,
    Case,
    assert_gradients,
    covering,
    largest_error,
    leaves_of,
    make_case,
    relative,
    true_logps,
    true_result,
)

pytest.importorskip("triton")

from fused_prefopt import token_logps  # noqa: E402
from fused_prefopt.ops.cublas_engine import CublasEngine  # noqa: E402
from fused_prefopt.ops.cutting import Tiles  # noqa: E402
from fused_prefopt.ops.precision import HeadMath  # noqa: E402
from fused_prefopt.ops.tile import KeptTile, RowGradients, RowStatistics, Tile  # noqa: E402

pytestmark = pytest.mark.interpreted

SINGLE_OR_HALF = dtypes(torch.float32, torch.bfloat16)
# Those in which gradients are finished by rows: in fp16 references follow within 8 nats
# (`HeadMath.slack`), and none is left that far below.
FINISHED = [dtype for dtype in SINGLE_OR_HALF if dtype != torch.float16]
# The interpreter multiplies no bf16 tiles.
NARROW = per_machine(
    [
        ("cublas", torch.float32),
        ("cublas", torch.bfloat16),
        ("cublas", torch.float16),
        ("triton", torch.float16),
    ],
    list(product(KERNEL_ENGINES, dtypes())),
)


@pytest.mark.parametrize(
    ("what", "transform", "tiling"),
    covering(product(NARROW, [13, 0]), ["plain", "softcap", "all"], ["planned", "both"]),
)
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.executed
def test_narrow_operands_of_kept_rows(what, transform, tiling, monkeypatch):
    (engine, dtype), kept = what
    case = make_case(4, 9, 24, VOCAB, dtype=dtype, **TRANSFORMS[transform])
    keep(monkeypatch, kept or labelled(case))
    cut(monkeypatch, SLABS[tiling], in_slabs_of(engine))
    finished = count_finishes(monkeypatch)
    truth = true_result(case, needs=EVERYTHING)
    got = one_pass(case, engine=engine)
    assert largest_error(got.tokens, truth.tokens) <= 1e-5
    assert_gradients(got, truth, OP[dtype][1])
    # fp16's probabilities are kept in fp32, and a bias's gradient sums the tiles.
    factored = engine == "cublas" and dtype != torch.float16 and not kept
    assert bool(finished) == (factored and transform != "all")


def count_finishes(monkeypatch) -> list[int]:
    """Rows of each call of `finish_kept` from now on."""
    finished = []
    real = CublasEngine.finish_kept

    def finish(self, kept: KeptTile, *rest) -> Tensor:
        finished.append(kept.values.shape[0])
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


@pytest.mark.parametrize(
    ("logits", "dtype", "tiling"),
    covering(product([0.0, 40.0, 59.0, 75.0], [None, 80.0]), FINISHED, ["narrow", "slabs"]),
)
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.executed
def test_references_far_below_the_log_sum_exp(logits, dtype, tiling, monkeypatch):
    jump, softcap = logits
    case = jumping(dtype, jump, softcap=softcap)
    cut(monkeypatch, SLABS[tiling])
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
    assert relative(ours.weight.grad, exact.weight.grad) <= OP[dtype][1]
    assert not ours.hidden.grad[1].any()
    # Row by row: the nearly certain one and the tiny ones keep their digits as well.
    wide = 3e-4 if dtype == torch.float32 else 2.5e-2
    for got, wanted in zip(
        ours.hidden.grad.flatten(0, 1), exact.hidden.grad.flatten(0, 1), strict=True
    ):
        assert relative(got, wanted) <= wide


@pytest.mark.parametrize(
    ("logits", "dtype", "tiling"),
    covering(product([0.0, 40.0, 75.0], [None, 80.0]), SINGLE_OR_HALF, ["narrow", "slabs"]),
)
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.executed
def test_a_frozen_head_leaves_nearly_certain_rows_their_digits(logits, dtype, tiling, monkeypatch):
    jump, softcap = logits
    case = jumping(dtype, jump, softcap=softcap)
    cut(monkeypatch, SLABS[tiling])
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


@pytest.mark.parametrize(
    ("steps", "softcap", "dtype"),
    covering(product([0.0, 59.0, 75.0], [5, 64, 101]), [None, 80.0], SINGLE_OR_HALF),
)
def test_the_finished_gradient_is_the_gradient(steps, softcap, dtype):
    jump, width = steps
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
    found = KeptTile(kept, maxima, engine.part_width, targets)
    engine.kept_gradient(replace(found, values=kept.clone()), numbers, whole, False)
    before = kept.clone()
    factor = engine.finish_kept(found, numbers)
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
