"""Slabs anywhere in the vocabulary, exponentials that refer to a reference, and spread rows.

In the interpreter on CPU.
"""

from __future__ import annotations

import pytest
import torch
from test_interpreted_kernels import BLOCK, LOWEST, TOLERANCE, assert_close, problem, statistics
from torch import Tensor

from fused_prefopt.kernels.fold_logits import Partials, fold_logits
from fused_prefopt.kernels.logits_gradient import logits_gradient
from fused_prefopt.kernels.merge_partials import merge_partials
from fused_prefopt.kernels.recompute_gradient import recompute_gradient
from fused_prefopt.kernels.row_statistics import fold_rows
from fused_prefopt.kernels.spread_rows import spread_rows
from fused_prefopt.ops.head_math import HeadMath
from fused_prefopt.ops.tile import Details, WeighedRows

pytestmark = pytest.mark.interpreted

SLACK = {dtype: HeadMath(None, 1.0, 1.0, dtype).slack for dtype in (torch.float16, torch.bfloat16)}
ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}
# Each row's maximum over three slabs, in slacks above the first, and the slabs at which its
# reference moves.
RISES = {
    "never": ((0.0, -1.0, -3.0), ()),
    "less": ((0.0, 0.5, 0.97), ()),
    "more at the second": ((0.0, 1.03, 1.5), (1,)),
    "more at the third": ((0.0, -0.2, 1.03), (2,)),
    "creeping": ((0.0, 0.6, 1.2), (2,)),
    "twice": ((0.0, 2.0, 3.5), (1, 2)),
    "falling": ((0.0, -9.0, 0.9), ()),
}


def rising(width: int, slack: float, seed: int = 0) -> Tensor:
    """(rows, 3 · width) fp32 logits with the maxima of RISES."""
    generator = torch.Generator().manual_seed(seed)
    parts = [-7 * torch.rand(len(RISES), width, generator=generator) for _ in range(3)]
    for slab, part in enumerate(parts):
        for row, (rises, _) in enumerate(RISES.values()):
            part[row, (row + slab) % width] = 0.0
            part[row] += 4.0 + slack * rises[slab]
    return torch.cat(parts, 1)


class Folded:
    """Slab by slab through `fold_rows`, with all that refers to the references."""

    def __init__(self, logits: Tensor, width: int, dtype: torch.dtype, slack: float, **head):
        self.logits, self.width, self.slack = logits, width, slack
        self.head = {"alpha": 1.0, "ceiling": None} | head
        rows = logits.shape[0]
        self.maximum, self.total, self.target_logit = statistics(rows)
        self.reference = self.maximum.clone()
        # Beyond the slabs nothing may be written.
        self.weights = torch.full((rows + 1, logits.shape[1] + 5), 7.0, dtype=dtype)
        self.sums = torch.randn(rows, 1500, generator=torch.Generator().manual_seed(1))
        self.targets = torch.zeros(rows, dtype=torch.int64)

    def fold(self, slab: int, rows: int | None = None, sums: bool = True) -> None:
        """Fold a slab, with the weights of the first `rows`."""
        first = slab * self.width
        columns = slice(first, first + self.width)
        reference, weights = self.reference[:rows], self.weights[:-1][:rows]
        own = self.sums[:rows] if sums else None
        fold_rows(
            self.logits[:, columns],
            None,
            self.targets,
            self.maximum,
            self.total,
            self.target_logit,
            **self.head,
            kept=weights[:, columns],
            weighed=WeighedRows(reference, weights, first, own),
            slack=self.slack,
            first=first,
        )


