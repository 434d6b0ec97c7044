"""Both kernels of the gradient by the logits against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from machines import ROUNDED_ONCE, TARGETS, dtypes
from problems import (
    DESCRIPTORS,
    SHAPES,
    TRANSFORMS,
    assert_close,
    in_the_middle,
    problem,
    shape_of,
)
from truth import covering

from fused_prefopt.kernels.logits_gradient import logits_gradient

pytestmark = pytest.mark.interpreted
HALVES = dtypes(torch.float32, torch.float16)
ROUNDED = dtypes(torch.float32, torch.float16, torch.bfloat16)


def assert_gradient(got, sums, wanted):
    """And its sums over rows, before rounding."""
    assert_close(got, wanted, ROUNDED_ONCE[got.dtype])
    assert_close(sums, wanted.sum(0), 1e-4 if wanted.shape[1] == 1 else 1e-5)


@pytest.mark.parametrize(
    ("shape", "transform", "dtype", "descriptors"),
    covering(SHAPES, TRANSFORMS, HALVES, DESCRIPTORS),
)
@pytest.mark.executed(targets=TARGETS)
def test_from_hidden_and_weight(shape, transform, dtype, descriptors):
    given = problem(shape_of(shape, dtype), dtype, bias=True, transform=transform)
    rows, vocab = given.logits.shape
    store, scale = torch.full((rows, vocab + 3), torch.nan, dtype=dtype), torch.randn(rows)
    out = store[:, :vocab]
    sums = given.recompute(scale, out, descriptors=descriptors)
    assert_gradient(out, sums, given.gradient(scale))
    assert store[:, vocab:].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.executed
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_rows_that_are_none_leave_no_overflow_in_the_sums(dtype):
    """Their logits are the bias alone, whose exponential no float32 holds."""
    given = problem((9, 160, 24), dtype)
    bias = torch.full((160,), 100.0, dtype=dtype)
    given = dataclasses.replace(given, bias=bias, logits=given.logits + 100)
    scale, out = torch.randn(9), torch.empty(9, 160, dtype=dtype)
    wanted = given.gradient(scale)
    for sums in (given.recompute(scale, out), given.from_products(scale, given.products, out)):
        assert_close(sums, wanted.sum(0), 2e-5)


@pytest.mark.parametrize(("shape", "transform", "dtype"), covering(SHAPES, TRANSFORMS[:2], HALVES))
@pytest.mark.executed(targets=TARGETS)
def test_without_sums_of_the_rows(shape, transform, dtype):
    given = problem(shape_of(shape, dtype), dtype, transform=transform)
    scale, out = torch.randn(len(given.targets)), torch.empty_like(given.logits, dtype=dtype)
    assert given.recompute(scale, out, sums=False) is None
    assert_close(out, given.gradient(scale), ROUNDED_ONCE[dtype])


@pytest.mark.parametrize(("shape", "transform", "dtype"), covering(SHAPES, TRANSFORMS, ROUNDED))
@pytest.mark.executed
def test_from_products(shape, transform, dtype):
    given = problem(shape_of(shape, dtype), torch.float32, bias=True, transform=transform)
    products, scale = given.products, torch.randn(len(given.targets))
    # In place where the dtypes agree, as fp32 does on CPU.
    out = products if dtype == torch.float32 else torch.empty_like(products, dtype=dtype)
    sums = given.from_products(scale, products, out)
    assert_gradient(out, sums, given.gradient(scale))


@pytest.mark.parametrize("part_width", [64, 128, 5000])
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("dtype", dtypes(torch.float32, torch.bfloat16))
@pytest.mark.executed
def test_from_kept_exponentials(dtype, cap, part_width):
    given = problem((21, 301, 8), torch.float32, transform=(1.0, cap))
    maxima = torch.stack([part.amax(1) for part in given.logits.split(part_width, 1)]).float()
    above = maxima.repeat_interleave(part_width, 0)[:301].t()
    kept = (given.logits - above.double()).exp().to(dtype)
    scale, gradient = torch.randn(21), kept.clone()
    logsumexps = given.logsumexps.float()
    options = {"ceiling": cap, "maxima": maxima, "part_width": part_width}
    of_targets = given.of_targets(scale)
    sums = logits_gradient(gradient, logsumexps, gradient, **of_targets, **options, sums=True)
    wanted = given.gradient(scale)
    assert_close(gradient, wanted, ROUNDED_ONCE[dtype])
    assert_close(sums, wanted.sum(0), ROUNDED_ONCE[dtype])
    # Without targets: the softmax (times the slope) alone, as `stash` wants it.
    assert logits_gradient(kept, logsumexps, kept, **options) is None
    assert_close(kept, given.logits.softmax(1) * given.slope, ROUNDED_ONCE[dtype])


@pytest.mark.parametrize(("part_width", "first"), [(40, 0), (64, 40), (24, 48)])
def test_parts_that_do_not_fit_are_refused(part_width, first):
    kept, row = torch.rand(2, 100), torch.zeros(2)
    message = f"part_width: got {part_width} and a slab at {first}, wanted multiples of 16"
    options = {"maxima": torch.zeros(9, 2), "part_width": part_width, "first": first}
    with pytest.raises(ValueError, match=message):
        logits_gradient(kept, row, kept, **options)


@pytest.mark.parametrize("first", [0, 32, 64])
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.executed
def test_a_slab_meets_the_targets_inside(dtype, cap, first):
    given, slab = in_the_middle(dtype, cap), slice(first, first + 48)
    scale = torch.randn(9, generator=torch.Generator().manual_seed(1))
    wanted = given.gradient(scale)[:, slab]
    out = torch.empty(9, 48, dtype=dtype)
    assert_gradient(out, given.recompute(scale, out, slab), wanted)
    sums = given.from_products(scale, given.products[:, slab], out.fill_(torch.nan), slab)
    assert_gradient(out, sums, wanted)
    # From exponentials: the maxima of parts of 32 entries of the whole vocabulary.
    maxima = torch.stack([part.amax(1) for part in given.logits.split(32, 1)]).float()
    above = maxima.repeat_interleave(32, 0).t()[:, slab].double()
    kept = (given.logits[:, slab] - above).exp().float()
    options = {"ceiling": cap, "maxima": maxima, "part_width": 32, "first": first, "sums": True}
    logsumexps = given.logsumexps.float()
    sums = logits_gradient(kept, logsumexps, kept, **given.of_targets(scale), **options)
    assert_gradient(kept, sums, wanted)


@pytest.mark.parametrize("first", [0, 7, 48, 100])
@pytest.mark.executed
def test_one_reference_a_row_serves_slabs_that_start_anywhere(first):
    given, slab = in_the_middle(torch.float32, None), slice(first, first + 53)
    reference = given.logits.amax(1).float() - 11.0
    kept = (given.logits[:, slab] - reference.double()[:, None]).exp().float()
    scale = torch.randn(9, generator=torch.Generator().manual_seed(1))
    options = {"maxima": reference[None], "part_width": 1 << 30, "first": first}
    logits_gradient(kept, given.logsumexps.float(), kept, **given.of_targets(scale), **options)
    assert_close(kept, given.gradient(scale)[:, slab], 1e-5)
