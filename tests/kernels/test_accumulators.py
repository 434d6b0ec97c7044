"""Rows of accumulators: rescaled, spread over a batch, and summed over sequences."""

from __future__ import annotations

import pytest
import torch
from machines import UNIT, dtypes, per_machine
from torch import Tensor
from truth import covering

from fused_prefopt.kernels.accumulators import rescale_rows, spread_rows
from fused_prefopt.kernels.sequence_sums import sequence_sums

pytestmark = pytest.mark.interpreted
ROUNDED = dtypes(*UNIT)
# Nothing is launched of no rows.
SIZES = [(1, 1), (7, 19), (5, 1024), (3, 2311), *per_machine([(0, 8)], [])]


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 7, 1025, 4099])
@pytest.mark.executed
def test_sequence_sums_with_empty_sequences(rows, in_order):
    torch.manual_seed(0)
    ids = torch.randint(0, 9, (rows,))
    ids[ids == 4] = 5
    if in_order:
        ids = ids.sort().values
    values = torch.randn(rows) * 100
    sums, lengths = sequence_sums(values, ids, 11, in_order)
    wanted = torch.zeros(11, dtype=torch.float64).index_add(0, ids, values.double())
    torch.testing.assert_close(sums.double(), wanted, rtol=1e-7, atol=0)
    assert torch.equal(lengths, torch.bincount(ids, minlength=11))
    assert sums[4] == 0 and lengths[4] == 0


@pytest.mark.executed
def test_rescaled_rows():
    torch.manual_seed(0)
    values, factor = torch.randn(9, 1500), torch.tensor([1.0, 0.5, 0.0] * 3)
    wanted = values * factor[:, None]
    rescale_rows(values, factor)
    assert torch.equal(values, wanted)


@pytest.mark.parametrize(
    ("size", "out_dtype", "added", "factor"),
    covering(SIZES, ROUNDED, [None, *ROUNDED], [False, True]),
)
@pytest.mark.executed
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
    # One rounding to the dtype, and those of fp32 on the way.
    unit = UNIT[out_dtype]
    assert ((got - wanted).abs() <= unit * wanted.abs() + 4 * 2.0**-24 * terms + 3e-8).all()
    rest = torch.ones(rows + 4, dtype=torch.bool).index_fill(0, index, False)
    assert (out[rest] == 7).all()


@pytest.mark.executed
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