@pytest.mark.parametrize("width", [5, 64, 4500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_reference_moves_only_where_a_maximum_exceeds_it_by_more_than_the_slack(dtype, width):
    slack = SLACK.get(dtype, 60.0)
    logits = rising(width, slack)
    folded = Folded(logits, width, dtype, slack)
    moves = [set() for _ in RISES]
    for slab in range(3):
        before, weights, sums = (
            value.clone() for value in (folded.reference, folded.weights, folded.sums)
        )
        folded.fold(slab)
        done, end = slab * width, (slab + 1) * width
        highest = logits[:, :end].amax(1)
        assert torch.equal(folded.maximum, highest)
        moved = highest - before > slack
        assert torch.equal(folded.reference, highest.where(moved, before))
        factor = (before - folded.reference).exp()
        assert ((highest - folded.reference) <= slack).all()
        # Where a reference stays, what was summed stays to the bit.
        still = ~moved
        assert torch.equal(folded.weights[:-1, :done][still], weights[:-1, :done][still])
        assert torch.equal(folded.sums[still], sums[still])
        torch.testing.assert_close(
            folded.sums[moved], sums[moved] * factor[moved, None], rtol=3e-7, atol=0
        )
        wanted = weights[:-1, :done].float() * factor[:, None]
        torch.testing.assert_close(
            folded.weights[:-1, :done][moved].float(),
            wanted[moved].to(dtype).float(),
            rtol=ROUNDING[dtype],
            atol=1e-7,
        )
        # All columns so far: exp(logit − reference).
        exact = (logits[:, :end].double() - folded.reference.double()[:, None]).exp()
        exact[:, 0] = 0.0  # the target's own is left out
        got = folded.weights[:-1, :end].double()
        assert got.isfinite().all()
        torch.testing.assert_close(got, exact, rtol=2 * ROUNDING[dtype], atol=1e-6)
        assert (folded.weights[-1] == 7).all() and (folded.weights[:, end:] == 7).all()
        for row in moved.nonzero().flatten().tolist():
            moves[row].add(slab)
    assert moves == [{0, *slabs} for _, slabs in RISES.values()]
    torch.testing.assert_close(
        (folded.maximum + folded.total.log()).double(),
        logits.double().logsumexp(1),
        rtol=2e-7,
        atol=1e-5,
    )


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_fp16_weights_never_overflow(softcap):
    # The largest that a reference lets through, many times.
    slack, width = SLACK[torch.float16], 33
    assert torch.tensor(slack).exp() < torch.finfo(torch.float16).max / 16
    logits = torch.full((40, 3 * width), 2.0)
    rises = torch.linspace(0, 2 * slack, 40)
    logits[:, width:] += rises[:, None]
    logits[:, 2 * width :] += rises.flip(0)[:, None] / 2
    head, bent = {}, logits.double()
    if softcap is not None:
        head = {"alpha": 1 / softcap, "ceiling": softcap}
        bent = softcap * torch.tanh(bent / softcap)
    folded = Folded(logits, width, torch.float16, slack, **head)
    for slab in range(3):
        folded.fold(slab)
        end = (slab + 1) * width
        got = folded.weights[:-1, :end]
        assert got.isfinite().all()
        exact = (bent[:, :end] - folded.reference.double()[:, None]).exp()
        if softcap is not None:
            exact *= 1 - (bent[:, :end] / softcap) ** 2
        exact[:, 0] = 0.0
        torch.testing.assert_close(got.double(), exact, rtol=4e-3, atol=1e-6)
    distance = bent.amax(1) - folded.reference.double()
    assert distance.max() > 0.8 * slack and distance.max() <= slack + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_finite_logits_stay_alone(dtype):
    width, slack = 40, 60.0
    clean = rising(width, slack)
    logits = clean.clone()
    logits[0, :width] = -torch.inf  # nothing yet at the first slab
    logits[1] = -torch.inf  # nothing at all
    logits[2, width + 3] = torch.nan
    logits[3, width + 3] = torch.inf
    folded, alone = (Folded(given, width, dtype, slack) for given in (logits, clean))
    for slab in range(3):
        folded.fold(slab)
        alone.fold(slab)
    lost = [False, False, True, True, False, False, False]
    assert folded.total.isnan().tolist() == lost
    for name in ("maximum", "total", "reference", "weights", "sums"):
        got, wanted = (getattr(each, name)[4 : len(RISES)] for each in (folded, alone))
        assert torch.equal(got, wanted), name
    late = logits[0].double() - folded.reference[0].double()
    assert folded.reference[0] == logits[0].max()
    exact = late.exp()
    exact[0] = 0.0
    torch.testing.assert_close(
        folded.weights[0, : 3 * width].double(), exact, rtol=2 * ROUNDING[dtype], atol=1e-6
    )
    # Without a logit nothing has weight, and nothing is scaled away or up.
    assert folded.total[1] == 0 and folded.reference[1] == LOWEST
    assert not folded.weights[1, : 3 * width].any()
    assert torch.equal(folded.sums[1], Folded(clean, width, dtype, slack).sums[1])
    assert folded.weights[2, width + 3].isnan() and folded.weights[3, width + 3].isnan()


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_first_rows_are_kept(dtype, rows, sums):
    width, slack = 70, 60.0
    logits = rising(width, slack)
    some, whole = (Folded(logits, width, dtype, slack) for _ in range(2))
    untouched = some.sums.clone()
    for slab in range(3):
        some.fold(slab, rows, sums)
        whole.fold(slab, sums=sums)
    for name in ("maximum", "total", "target_logit"):
        assert torch.equal(getattr(some, name), getattr(whole, name)), name
    for name in ("reference", "weights", "sums"):
        got, wanted = getattr(some, name), getattr(whole, name)
        assert torch.equal(got[:rows], wanted[:rows]), name
    assert (some.weights[rows:] == 7).all()
    assert (some.reference[rows:] == LOWEST).all()
    assert torch.equal(some.sums[rows:], untouched[rows:])
    assert sums or torch.equal(some.sums, untouched)


def test_without_references_only_the_first_rows_are_kept_as_well():
    logits = rising(30, 60.0)
    maximum, total, target_logit = statistics(len(RISES))
    kept = torch.full((3, 33), 7.0)
    fold_rows(
        logits[:, :30],
        None,
        torch.zeros(len(RISES), dtype=torch.int64),
        maximum,
        total,
        target_logit,
        alpha=1.0,
        ceiling=None,
        kept=kept[:2, :30],
    )
    wanted = (logits[:2, :30].double() - maximum[:2, None].double()).exp()
    torch.testing.assert_close(kept[:2, :30].double(), wanted, rtol=1e-5, atol=1e-7)
    assert (kept[2] == 7).all() and (kept[:, 30:] == 7).all()


@pytest.mark.parametrize("slack", [0.0, 8.0, 60.0])
@pytest.mark.parametrize("rows", [1, 70])
def test_merged_parts_move_references_as_rows_do(slack, rows):
    generator = torch.Generator().manual_seed(0)
    maximum, total, _ = statistics(rows)
    reference = maximum.clone()
    logits = torch.randn(3, 5, rows, generator=generator) * max(slack, 5.0)
    for part in logits:
        before, highest = reference.clone(), torch.maximum(maximum, part.amax(0))
        partials = Partials(part, torch.ones_like(part), 1)
        factor = merge_partials(partials, maximum, total, reference=reference, slack=slack)
        assert torch.equal(maximum, highest)
        moved = highest - before > slack
        assert torch.equal(reference, highest.where(moved, before))
        assert (factor[~moved] == 1).all()
        torch.testing.assert_close(factor, (before - reference).exp(), rtol=3e-7, atol=0)
    exact = logits.double().flatten(0, 1).logsumexp(0)
    torch.testing.assert_close((maximum + total.log()).double(), exact, rtol=1e-6, atol=1e-5)


def test_merged_parts_without_finite_logits():
    maximum, total, _ = statistics(3)
    reference = maximum.clone()
    part = torch.tensor([[LOWEST, 5.0, 1.0], [LOWEST, torch.nan, torch.inf]])
    sums = torch.tensor([[0.0, 1.0, 1.0], [0.0, torch.nan, torch.nan]])
    factor = merge_partials(
        Partials(part, sums, 1), maximum, total, reference=reference, slack=60.0
    )
    assert total[0] == 0 and reference[0] == LOWEST and factor[0] == 1
    assert total[1:].isnan().all()


@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("added", [None, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1), (7, 19), (5, 1024), (3, 2311), (0, 8)])
def test_spread_rows(size, out_dtype, added, factor):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows, depth = size
    # Columns of something wider, as a low-rank term's are.
    values = draw(rows, depth + 3)[:, 2 : depth + 2]
    index = torch.randperm(rows + 4, generator=generator)[:rows]
    out = torch.full((rows + 4, depth), 7.0, dtype=out_dtype)
    options = {"factor": draw(rows)} if factor else {}
    wanted = values.double()
    terms = wanted.abs()
    if added is not None:
        others = draw(rows, depth + 1).to(added)[:, 1:]
        options |= {"scale": draw(rows), "added": others, "own": draw(rows)}
        own = options["own"].double()[:, None] * others.double()
        wanted = wanted * options["scale"].double()[:, None]
        terms, wanted = wanted.abs() + own.abs(), wanted + own
    if factor:
        wanted = wanted * options["factor"].double()[:, None]
        terms = terms * options["factor"].double().abs()[:, None]
    spread_rows(values, index, out, **options)
    got = out[index].double()
    # One rounding to the dtype (the interpreter cuts bf16 off), and those of fp32 on the way.
    unit = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}[out_dtype]
    assert ((got - wanted).abs() <= unit * wanted.abs() + 4 * 2.0**-24 * terms + 3e-8).all()
    rest = torch.ones(rows + 4, dtype=torch.bool).index_fill(0, index, False)
    assert (out[rest] == 7).all()


