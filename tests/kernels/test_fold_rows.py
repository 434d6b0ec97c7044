"""Slabs of products folded into rows' statistics, and kept against references that move rarely.

Against float64.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from machines import UNIT, dtypes
from problems import LOWEST, TRANSFORMS, Statistics, assert_folded, in_the_middle
from torch import Tensor
from truth import covering

from fused_prefopt.kernels.fold_rows import fold_rows
from fused_prefopt.ops.precision import HeadMath
from fused_prefopt.ops.tile import WeighedRows

pytestmark = pytest.mark.interpreted

SLACK = {dtype: HeadMath(None, 1.0, 1.0, dtype).slack for dtype in (torch.float16, torch.bfloat16)}
# Of a value that has been rounded, scaled and rounded again.
ROUNDING = {dtype: max(2.05 * unit, 1e-5) for dtype, unit in UNIT.items()}
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


def rising(width: int, slack: float) -> Tensor:
    """(rows, 3 · width) fp32 logits with the maxima of RISES."""
    generator = torch.Generator().manual_seed(0)
    parts = [-7 * torch.rand(len(RISES), width, generator=generator) for _ in range(3)]
    for slab, part in enumerate(parts):
        for row, (rises, _) in enumerate(RISES.values()):
            part[row, (row + slab) % width] = 0.0
            part[row] += 4.0 + slack * rises[slab]
    return torch.cat(parts, 1)


class Folded(Statistics):
    """Slab by slab through `fold_rows`, with all that refers to the references."""

    def __init__(self, logits: Tensor, width: int, dtype: torch.dtype, slack: float, **head):
        rows = logits.shape[0]
        super().__init__(rows)
        self.logits, self.width, self.slack = logits, width, slack
        self.head = {"alpha": 1.0, "ceiling": None} | head
        self.reference = self.maximum.clone()
        # Beyond the slabs nothing may be written.
        self.weights = torch.full((rows + 1, logits.shape[1] + 5), 7.0, dtype=dtype)
        self.sums = torch.randn(rows, 150, generator=torch.Generator().manual_seed(1))
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


@pytest.mark.parametrize(
    ("what", "width", "dtype"),
    # The softcap's slope is in some of what is kept: both as one factor.
    covering(
        product(TRANSFORMS, [None, "kept", "weighed"]),
        [1, 2, 64, 777, 5000],
        dtypes(torch.float32, torch.bfloat16),
    ),
)
@pytest.mark.executed
def test_two_slabs(what, width, dtype):
    torch.manual_seed(0)
    (alpha, softcap), kept = what
    products, bias = (torch.randn(7, 2 * width) * 9).to(dtype), torch.randn(2 * width)
    products[3] = 200 * torch.rand(2 * width)
    products[4, : width // 2] = -torch.inf
    logits = (products.double() + bias.double()) * alpha
    if softcap is not None:
        logits, alpha = softcap * torch.tanh(logits / softcap), alpha / softcap
    targets = torch.randint(0, 2 * width, (7,))
    folded, sums = Statistics(7), torch.randn(7, 3)
    reference, weights = folded.maximum.clone(), torch.full((7, 2 * width), torch.nan)
    for start in (0, width):
        slab = slice(start, start + width)
        # A strided view, as the paths pass them.
        out = weights[:, slab] if kept else None
        before, earlier = folded.maximum.clone(), sums.clone()
        fold_rows(
            products[:, slab],
            bias[slab],
            targets,
            folded.maximum,
            folded.total,
            folded.target_logit,
            alpha=alpha,
            ceiling=softcap,
            kept=out,
            # Without slack the reference is the maximum.
            weighed=WeighedRows(reference, weights, start, sums) if kept == "weighed" else None,
            first=start,
        )
        if kept == "weighed":
            assert torch.equal(reference, folded.maximum)
            torch.testing.assert_close(sums, earlier * (before - folded.maximum).exp()[:, None])
            # What came before the slab refers to the new maximum as well.
            slab = slice(0, start + width)
        if out is not None:
            wanted = (logits[:, slab] - folded.maximum.double()[:, None]).exp()
            if softcap is not None and kept == "weighed":
                wanted *= 1 - (logits[:, slab] / softcap) ** 2
            if kept == "weighed":
                # The target's own is left out: its share comes from its log-prob.
                wanted[torch.arange(2 * width)[slab] == targets[:, None]] = 0.0
            torch.testing.assert_close(weights[:, slab].double(), wanted, rtol=5e-5, atol=1e-6)
    logsumexps = (folded.maximum + folded.total.log()).double()
    torch.testing.assert_close(logsumexps, logits.logsumexp(1), rtol=2e-7, atol=1e-5)
    found = logits.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(folded.target_logit.double(), found, rtol=2e-7, atol=4e-6)
    assert (folded.logps <= 0).all()


@pytest.mark.parametrize("first", [0, 32, 64])
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("dtype", dtypes(torch.float32, torch.float16))
@pytest.mark.executed
def test_a_slab_finds_the_targets_inside(dtype, cap, first):
    given, slab, folded = in_the_middle(dtype, cap), slice(first, first + 48), Statistics(9)
    folded.target_logit.fill_(123.0)
    given.fold_products(folded, slab)
    assert_folded(folded, given, slab)


@pytest.mark.parametrize("width", [5, 64, 4500])
@pytest.mark.parametrize("dtype", dtypes(torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.executed
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
@pytest.mark.executed
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


@pytest.mark.parametrize("dtype", dtypes(torch.float32, torch.bfloat16))
@pytest.mark.executed
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
@pytest.mark.parametrize("dtype", dtypes(torch.float32, torch.bfloat16))
@pytest.mark.executed
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


@pytest.mark.executed
def test_without_references_only_the_first_rows_are_kept_as_well():
    logits = rising(30, 60.0)
    folded, kept = Statistics(len(RISES)), torch.full((3, 33), 7.0)
    fold_rows(
        logits[:, :30],
        None,
        torch.zeros(len(RISES), dtype=torch.int64),
        folded.maximum,
        folded.total,
        folded.target_logit,
        alpha=1.0,
        ceiling=None,
        kept=kept[:2, :30],
    )
    wanted = (logits[:2, :30].double() - folded.maximum[:2, None].double()).exp()
    torch.testing.assert_close(kept[:2, :30].double(), wanted, rtol=1e-5, atol=1e-7)
    assert (kept[2] == 7).all() and (kept[:, 30:] == 7).all()
