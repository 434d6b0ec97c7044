"""The bound on log-probs against sums that are cut off, or rounded, as on a GPU, in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulator.cut_off import A100, H100, CutOff
from rounding import bound_of, gradient_bound, logp_bound
from truth import make_case

LARGEST = 30.0
CORES = {"a100": A100, "h100": H100, "rounded": None}


def rounded(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left @ right by fused multiply-adds in fp32, one product after the other."""
    total = np.zeros((left.shape[0], right.shape[1]), np.float32)
    for column, row in zip(left.T, right, strict=True):
        # float64 holds the product exactly, as the unit that adds it does.
        total = (total + np.outer(column, row)).astype(np.float32)
    return total.astype(np.float64)


def logps(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def emulated_error(
    cores: CutOff | None, dtype: torch.dtype, depth: int, largest: float = LARGEST
) -> tuple[float, float]:
    """Largest error of a log-prob over every row and entry, and the largest |logit|."""
    case = make_case(1, 9, depth, 301, dtype=dtype, largest=largest).double()
    left, right = case.hidden[0].numpy(), case.weight.t().contiguous().numpy()
    exact = left @ right
    if cores is None:
        found = rounded(left, right)
    else:
        smallest = torch.finfo(dtype).smallest_normal
        found = cores(left, right, np.zeros(exact.shape, np.float32), smallest)
    return float(np.abs(logps(found) - logps(exact)).max()), float(np.abs(exact).max())


@pytest.mark.parametrize("depth", [64, 512, 1024, 4096, 8192])
@pytest.mark.parametrize(
    ("cores", "dtype"),
    [
        ("a100", torch.bfloat16),
        ("a100", torch.float16),
        ("h100", torch.bfloat16),
        ("h100", torch.float16),
        ("rounded", torch.float32),
    ],
)
def test_the_bound_holds_for_emulated_sums_and_is_near_them(cores, dtype, depth):
    cores = CORES[cores]
    for largest in (5.0, LARGEST):
        error, found = emulated_error(cores, dtype, depth, largest)
        bound = logp_bound(cores, depth, found, tight=0.0)
        assert error <= bound <= 12 * error


def test_it_is_what_was_measured_on_an_emulated_a100():
    error, _ = emulated_error(A100, torch.bfloat16, 4096)
    assert 2.8e-4 <= error <= 3.8e-4


@pytest.mark.parametrize("depth", [1024, 4096, 8192])
@pytest.mark.parametrize(("cores", "expected"), [("a100", 1 / 3), ("h100", 1 / 2)])
def test_the_model_predicts_the_bias(cores, expected, depth):
    error, largest = emulated_error(CORES[cores], torch.bfloat16, depth)
    # Of two logits, a third of the bound's; the largest error over all entries has both.
    wanted = expected * depth / CORES[cores].products * 2**-24 * largest
    assert error == pytest.approx(wanted, rel=0.25)


def test_the_bound_has_the_published_numbers():
    half_place = 2.0**-24 * LARGEST
    for cores, bias in ((A100, 4096 / 8), (H100, 1.5 * 4096 / 16)):
        # Four times the depth: four times the bias, twice the rest.
        four, one = (logp_bound(cores, k, LARGEST) / half_place for k in (16384, 4096))
        assert four - 2 * one == pytest.approx(2 * bias)
    assert logp_bound(None, 4096, LARGEST) == pytest.approx(2**0.5 * 64 * half_place)


def test_small_depths_keep_the_tight_bound():
    for cores in CORES.values():
        assert logp_bound(cores, 48, 100.0) == 1e-5
        assert logp_bound(cores, 48, 100.0, tight=6e-5) == 6e-5
        assert logp_bound(cores, 128, 1.0) == 1e-5
    deep = make_case(1, 3, 1024, 17, dtype=torch.bfloat16, logit_scale=0.5, temperature=0.25)
    for cores in CORES.values():
        wanted = 2 * logp_bound(cores, 1024, 30.0)
        assert bound_of(deep, cores=cores) == pytest.approx(wanted, rel=0.02)
        extra = bound_of(deep, cores=cores) - 1e-5
        assert gradient_bound(deep, 4e-3, cores) == pytest.approx(4e-3 + extra)
    single = make_case(1, 3, 1024, 17)
    assert bound_of(single) == bound_of(single, cores=None)
    assert gradient_bound(make_case(1, 3, 48, 17), 3e-6) == 3e-6