def test_spread_terms_that_are_equal_cancel_exactly():
    # A row of probability 1: what was summed is its target's row of the weight.
    added = torch.randn(4, 130, generator=torch.Generator().manual_seed(0))
    out, ones = torch.empty(4, 130), torch.ones(4)
    index = torch.tensor([2, 0, 3, 1])
    spread_rows(added.clone(), index, out, 3 * ones, scale=-ones, added=added, own=ones)
    assert torch.equal(out, torch.zeros(4, 130))


@pytest.mark.parametrize("who", ["values", "out", "added"])
def test_rows_to_spread_must_be_contiguous(who):
    given = {name: torch.randn(4, 6) for name in ("values", "out", "added")}
    given[who] = given[who].t().contiguous().t()
    index, ones = torch.arange(4), torch.ones(4)
    with pytest.raises(ValueError, match=f"{who}: got strides"):
        spread_rows(
            given["values"], index, given["out"], scale=ones, added=given["added"], own=ones
        )


FIRSTS = [0, 32, 64]


def in_the_middle(dtype: torch.dtype, cap: float | None):
    """A head, its slab of the vocabulary, and targets before, inside and after it."""
    given = problem((9, 160, 24), dtype, bias=True, transform=(1.0, cap))
    targets = torch.tensor([0, 31, 32, 63, 64, 95, 96, 159, 70])
    given.targets.copy_(targets)
    return given, targets


