"""The Triton kernels in the interpreter on CPU.

Interpretation is chosen when a kernel is defined, so it needs a process of its own, with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fused_prefopt.kernels.architectures import Block
from fused_prefopt.kernels.fold_logits import fold_logits
from fused_prefopt.kernels.logits_gradient import logits_gradient
from fused_prefopt.kernels.merge_partials import merge_partials
from fused_prefopt.kernels.recompute_gradient import recompute_gradient
from fused_prefopt.kernels.rescale import rescale_rows
from fused_prefopt.kernels.row_statistics import fold_rows
from fused_prefopt.kernels.sequence_sums import sequence_sums
from fused_prefopt.ops.tile import Details, WeighedRows

pytestmark = pytest.mark.interpreted

LOWEST = torch.finfo(torch.float32).min
# Absolute for log-sum-exps of logits up to 30, relative (Frobenius) for gradients.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
BLOCK = Block(rows=16, vocab=32, depth=16, group=2, warps=4, stages=2)
# The interpreter cuts off what bf16 cannot hold, where a GPU rounds: twice the error.
TRUNCATED = 8e-3
# (rows, vocabulary, hidden size): one of each, primes, multiples of the block and of nothing.
SHAPES = [(1, 1, 1), (1, 257, 16), (7, 13, 11), (37, 131, 48), (32, 64, 32), (53, 97, 19)]
TRANSFORMS = [(1.0, None), (1.3, 30.0), (0.02, None)]


@dataclass(frozen=True)
class Problem:
    """Operands of a head, and their logits in float64."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    logits: Tensor
    alpha: float
    ceiling: float | None

    @property
    def head(self) -> dict:
        return {"alpha": self.alpha, "ceiling": self.ceiling}

    @property
    def logsumexps(self) -> Tensor:
        return self.logits.logsumexp(1)

    def residuals(self) -> Tensor:
        """(c,) fp32 (p − 1) · slope of the targets."""
        found = self.logits.gather(1, self.targets[:, None])[:, 0]
        slope = 1.0 if self.ceiling is None else 1 - (found / self.ceiling) ** 2
        return ((found - self.logsumexps).expm1() * slope).float()

    def gradient(self, scale: Tensor) -> Tensor:
        """(c, v) float64 scale · (softmax − one-hot) · slope."""
        wanted = self.logits.softmax(1)
        wanted[torch.arange(len(self.targets)), self.targets] -= 1
        if self.ceiling is not None:
            wanted *= 1 - (self.logits / self.ceiling) ** 2
        return wanted * scale.double()[:, None]


def problem(shape, dtype, *, bias=False, transform=(1.0, None), seed=0) -> Problem:
    rows, vocab, depth = shape
    torch.manual_seed(seed)
    hidden, weight = torch.randn(rows, depth).to(dtype), torch.randn(vocab, depth)
    weight = (weight * 25 / (hidden.double() @ weight.double().t()).abs().max()).to(dtype)
    added = torch.randn(vocab).to(dtype) if bias else None
    alpha, softcap = transform
    logits = hidden.double() @ weight.double().t() + (0 if added is None else added.double())
    logits, ceiling = logits * alpha, None
    if softcap is not None:
        alpha, ceiling, logits = alpha / softcap, softcap, softcap * torch.tanh(logits / softcap)
    return Problem(hidden, weight, added, torch.randint(vocab, (rows,)), logits, alpha, ceiling)


