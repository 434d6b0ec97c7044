"""The kernels of two heads' divergence against float64."""

from __future__ import annotations

import pytest
import torch
from machines import ROUNDED_ONCE, dtypes
from torch import Tensor
from truth import covering

from fused_prefopt.kernels.kl import SlabLogits, fold_kl_rows, kl_gradient
from fused_prefopt.ops.tile import KlGradients, KlStatistics

pytestmark = pytest.mark.interpreted

# (rows, vocabulary): one of each, primes, multiples of the block and of nothing.
SLABS = [(1, 1), (1, 257), (7, 13), (37, 131), (32, 64), (5, 2300)]
# Where every row is a program of its own.
ROWS = [(1, 1), (1, 257), (7, 13), (3, 131), (4, 64), (3, 2300)]
# (alpha, ceiling, bias) of the policy and of the reference.
PLAIN, BENT = (1.0, None, False), (0.07, 15.0, True)
KINDS = {"plain": (PLAIN, PLAIN), "bent": (BENT, BENT), "mixed": (PLAIN, BENT)}


def slab(size, kind, seed) -> tuple[SlabLogits, Tensor]:
    """Products of a head and their logits in float64."""
    generator = torch.Generator().manual_seed(seed)
    products = torch.randn(size, generator=generator) * 8
    alpha, ceiling, has_bias = kind
    bias = torch.randn(size[1], generator=generator) if has_bias else None
    logits = (products.double() + (0 if bias is None else bias.double())) * alpha
    if ceiling is not None:
        logits = ceiling * torch.tanh(logits)
    return SlabLogits(products, bias, alpha, ceiling), logits


def slabs(size, kind) -> tuple[tuple[SlabLogits, Tensor], tuple[SlabLogits, Tensor]]:
    """Of the policy and of the reference."""
    policy, reference = (slab(size, one, seed) for seed, one in enumerate(KINDS[kind]))
    return policy, reference


def statistics_of(rows: int) -> KlStatistics:
    return KlStatistics.empty(rows, torch.float32, torch.device("cpu"), 0.3)


def fold(policy, reference, targets, into: KlStatistics, first: int = 0) -> None:
    running = into.policy, into.reference, into.weighted
    fold_kl_rows(policy, reference, targets, *running, first, into.mixtures)


def gradient_of(policy, logits, others, targets) -> tuple[KlGradients, Tensor]:
    """The numbers of the rows, and the whole gradient in float64."""
    generator = torch.Generator().manual_seed(2)
    scale, other_scale, own = torch.randn(3, len(targets), generator=generator)
    logsumexps = (each.logsumexp(1).float() for each in (logits, others))
    wanted = scale[:, None] * logits.softmax(1) + other_scale[:, None] * others.softmax(1)
    if policy.ceiling is not None:
        wanted *= 1 - (logits / policy.ceiling) ** 2
    there = targets >= 0
    wanted[there, targets[there]] = own[there].double()
    return KlGradients(*logsumexps, scale, other_scale, own), wanted


def cut(given: SlabLogits, columns: slice) -> SlabLogits:
    bias = None if given.bias is None else given.bias[columns]
    return SlabLogits(given.products[:, columns], bias, given.alpha, given.ceiling)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", ROWS)
@pytest.mark.executed
def test_fold_of_two_slabs(size, kind):
    (policy, logits), (reference, others) = slabs(size, kind)
    targets = torch.randint(size[1], size[:1], generator=torch.Generator().manual_seed(2))
    statistics, middle = statistics_of(size[0]), (size[1] + 1) // 2
    for columns in (slice(0, middle), slice(middle, size[1])):
        if columns.start < columns.stop:
            parts = cut(policy, columns), cut(reference, columns)
            fold(*parts, targets, statistics, columns.start)
    logps, references = logits.log_softmax(1), others.log_softmax(1)
    kls = (references.exp() * (references - logps)).sum(1)
    assert (statistics.kls() - kls).abs().max() <= 1e-5
    mixtures = statistics.mixtures
    of_mixtures = (
        (part, (logits + step * (logits - others)).log_softmax(1))
        for part, step in ((mixtures.extrapolated, 0.3), (mixtures.interpolated, -0.3))
    )
    every = (statistics.policy, logps), (statistics.reference, references), *of_mixtures
    for got, wanted in every:
        found = wanted.gather(1, targets[:, None])[:, 0]
        assert (got.logps() - found).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("size", "kind", "dtype"), covering(SLABS, KINDS, dtypes(torch.float32, torch.float16))
)
@pytest.mark.executed
def test_gradient_of_a_slab(size, kind, dtype):
    (policy, logits), (reference, others) = slabs(size, kind)
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(-1, size[1], size[:1], generator=generator)
    rows, wanted = gradient_of(policy, logits, others, targets)
    # In place where the dtypes agree, as fp32 does on CPU.
    out = policy.products if dtype == torch.float32 else torch.empty(size, dtype=dtype)
    sums = kl_gradient(policy, reference, targets, rows, out, sums=True)
    assert (out.double() - wanted).norm() <= ROUNDED_ONCE[dtype] * wanted.norm()
    assert (sums - wanted.sum(0)).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("first", [0, 3, 32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.executed
def test_a_slab_anywhere_meets_the_targets_inside(kind, first):
    (policy, logits), (reference, others) = slabs((9, 97), kind)
    columns = slice(first, first + 41)
    targets = torch.tensor([0, 2, 3, 31, 32, 43, 44, 72, 96])
    inside = (targets >= columns.start) & (targets < columns.stop)
    assert 0 < int(inside.sum()) < len(targets)
    statistics = statistics_of(9)
    for part in (statistics.policy, statistics.reference):
        part.target.fill_(123.0)
    parts = cut(policy, columns), cut(reference, columns)
    fold(*parts, targets, statistics, first)
    for got, wanted in ((statistics.policy, logits), (statistics.reference, others)):
        found = wanted.gather(1, targets[:, None])[:, 0]
        assert (got.target[inside] - found[inside]).abs().max() <= 1e-5
        assert (got.target[~inside] == 123).all()
        exact = wanted[:, columns].logsumexp(1)
        assert (got.logsumexps() - exact).abs().max() <= 1e-5
    rows, wanted = gradient_of(policy, logits, others, targets)
    out, wanted = torch.empty(9, 41), wanted[:, columns]
    sums = kl_gradient(*parts, targets, rows, out, first=first, sums=True)
    assert (out.double() - wanted).norm() <= 1e-5 * wanted.norm()
    assert (sums - wanted.sum(0)).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("who", ["policy", "reference", "out"])
def test_slabs_that_do_not_fit_are_refused(who):
    given = {name: torch.randn(4, 6) for name in ("policy", "reference", "out")}
    given[who] = given[who].t().contiguous().t()
    policy, reference = (SlabLogits(given[name], None, 1.0, None) for name in list(given)[:2])
    targets, zeros = torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    numbers = KlGradients(zeros, zeros, zeros, zeros, zeros)
    with pytest.raises(ValueError, match=f"{who}: got strides"):
        kl_gradient(policy, reference, targets, numbers, given["out"])
    other = SlabLogits(torch.randn(4, 5), None, 1.0, None)
    with pytest.raises(ValueError, match=r"reference: got shape \(4, 5\), wanted \(4, 6\)"):
        fold(policy, other, targets, statistics_of(4))
