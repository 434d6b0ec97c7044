"""The fused forward and the merge of its parts against float64."""

from __future__ import annotations

import pytest
import torch
from machines import TARGETS, UNIT, dtypes
from problems import (
    DESCRIPTORS,
    LOWEST,
    SHAPES,
    TRANSFORMS,
    Statistics,
    assert_exponentials,
    assert_folded,
    in_the_middle,
    problem,
    shape_of,
)
from torch import Tensor
from truth import covering

from fused_prefopt.kernels.fold_logits import Partials, merge_partials
from fused_prefopt.kernels.logits_gradient import logits_gradient
from fused_prefopt.ops.tile import Details

pytestmark = pytest.mark.interpreted
HALVES = dtypes(torch.float32, torch.float16)


def two_slabs(vocab: int) -> list[slice]:
    cut = (vocab + 1) // 2
    return [slab for slab in (slice(0, cut), slice(cut, vocab)) if slab.start < slab.stop]


def details_of(rows: int) -> Details:
    return Details.empty(rows, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("shape", "bias", "transform", "dtype", "descriptors", "keeps"),
    covering(SHAPES, [False, True], TRANSFORMS, HALVES, DESCRIPTORS, [True, False]),
)
@pytest.mark.executed(targets=TARGETS)
def test_two_slabs(shape, bias, transform, dtype, descriptors, keeps):
    given = problem(shape_of(shape, dtype), dtype, bias=bias, transform=transform)
    rows, vocab = given.logits.shape
    folded = Statistics(rows)
    reference = folded.maximum.clone()
    for slab in two_slabs(vocab):
        store = torch.full((rows, vocab + 3), torch.nan)
        kept, before = store[:, slab], folded.maximum.clone()
        options = {"kept": kept} if keeps else {}
        partials = given.fold(folded, slab, descriptors, **options)
        assert_parts(partials, given.logits[:, slab])
        if keeps:
            wanted = (given.logits[:, slab] - over_columns(partials, slab).double()).exp()
            torch.testing.assert_close(kept.double(), wanted, rtol=3e-5, atol=1e-7)
            kept.fill_(torch.nan)
        assert store.isnan().all()
        # A reference without slack is the maximum.
        factor = merge_partials(partials, folded.maximum, folded.total, reference=reference)
        assert torch.equal(reference, folded.maximum)
        torch.testing.assert_close(factor, (before - folded.maximum).exp())
    assert (folded.logsumexps - given.logsumexps).abs().max() <= 1e-5
    assert (folded.logps - (given.target_logits - given.logsumexps)).abs().max() <= 1.5e-5
    assert (folded.logps <= 0).all()


def over_columns(partials: Partials, slab: slice) -> Tensor:
    """(rows, columns) the maximum of the part that a column is in."""
    wide = partials.maximum.repeat_interleave(partials.width, 0)
    return wide[: slab.stop - slab.start].t()


def assert_parts(partials: Partials, logits: Tensor) -> None:
    """Maxima, and sums that refer to these very numbers."""
    parts = logits.split(partials.width, 1)
    peaks = torch.stack([part.amax(1) for part in parts])
    assert (partials.maximum - peaks).abs().max() <= 1e-5
    above = partials.maximum.double()
    totals = [(part - top[:, None]).exp().sum(1) for part, top in zip(parts, above, strict=True)]
    torch.testing.assert_close(partials.total.double(), torch.stack(totals), rtol=2e-5, atol=0)


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.executed(targets=TARGETS)
def test_exponentials_kept_in_the_dtype(dtype, cap):
    given = problem(shape_of("even", dtype), dtype, transform=(1.0, cap))
    kept = torch.empty_like(given.logits, dtype=dtype)
    partials = given.fold(Statistics(len(kept)), kept=kept)
    wanted = (given.logits - over_columns(partials, slice(0, kept.shape[1])).double()).exp()
    # What fp16 cannot show is at most half of its smallest step.
    torch.testing.assert_close(kept.double(), wanted, rtol=1.01 * UNIT[dtype] + 3e-5, atol=6e-8)


