"""Tensor cores that cut sums off: cases whose results are known, and whole passes of the op."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from emulator.cut_off import A100, H100, CutOff
from machines import OP, Machine, executing
from rounding import bound_of, gradient_bound
from truth import assert_gradients, computed, largest_error, make_case, true_result

from fused_prefopt.kernels.fold_logits import fold_logits
from fused_prefopt.ops.tuning import tuning_of

BOTH = pytest.mark.parametrize("cores", [A100, H100], ids=["a100", "h100"])
HALF = 2.0**-24
PLACE = 2.0**-23
INFINITY = math.inf
LEAST = {"bf16": -126, "fp16": -14}


def summed(cores: CutOff, left, right, start=0.0, kind: str = "bf16") -> float:
    """start + Σ left · right."""
    left, right = np.array(left, np.float64)[None], np.array(right, np.float64)[:, None]
    start = np.full((1, 1), start, np.float32)
    return float(cores(left, right, start, 2.0 ** LEAST[kind])[0, 0])


# What is below the last bit that is kept is nothing, however often it comes.
@pytest.mark.parametrize(
    ("cores", "terms", "found"),
    [
        (A100, [HALF] * 7, 1 + 3 * PLACE),
        (A100, [HALF], 1.0),
        (A100, [HALF] * 2, 1 + PLACE),
        # Each step cuts what it has added.
        (A100, [HALF] * 8 + [0] * 7 + [HALF], 1 + 4 * PLACE),
        (A100, ([HALF] + [0] * 7) * 8, 1.0),
        (A100, [HALF / 2] * 8, 1.0),
        (H100, [HALF / 2] * 15, 1 + 3 * PLACE),
        (H100, [HALF / 2] * 16, 1 + 4 * PLACE),
        (H100, [HALF / 4] * 16, 1.0),
        (H100, ([HALF] + [0] * 15) * 8, 1.0),
        (H100, [HALF] * 8 + [0] * 7 + [HALF], 1 + 4 * PLACE),
        # Towards zero, from below.
        (A100, [-HALF / 2] * 8, 1.0),
        (A100, [-HALF], 1 - HALF),
        (H100, [-HALF / 2], 1 - HALF),
        (H100, [-HALF / 2] * 2, 1 - HALF),
        # Each is cut off before it can meet the other's rest.
        (A100, [HALF, -HALF / 2, HALF, -HALF / 2], 1 + PLACE),
        (H100, [HALF, -HALF / 4, HALF, -HALF / 4], 1 + PLACE),
    ],
)
def test_small_products_beside_one(cores, terms, found):
    ones = [1.0] * len(terms)
    assert summed(cores, terms, ones, start=1.0) == found
    assert summed(cores, terms, [-one for one in ones], start=-1.0) == -found


@BOTH
def test_a_large_product_takes_the_small_ones_with_it(cores):
    # A sum that cancels keeps only what was aligned to its largest part: 4 on an A100, 2 beside it.
    most, unit = 2.0**26, 2.0 ** (26 - cores.bits)
    for small, kept in ((unit / 2, 0.0), (unit, unit), (1.5 * unit, unit)):
        assert summed(cores, [2.0**13, small], [2.0**13, 1.0], -most) == kept
    # In a step of its own it comes too late to hurt.
    apart = [1.0] + [0.0] * (cores.products - 1) + [2.0**13, -(2.0**13)]
    assert summed(cores, apart, [1.0] * cores.products + [2.0**13] * 2) == 0.0
    apart = [2.0**13, -(2.0**13)] + [0.0] * (cores.products - 2) + [1.0]
    assert summed(cores, apart, [2.0**13] * cores.products + [1.0]) == 1.0


@BOTH
def test_a_product_is_not_normalised(cores):
    # 1.5 · 1.5 has the exponent 0 of its factors, though it is more than 2.
    last = 2.0**-cores.bits
    assert summed(cores, [1.5, -1.5, last], [1.5, 1.5, 1.0]) == last
    assert summed(cores, [2.0, -2.0, last], [1.0, 1.0, 1.0]) == 0.0
    assert summed(cores, [1.5, last], [1.5, 1.0], start=-2.25) == 0.0


@BOTH
def test_the_order_within_a_step_does_not_matter(cores):
    generator = np.random.default_rng(0)
    sizes = 2.0 ** generator.integers(-9, 9, (2, cores.products))
    left, right = (generator.standard_normal(sizes.shape) * sizes).astype(np.float16)
    found = summed(cores, left, right, 0.7, "fp16")
    for _ in range(20):
        order = generator.permutation(cores.products)
        assert summed(cores, left[order], right[order], 0.7, "fp16") == found


@BOTH
def test_signs_zeros_and_subnormals(cores):
    nothing = summed(cores, [1.0, -1.0], [3.0, 3.0])
    assert nothing == 0 and math.copysign(1, nothing) == 1
    assert summed(cores, [0.0], [0.0], 2.0**-149) == 2.0**-149
    assert summed(cores, [2.0**-24], [2.0**-24], kind="fp16") == 2.0**-48
    assert summed(cores, [2.0**-133, 2.0**-133], [1.0, 0.5]) == 1.5 * 2.0**-133
    # Of fp32 the last subnormal; what is below it is cut off.
    assert summed(cores, [2.0**-75, -(2.0**-75)], [2.0**-74, 2.0**-75]) == 0.0
    assert summed(cores, [1.5 * 2.0**-75], [2.0**-74]) == 2.0**-149


@BOTH
@pytest.mark.parametrize(
    ("left", "right", "start", "found"),
    [
        ([2.0**127, 2.0**127], [1.0, 1.0], 0.0, INFINITY),
        ([-(2.0**100)], [2.0**100], 5.0, -INFINITY),
        ([INFINITY, 1.0], [2.0, 3.0], 1.0, INFINITY),
        ([INFINITY, 1.0], [2.0, 3.0], -INFINITY, math.nan),
        ([INFINITY, INFINITY], [-1.0, 1.0], 0.0, math.nan),
        ([INFINITY], [0.0], 1.0, math.nan),
        ([1.0], [1.0], INFINITY, INFINITY),
        ([0.0], [math.nan], 1.0, math.nan),
        ([1.0], [1.0], math.nan, math.nan),
    ],
)
def test_what_is_not_finite(cores, left, right, start, found):
    np.testing.assert_equal(summed(cores, left, right, start), found)
    # Beside a sum that is.
    left, right = np.array([left, [1.0] * len(left)]), np.array([right, [2.0] * len(right)])
    both = cores(left, right.T, np.array([[start, 0.0], [0.0, 0.0]], np.float32))
    np.testing.assert_equal(float(both[0, 0]), found)
    assert both[1, 1] == 2.0 * left.shape[1]


def by_fractions(cores: CutOff, left, right, start: float, least: int) -> float:
    """The definition, term by term in rational numbers."""

    def exponent(value: float, least: int) -> int:
        return max(math.frexp(value)[1] - 1, least)

    total = Fraction(start)
    for begin in range(0, len(left), cores.products):
        pairs = [
            (float(a), float(b))
            for a, b in zip(left[begin:][: cores.products], right[begin:], strict=False)
            if a and b
        ]
        terms = [
            (Fraction(a) * Fraction(b), exponent(a, least) + exponent(b, least)) for a, b in pairs
        ]
        terms += [(total, exponent(float(total), -126))] if total else []
        if not terms:
            continue
        unit = Fraction(2) ** (max(each for _, each in terms) - cores.bits)
        total = sum(int(term / unit) for term, _ in terms) * unit
        # Exact in float64: fewer than 53 bits.
        unit = Fraction(2) ** (exponent(float(total), -126) - 23)
        total = int(total / unit) * unit
    return float(total)


@BOTH
@pytest.mark.parametrize("kind", LEAST)
def test_random_sums_follow_the_definition(cores, kind):
    generator = np.random.default_rng(1)
    for _ in range(150):
        count = int(generator.integers(1, 40))
        sizes = 2.0 ** generator.integers(-14, 8, (2, count))
        left, right = generator.standard_normal((2, count)) * sizes
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]
        left, right = (torch.from_numpy(each).to(dtype).double().numpy() for each in (left, right))
        start = float(np.float32(generator.standard_normal() * 2.0 ** generator.integers(-20, 10)))
        wanted = by_fractions(cores, left, right, start, LEAST[kind])
        assert summed(cores, left, right, start, kind) == wanted


# The architecture, what its tensor cores do, and the library's products alike; exact sums last.
MACHINES = [Machine("sm_80", cut_off=A100), Machine("sm_90", cut_off=H100), Machine("sm_80")]
# Both engines sum a logit in the same steps, but the library's product is quick to emulate.
CASES = [
    ("triton", 64, 30.0),
    ("triton", 512, 5.0),
    ("cublas", 1024, 30.0),
    ("cublas", 8192, 5.0),
]


@pytest.mark.parametrize("machine", MACHINES, ids=str)
@pytest.mark.parametrize(("engine", "depth", "largest"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pass_is_within_the_bounds_of_the_gpu_tests(machine, engine, depth, dtype, largest):
    case = make_case(1, 17, depth, 61, dtype=dtype, largest=largest, labelled=1.0)
    needs = (True, True, False)
    truth = true_result(case, needs=needs)
    with executing(machine):
        got = computed(case, needs=needs, path="recompute", engine=engine)
    error = largest_error(got.tokens, truth.tokens)
    if machine.cut_off is None:
        assert error <= OP[dtype][0] <= bound_of(case, cores=A100)
    else:
        # The bound of the GPU tests, and what of it is not the tight one of small depths.
        assert error <= bound_of(case, cores=machine.cut_off)
        assert error <= bound_of(case, 0.0, machine.cut_off) <= 30 * error
    assert_gradients(got, truth, gradient_bound(case, OP[dtype][1], machine.cut_off))


@pytest.mark.parametrize("machine", MACHINES[:2], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kernels_logits_are_the_sums_of_such_cores(machine, dtype):
    """To the bit: products of a compiled kernel meet in the steps that the definition says."""
    rows, vocab, depth = 37, 131, 200
    case = make_case(1, rows, depth, vocab, dtype=dtype)
    hidden, weight = case.hidden[0], case.weight
    targets = torch.arange(rows) * 7 % vocab
    found = torch.zeros(rows)
    with executing(machine):
        tuning = tuning_of(hidden.device)
        tiles = {"block": tuning.architecture.block(2, False), "descriptors": tuning.descriptors}
        head = {"alpha": 1.0, "ceiling": None}
        fold_logits(hidden, weight, None, targets, found, **head, **tiles, first=0)
    sums = machine.cut_off(
        hidden.double().numpy(),
        weight.double().numpy().T,
        np.zeros((rows, vocab), np.float32),
        torch.finfo(dtype).smallest_normal,
    )
    wanted = torch.from_numpy(sums).gather(1, targets[:, None])[:, 0]
    assert torch.equal(found, wanted)
    assert not torch.equal(
        found, (hidden.double() @ weight.double().t()).float()[range(rows), targets]
    )