@pytest.mark.parametrize("first", FIRSTS)
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_forwards_of_a_slab_find_the_targets_inside(dtype, cap, first):
    given, targets = in_the_middle(dtype, cap)
    slab = slice(first, first + 48)
    inside = (targets >= slab.start) & (targets < slab.stop)
    assert 0 < int(inside.sum()) < len(targets)
    logits = given.logits[:, slab]
    found = given.logits.gather(1, targets[:, None])[:, 0]
    maximum, total, by_fold = statistics(9)
    by_rows = torch.full((9,), 123.0)
    by_fold.copy_(by_rows)
    details = Details.empty(9, torch.float32, torch.device("cpu"))
    partials = fold_logits(
        given.hidden,
        given.weight[slab],
        given.bias[slab],
        targets,
        by_fold,
        **given.head,
        block=BLOCK,
        descriptors=False,
        first=first,
        details=True,
    )
    merge_partials(partials, maximum, total, details, first)
    assert torch.equal(details.best.long(), first + logits.argmax(1))
    products = (given.hidden.double() @ given.weight[slab].double().t()).float()
    other_maximum, other_total, _ = statistics(9)
    fold_rows(
        products,
        given.bias[slab],
        targets,
        other_maximum,
        other_total,
        by_rows,
        **given.head,
        first=first,
    )
    exact = logits.logsumexp(1)
    for high, sums, got in ((maximum, total, by_fold), (other_maximum, other_total, by_rows)):
        assert (high.double() + sums.double().log() - exact).abs().max() <= 1e-5
        assert (got[inside].double() - found[inside]).abs().max() <= 1e-5
        assert (got[~inside] == 123).all()