def statistics(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.full((rows,), LOWEST), torch.zeros(rows), torch.zeros(rows)


def assert_close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Relative in the Frobenius norm."""
    assert got.isfinite().all()
    assert (got.double() - wanted).norm() <= tolerance * max(1e-30, wanted.norm().item())


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "softcap", "scale"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fused_forward_of_two_slabs(dtype, shape, bias, transform, descriptors):
    given = problem(shape, dtype, bias=bias, transform=transform)
    rows, vocab, _ = shape
    maximum, total, target_logit = statistics(rows)
    reference, cut = maximum.clone(), (vocab + 1) // 2
    for slab in (slice(0, cut), slice(cut, vocab)):
        if slab.start == slab.stop:
            continue
        kept = torch.full((rows, vocab), torch.nan)
        before = maximum.clone()
        partials = fold_logits(
            given.hidden,
            given.weight[slab],
            None if given.bias is None else given.bias[slab],
            given.targets,
            target_logit,
            **given.head,
            block=BLOCK,
            descriptors=descriptors,
            first=slab.start,
            kept=kept[:, slab],
        )
        parts = partials.maximum.repeat_interleave(BLOCK.vocab, 0)[: slab.stop - slab.start].t()
        wanted = (given.logits[:, slab] - parts.double()).exp()
        torch.testing.assert_close(kept[:, slab].double(), wanted, rtol=3e-5, atol=1e-7)
        # A reference without slack is the maximum.
        factor = merge_partials(partials, maximum, total, reference=reference)
        assert torch.equal(reference, maximum)
        torch.testing.assert_close(factor, (before - maximum).exp())
    logsumexps = maximum.double() + total.double().log()
    assert (logsumexps - given.logsumexps).abs().max() <= 1e-5
    logps = (target_logit - maximum) - total.log()
    wanted = given.logits.gather(1, given.targets[:, None])[:, 0] - given.logsumexps
    assert (logps - wanted).abs().max() <= 1.5e-5
    assert (logps <= 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_entropy_mean_and_best_of_the_fused_forward(shape):
    given = problem(shape, torch.float32, bias=True, transform=(1.0, 30.0))
    rows, vocab, _ = shape
    maximum, total, target_logit = statistics(rows)
    details = Details.empty(rows, torch.float32, torch.device("cpu"))
    cut = (vocab + 1) // 2
    for slab in (slice(0, cut), slice(cut, vocab)):
        if slab.start == slab.stop:
            continue
        partials = fold_logits(
            given.hidden,
            given.weight[slab],
            given.bias[slab],
            given.targets,
            target_logit,
            **given.head,
            block=BLOCK,
            descriptors=False,
            first=slab.start,
            details=True,
        )
        merge_partials(partials, maximum, total, details, offset=slab.start)
    entropy = total.log() - details.weighted / total
    wanted = -(given.logits.softmax(1) * given.logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(entropy.double(), wanted, rtol=1e-5, atol=1e-5)
    collision = (details.squares.log() - 2 * total.log()).double()
    likely = given.logits.log_softmax(1)
    torch.testing.assert_close(collision, (2 * likely).logsumexp(1), rtol=1e-5, atol=1e-5)
    mean = details.logit_sum.double() / vocab
    torch.testing.assert_close(mean, given.logits.mean(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(details.best.long(), given.logits.argmax(1))


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "softcap", "scale"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fused_gradient(dtype, shape, transform, descriptors):
    given = problem(shape, dtype, bias=True, transform=transform)
    rows, vocab, _ = shape
    scale = torch.randn(rows)
    out = torch.empty(rows, vocab + 3, dtype=dtype)[:, :vocab]
    sums = recompute_gradient(
        given.hidden,
        given.weight,
        given.bias,
        given.logsumexps.float(),
        given.targets,
        given.residuals(),
        scale,
        out,
        **given.head,
        block=BLOCK,
        descriptors=descriptors,
        sums=True,
    )
    wanted = given.gradient(scale)
    assert_close(out, wanted, TOLERANCE[dtype])
    assert_close(sums, wanted.sum(0), 1e-4 if vocab == 1 else 1e-5)


@pytest.mark.parametrize("kept", [None, "kept", "weighed"])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "softcap", "scale"])
@pytest.mark.parametrize("width", [1, 2, 64, 777, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_statistics_of_two_slabs(dtype, width, transform, kept):
    torch.manual_seed(0)
    alpha, softcap = transform
    products, bias = (torch.randn(7, 2 * width) * 9).to(dtype), torch.randn(2 * width)
    products[3] = 200 * torch.rand(2 * width)
    products[4, : width // 2] = -torch.inf
    logits = (products.double() + bias.double()) * alpha
    if softcap is not None:
        logits, alpha = softcap * torch.tanh(logits / softcap), alpha / softcap
    targets = torch.randint(0, 2 * width, (7,))
    maximum, total, target_logit = statistics(7)
    reference, sums = maximum.clone(), torch.randn(7, 3)
    weights = torch.full((7, 2 * width), torch.nan)
    for start in (0, width):
        slab = slice(start, start + width)
        # A strided view, as the paths pass them.
        out = weights[:, slab] if kept else None
        before, earlier = maximum.clone(), sums.clone()
        fold_rows(
            products[:, slab],
            bias[slab],
            targets,
            maximum,
            total,
            target_logit,
            alpha=alpha,
            ceiling=softcap,
            kept=out,
            # Without slack the reference is the maximum.
            weighed=WeighedRows(reference, weights, start, sums) if kept == "weighed" else None,
            first=start,
        )
        if kept == "weighed":
            assert torch.equal(reference, maximum)
            torch.testing.assert_close(sums, earlier * (before - maximum).exp()[:, None])
            # What came before the slab refers to the new maximum as well.
            slab = slice(0, start + width)
        if out is not None:
            wanted = (logits[:, slab] - maximum.double()[:, None]).exp()
            if softcap is not None and kept == "weighed":
                wanted *= 1 - (logits[:, slab] / softcap) ** 2
            if kept == "weighed":
                # The target's own is left out: its share comes from its log-prob.
                wanted[torch.arange(2 * width)[slab] == targets[:, None]] = 0.0
            torch.testing.assert_close(weights[:, slab].double(), wanted, rtol=5e-5, atol=1e-6)
    logsumexps = (maximum + total.log()).double()
    torch.testing.assert_close(logsumexps, logits.logsumexp(1), rtol=2e-7, atol=1e-5)
    found = logits.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(target_logit.double(), found, rtol=2e-7, atol=4e-6)
    logps = (target_logit - maximum) - total.log()
    assert (logps <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "softcap", "scale"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_a_slab_from_its_products(shape, transform, dtype):
    given = problem(shape, torch.float32, bias=True, transform=transform)
    products = (given.hidden.double() @ given.weight.double().t()).float()
    scale = torch.randn(shape[0])
    # In place where the dtypes agree, as fp32 does on CPU.
    out = products if dtype == torch.float32 else torch.empty_like(products, dtype=dtype)
    sums = logits_gradient(
        products,
        given.logsumexps.float(),
        out,
        targets=given.targets,
        residuals=given.residuals(),
        scale=scale,
        bias=given.bias,
        **given.head,
        sums=True,
    )
    wanted = given.gradient(scale)
    assert_close(out, wanted, TOLERANCE.get(dtype, TRUNCATED))
    assert_close(sums, wanted.sum(0), 1e-4 if shape[1] == 1 else 1e-5)


@pytest.mark.parametrize("part_width", [64, 128, 5000])
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_a_slab_from_kept_exponentials(dtype, cap, part_width):
    given = problem((21, 301, 8), torch.float32, transform=(1.0, cap))
    parts = -(-301 // part_width)
    maxima = torch.stack([part.amax(1) for part in given.logits.split(part_width, 1)]).float()
    assert maxima.shape == (parts, 21)
    above = maxima.repeat_interleave(part_width, 0)[:301].t()
    kept = (given.logits - above.double()).exp().to(dtype)
    scale = torch.randn(21)
    gradient, sums = kept.clone(), None
    sums = logits_gradient(
        gradient,
        given.logsumexps.float(),
        gradient,
        targets=given.targets,
        residuals=given.residuals(),
        scale=scale,
        ceiling=cap,
        maxima=maxima,
        part_width=part_width,
        sums=True,
    )
    wanted = given.gradient(scale)
    tolerance = TOLERANCE.get(dtype, TRUNCATED)
    assert_close(gradient, wanted, tolerance)
    assert_close(sums, wanted.sum(0), tolerance)
    # Without targets: the softmax (times the slope) alone, as `stash` wants it.
    weights = logits_gradient(
        kept,
        given.logsumexps.float(),
        kept,
        ceiling=cap,
        maxima=maxima,
        part_width=part_width,
    )
    assert weights is None
    slope = 1.0 if cap is None else 1 - (given.logits / cap) ** 2
    assert_close(kept, given.logits.softmax(1) * slope, tolerance)


@pytest.mark.parametrize(("part_width", "first"), [(40, 0), (64, 40), (24, 48)])
def test_parts_that_do_not_fit_are_refused(part_width, first):
    kept, row = torch.rand(2, 100), torch.zeros(2)
    message = f"part_width: got {part_width} and a slab at {first}, wanted multiples of 16"
    with pytest.raises(ValueError, match=message):
        logits_gradient(
            kept, row, kept, maxima=torch.zeros(9, 2), part_width=part_width, first=first
        )


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 7, 1025, 4099])
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


def test_rescaled_rows():
    torch.manual_seed(0)
    values, factor = torch.randn(9, 1500), torch.tensor([1.0, 0.5, 0.0] * 3)
    wanted = values * factor[:, None]
    rescale_rows(values, factor)
    assert torch.equal(values, wanted)


def test_a_row_of_nan_stays_alone():
    given = problem((5, 40, 8), torch.float32)
    given.hidden[2] = torch.nan
    maximum, total, target_logit = statistics(5)
    partials = fold_logits(
        given.hidden,
        given.weight,
        None,
        given.targets,
        target_logit,
        **given.head,
        block=BLOCK,
        descriptors=False,
    )
    merge_partials(partials, maximum, total)
    logps = (target_logit - maximum) - total.log()
    assert logps.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("operand", ["hidden", "weight", "kept"])
def test_operands_without_contiguous_rows_are_refused(operand):
    given = problem((4, 6, 8), torch.float32)
    tensors = {"hidden": given.hidden, "weight": given.weight, "kept": torch.empty(4, 6)}
    tensors[operand] = tensors[operand].t().contiguous().t()
    with pytest.raises(ValueError, match=f"{operand}: got shape"):
        fold_logits(
            tensors["hidden"],
            tensors["weight"],
            None,
            given.targets,
            torch.zeros(4),
            **given.head,
            block=BLOCK,
            descriptors=False,
            kept=tensors["kept"],
        )


def test_offsets_beyond_31_bits():
    # 2 rows whose tiles lie 2^31 entries apart, in 4 GiB of untouched virtual memory.
    far = 2**31 + 64
    storage = torch.empty(far + 200, dtype=torch.float16)
    kept = storage.as_strided((2, 100), (far, 1))
    given = problem((2, 100, 8), torch.float32)
    maximum, total, target_logit = statistics(2)
    partials = fold_logits(
        given.hidden,
        given.weight,
        None,
        given.targets,
        target_logit,
        **given.head,
        block=BLOCK,
        descriptors=False,
        kept=kept,
    )
    merge_partials(partials, maximum, total)
    logits_gradient(
        kept,
        maximum,
        kept,
        maxima=partials.maximum,
        part_width=BLOCK.vocab,
    )
    wanted = (given.logits - maximum.double()[:, None]).exp()
    torch.testing.assert_close(kept.double(), wanted, rtol=2e-3, atol=1e-6)