@pytest.mark.parametrize(("shape", "dtype"), covering(SHAPES, dtypes(torch.float32)))
@pytest.mark.executed(targets=TARGETS)
def test_entropy_mean_and_best(shape, dtype):
    given = problem(shape_of(shape, dtype), dtype, bias=True, transform=(1.0, 30.0))
    rows, vocab = given.logits.shape
    folded, details = Statistics(rows), details_of(rows)
    for slab in two_slabs(vocab):
        partials = given.fold(folded, slab, details=True)
        merge_partials(partials, folded.maximum, folded.total, details, offset=slab.start)
    logps, total = given.logits.log_softmax(1), folded.total
    for got, wanted in (
        (total.log() - details.weighted / total, -(logps.exp() * logps).sum(1)),
        (details.squares.log() - 2 * total.log(), (2 * logps).logsumexp(1)),
        (details.logit_sum.double() / vocab, given.logits.mean(1)),
    ):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(details.best.long(), given.logits.argmax(1))


@pytest.mark.parametrize("first", [0, 32, 64])
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.executed
def test_a_slab_finds_the_targets_inside(dtype, cap, first):
    given, slab = in_the_middle(dtype, cap), slice(first, first + 48)
    folded, details = Statistics(9), details_of(9)
    folded.target_logit.fill_(123.0)
    partials = given.fold(folded, slab, details=True)
    merge_partials(partials, folded.maximum, folded.total, details, first)
    assert_folded(folded, given, slab)
    assert torch.equal(details.best.long(), first + given.logits[:, slab].argmax(1))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.executed(targets=TARGETS)
def test_a_row_of_nan_stays_alone_and_banned_entries_have_no_weight(dtype):
    given = problem(shape_of("even", dtype), dtype, bias=True)
    # Some parts hold nothing but banned entries.
    banned = slice(3, given.logits.shape[1] * 9 // 10)
    given.hidden[2], given.bias[banned], given.targets[9] = torch.nan, -torch.inf, 7
    folded = Statistics(len(given.targets))
    merge_partials(given.fold(folded), folded.maximum, folded.total)
    logits = given.hidden.double() @ given.weight.double().t() + given.bias.double()
    wanted = logits.log_softmax(1).gather(1, given.targets[:, None])[:, 0]
    assert wanted[2].isnan() and wanted[9] == -torch.inf
    torch.testing.assert_close(folded.logps.double(), wanted, rtol=0, atol=1.5e-5, equal_nan=True)


@pytest.mark.parametrize("operand", ["hidden", "weight", "kept"])
def test_operands_without_contiguous_rows_are_refused(operand):
    given, kept = problem((4, 6, 8), torch.float32), torch.empty(4, 6)
    tensor = {"kept": kept}.get(operand, getattr(given, operand, None))
    tensor.set_(tensor.t().contiguous().t())
    with pytest.raises(ValueError, match=f"{operand}: got shape"):
        given.fold(Statistics(4), kept=kept)


@pytest.mark.parametrize("dtype", dtypes(torch.float32))
@pytest.mark.executed(targets=TARGETS)
def test_offsets_beyond_31_bits(dtype):
    # 2 rows whose tiles lie 2^31 entries apart, in 4 GiB of untouched virtual memory.
    far = 2**31 + 64
    kept = torch.empty(far + 200, dtype=torch.float16).as_strided((2, 100), (far, 1))
    given, folded = problem((2, 100, 8), dtype), Statistics(2)
    partials = given.fold(folded, kept=kept)
    merge_partials(partials, folded.maximum, folded.total)
    maxima = {"maxima": partials.maximum, "part_width": partials.width}
    logits_gradient(kept, folded.maximum, kept, **maxima)
    wanted = (given.logits - folded.maximum.double()[:, None]).exp()
    torch.testing.assert_close(kept.double(), wanted, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("slack", [0.0, 8.0, 60.0])
@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.executed
def test_merged_parts_move_references_as_rows_do(slack, rows):
    generator = torch.Generator().manual_seed(0)
    folded = Statistics(rows)
    maximum, total = folded.maximum, folded.total
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
        assert_exponentials(factor, before - reference)
    exact = logits.double().flatten(0, 1).logsumexp(0)
    torch.testing.assert_close((maximum + total.log()).double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.executed
def test_merged_parts_without_finite_logits():
    folded = Statistics(3)
    reference = folded.maximum.clone()
    part = torch.tensor([[LOWEST, 5.0, 1.0], [LOWEST, torch.nan, torch.inf]])
    sums = torch.tensor([[0.0, 1.0, 1.0], [0.0, torch.nan, torch.nan]])
    options = {"reference": reference, "slack": 60.0}
    factor = merge_partials(Partials(part, sums, 1), folded.maximum, folded.total, **options)
    assert folded.total[0] == 0 and reference[0] == LOWEST and factor[0] == 1
    assert folded.total[1:].isnan().all()