@pytest.mark.parametrize("first", FIRSTS)
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_of_a_slab_meet_the_targets_inside(dtype, cap, first):
    given, targets = in_the_middle(dtype, cap)
    slab = slice(first, first + 48)
    scale = torch.randn(9, generator=torch.Generator().manual_seed(1))
    wanted = given.gradient(scale)[:, slab]
    numbers = {"residuals": given.residuals(), "scale": scale}
    logsumexps = given.logsumexps.float()
    fused = torch.empty(9, 48, dtype=dtype)
    fused_sums = recompute_gradient(
        given.hidden,
        given.weight[slab],
        given.bias[slab],
        logsumexps,
        targets,
        numbers["residuals"],
        scale,
        fused,
        **given.head,
        block=BLOCK,
        descriptors=False,
        first=first,
        sums=True,
    )
    products = (given.hidden.double() @ given.weight[slab].double().t()).float()
    plain = torch.empty(9, 48, dtype=dtype)
    plain_sums = logits_gradient(
        products,
        logsumexps,
        plain,
        targets=targets,
        **numbers,
        bias=given.bias[slab],
        **given.head,
        first=first,
        sums=True,
    )
    # From exponentials: the maxima of parts of 32 entries of the whole vocabulary.
    maxima = torch.stack([part.amax(1) for part in given.logits.split(32, 1)]).float()
    above = maxima.repeat_interleave(32, 0).t()[:, slab].double()
    kept = (given.logits[:, slab] - above).exp().float()
    kept_sums = logits_gradient(
        kept,
        logsumexps,
        kept,
        targets=targets,
        **numbers,
        ceiling=cap,
        maxima=maxima,
        part_width=32,
        first=first,
        sums=True,
    )
    for got, sums in ((fused, fused_sums), (plain, plain_sums), (kept, kept_sums)):
        assert_close(got, wanted, TOLERANCE[got.dtype])
        assert_close(sums, wanted.sum(0), 1e-5)


@pytest.mark.parametrize("first", [0, 7, 48, 100])
def test_one_reference_a_row_serves_slabs_that_start_anywhere(first):
    given, targets = in_the_middle(torch.float32, None)
    slab = slice(first, first + 53)
    reference = given.logits.amax(1).float() - 11.0
    kept = (given.logits[:, slab] - reference.double()[:, None]).exp().float()
    scale = torch.randn(9, generator=torch.Generator().manual_seed(1))
    logits_gradient(
        kept,
        given.logsumexps.float(),
        kept,
        targets=targets,
        residuals=given.residuals(),
        scale=scale,
        maxima=reference[None],
        part_width=1 << 30,
        first=first,
    )
    assert_close(kept, given.gradient(scale)[:, slab], 1e-5)
