"""`sequence_kl` and its Triton kernels, interpreted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from divergences import Two, computed_kl, eager_tokens, make_two, ours, true_kl, weights_of
from reference_losses import LOSSES, loss_and_gradients, loss_of, pairs
from torch import Tensor
from truth import SMALLEST, TRANSFORMS, assert_gradients, largest_error, leaves_of, relative

from fused_prefopt.kernels.fold_kl_rows import SlabLogits, fold_kl_rows
from fused_prefopt.kernels.kl_gradient import kl_gradient
from fused_prefopt.ops.kl_tile import KlGradients, KlStatistics

pytestmark = pytest.mark.interpreted

# Sums of up to 7 log-probs, absolute in nats; gradients relative (Frobenius), against float64.
TOLERANCE = {
    torch.float32: (3e-5, 3e-6),
    torch.float16: (3e-5, 1e-3),
    torch.bfloat16: (3e-5, 8e-3),
}
PAIRS = [(name, "plain") for name in TRANSFORMS] + [("plain", "all"), ("all", "softcap")]
# (rows, vocabulary): one of each, primes, multiples of the block and of nothing.
SLABS = [(1, 1), (1, 257), (7, 13), (37, 131), (32, 64), (5, 2300)]
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


def cut(given: SlabLogits, columns: slice) -> SlabLogits:
    bias = None if given.bias is None else given.bias[columns]
    return SlabLogits(given.products[:, columns], bias, given.alpha, given.ceiling)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SLABS)
def test_fold_of_two_slabs(size, kind):
    (policy, logits), (reference, others) = (
        slab(size, one, seed) for seed, one in enumerate(KINDS[kind])
    )
    targets = torch.randint(size[1], size[:1], generator=torch.Generator().manual_seed(2))
    statistics = KlStatistics.empty(size[0], torch.float32, torch.device("cpu"))
    middle = (size[1] + 1) // 2
    for columns in (slice(0, middle), slice(middle, size[1])):
        if columns.start < columns.stop:
            fold_kl_rows(
                cut(policy, columns),
                cut(reference, columns),
                targets,
                statistics.policy,
                statistics.reference,
                statistics.weighted,
                columns.start,
            )
    logps, references = logits.log_softmax(1), others.log_softmax(1)
    kls = (references.exp() * (references - logps)).sum(1)
    assert (statistics.kls() - kls).abs().max() <= 1e-5
    for got, wanted in ((statistics.policy, logps), (statistics.reference, references)):
        found = wanted.gather(1, targets[:, None])[:, 0]
        assert (got.logps() - found).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SLABS)
def test_gradient_of_a_slab(size, kind, dtype):
    (policy, logits), (reference, others) = (
        slab(size, one, seed) for seed, one in enumerate(KINDS[kind])
    )
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(-1, size[1], size[:1], generator=generator)
    scale, other_scale, own = torch.randn(3, size[0], generator=generator)
    logsumexps = (each.logsumexp(1).float() for each in (logits, others))
    rows = KlGradients(*logsumexps, scale, other_scale, own)
    wanted = scale[:, None] * logits.softmax(1) + other_scale[:, None] * others.softmax(1)
    if policy.ceiling is not None:
        wanted *= 1 - (logits / policy.ceiling) ** 2
    there = targets >= 0
    wanted[there, targets[there]] = own[there].double()
    # In place where the dtypes agree, as fp32 does on CPU.
    out = policy.products if dtype == torch.float32 else torch.empty(size, dtype=dtype)
    sums = kl_gradient(policy, reference, targets, rows, out, sums=True)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    assert (out.double() - wanted).norm() <= tolerance * wanted.norm()
    assert (sums - wanted.sum(0)).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("first", [0, 3, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_slab_anywhere_meets_the_targets_inside(kind, first):
    (policy, logits), (reference, others) = (
        slab((9, 97), one, seed) for seed, one in enumerate(KINDS[kind])
    )
    columns = slice(first, first + 41)
    targets = torch.tensor([0, 2, 3, 31, 32, 43, 44, 72, 96])
    inside = (targets >= columns.start) & (targets < columns.stop)
    assert 0 < int(inside.sum()) < len(targets)
    statistics = KlStatistics.empty(9, torch.float32, torch.device("cpu"))
    for part in (statistics.policy, statistics.reference):
        part.target.fill_(123.0)
    parts = cut(policy, columns), cut(reference, columns)
    fold_kl_rows(
        *parts,
        targets,
        statistics.policy,
        statistics.reference,
        statistics.weighted,
        first,
    )
    for got, wanted in ((statistics.policy, logits), (statistics.reference, others)):
        found = wanted.gather(1, targets[:, None])[:, 0]
        assert (got.target[inside] - found[inside]).abs().max() <= 1e-5
        assert (got.target[~inside] == 123).all()
        exact = wanted[:, columns].logsumexp(1)
        assert (got.logsumexps() - exact).abs().max() <= 1e-5
    scale, other_scale, own = torch.randn(3, 9, generator=torch.Generator().manual_seed(2))
    logsumexps = (each.logsumexp(1).float() for each in (logits, others))
    rows = KlGradients(*logsumexps, scale, other_scale, own)
    wanted = scale[:, None] * logits.softmax(1) + other_scale[:, None] * others.softmax(1)
    if policy.ceiling is not None:
        wanted *= 1 - (logits / policy.ceiling) ** 2
    wanted[torch.arange(9), targets] = own.double()
    out = torch.empty(9, 41)
    sums = kl_gradient(*parts, targets, rows, out, first=first, sums=True)
    wanted = wanted[:, columns]
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
    statistics = KlStatistics.empty(4, torch.float32, targets.device)
    parts = (statistics.policy, statistics.reference, statistics.weighted)
    with pytest.raises(ValueError, match=r"reference: got shape \(4, 5\), wanted \(4, 6\)"):
        fold_kl_rows(policy, other, targets, *parts)


@pytest.mark.parametrize(("transform", "other"), PAIRS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_the_engine_matches_float64(transform, other, dtype):
    two = make_two(3, 13, 24, 101, transform=transform, other=other, dtype=dtype)
    got, truth = computed_kl(two, engine="cublas"), true_kl(two)
    values, gradients = TOLERANCE[dtype]
    assert largest_error(got.sums, truth.sums) <= values
    assert largest_error(got.tokens, truth.tokens) <= values
    assert_gradients(got, truth, gradients)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 3, 2), (5, 7, 11, 257), (2, 70, 33, 64)])
@pytest.mark.usefixtures("tiny_tiles")
def test_ragged_shapes_in_many_tiles(shape):
    two = make_two(*shape, largest=9.0)
    got, truth = computed_kl(two, engine="triton", workspace_mb=SMALLEST), true_kl(two)
    assert largest_error(got.sums, truth.sums) <= 1e-4
    assert_gradients(got, truth, 3e-6)


def test_banned_tokens_and_nothing_labelled():
    two = make_two(3, 5, transform="bias", other="bias")
    for case in two:
        case.bias[3:6] = -torch.inf
        case.labels[(case.labels >= 3) & (case.labels < 6)] = 8
    got, truth = ours(two, engine="triton"), eager_tokens(two.double())
    assert largest_error(got.kl, truth[0].sum(1)) <= 3e-5
    for case in two:
        case.labels.fill_(-100)
    got = computed_kl(two, engine="triton")
    assert torch.equal(got.sums, torch.zeros(3))
    assert not any(grad.any() for grad in got.grads)


def test_a_model_has_no_divergence_from_itself():
    case = make_two(3, 9, 16, 71, transform="all").policy
    assert torch.equal(ours(Two(case, case), engine="triton").kl, torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_narrow_operands(dtype, transform, scale):
    two = make_two(3, 13, 24, 101, transform=transform, other="bias", dtype=dtype)
    needs = (True, True, False)
    truth = true_kl(two, needs)
    # Master weights in fp32, as under autocast: their gradients can show what fp16 cannot.
    wide = leaves_of(two.policy, needs)
    wide = replace(wide, weight=wide.weight.detach().float().requires_grad_())
    got = ours(two._replace(policy=wide), engine="cublas")
    assert largest_error(got.kl, truth.sums) <= 3e-5
    of_kl, of_policy = weights_of(two)
    loss = (got.kl.double() * of_kl).sum() + (got.policy.double() * of_policy).sum()
    (loss * scale).backward()
    assert relative(wide.weight.grad / scale, truth.grads[1]) <= TOLERANCE[dtype][1]
    if scale == 1.0:
        assert relative(wide.hidden.grad, truth.grads[0]) <= TOLERANCE[dtype][1]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_beside_a_reference_equal_the_torch_engine(name):
    results = []
    for engine in ("torch", "cublas"):
        loss_fn = loss_of(name)
        loss_fn.op_options["engine"] = engine
        results.append(loss_and_gradients(loss_fn, pairs()))
    for got, wanted in zip(*results, strict=True):
        assert relative(got, wanted) <= 2e-5
