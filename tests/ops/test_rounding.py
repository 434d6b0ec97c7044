"""The bound on log-probs against sums that are cut off, or rounded, as on a GPU, in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rounding import BLOCK, bound_of, gradient_bound, logp_bound
from truth import make_case

LARGEST = 30.0


def cut(values: np.ndarray, like: np.ndarray, bits: int) -> np.ndarray:
    """Towards zero, to `bits` bits below the leading one of `like`."""
    unit = np.ldexp(1.0, np.frexp(like)[1] - bits)
    return np.trunc(values / unit) * unit


def cut_off(left: np.ndarray, right: np.ndarray, block: int) -> np.ndarray:
    """left @ right as a tensor core sums: (m, k), (k, n)."""
    total = np.zeros((left.shape[0], right.shape[1]))
    for start in range(0, left.shape[1], block):
        part = slice(start, start + block)
        terms = left[:, part, None] * right[None, part]
        terms = np.concatenate([terms, total[:, None]], 1)
        largest = np.abs(terms).max(1, keepdims=True)
        total = cut(terms, largest, 25).sum(1)
        total = cut(total, total, 24)
    return total


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


def emulated_error(dtype: torch.dtype, depth: int, block: int = BLOCK) -> tuple[float, float]:
    """Largest error of a log-prob over every row and entry, and the largest |logit|."""
    case = make_case(1, 9, depth, 301, dtype=dtype, largest=LARGEST).double()
    left, right = case.hidden[0].numpy(), case.weight.t().numpy()
    single = dtype == torch.float32
    found = rounded(left, right) if single else cut_off(left, right, block)
    exact = left @ right
    return float(np.abs(logps(found) - logps(exact)).max()), float(np.abs(exact).max())


@pytest.mark.parametrize("depth", [64, 512, 1024, 4096])
@pytest.mark.parametrize(
    ("dtype", "block"),
    [(torch.bfloat16, 8), (torch.bfloat16, 16), (torch.float16, 8), (torch.float32, 1)],
)
def test_the_bound_holds_for_emulated_sums_and_is_near_them(dtype, block, depth):
    error, largest = emulated_error(dtype, depth, block)
    bound = logp_bound(dtype, depth, largest)
    assert error <= bound <= 10 * error


def test_the_emulation_is_what_was_measured_on_an_emulated_a100():
    error, _ = emulated_error(torch.bfloat16, 4096)
    assert 2.8e-4 <= error <= 3.8e-4


def test_the_model_predicts_the_bias():
    for depth in (1024, 4096):
        error, largest = emulated_error(torch.bfloat16, depth)
        # One logit's third; the largest error over all entries is that of the largest logit.
        assert error == pytest.approx(depth / BLOCK * 2**-24 * largest / 3, rel=0.25)


def test_small_depths_keep_the_tight_bound():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert logp_bound(dtype, 48, 100.0) == 1e-5
        assert logp_bound(dtype, 48, 100.0, tight=6e-5) == 6e-5
        assert logp_bound(dtype, 128, 1.0) == 1e-5
    deep = make_case(1, 3, 1024, 17, dtype=torch.bfloat16, logit_scale=0.5, temperature=0.25)
    wanted = 2 * logp_bound(torch.bfloat16, 1024, 30.0)
    assert bound_of(deep) == pytest.approx(wanted, rel=0.02)
    assert gradient_bound(deep, 4e-3) == pytest.approx(4e-3 + bound_of(deep) - 1e-5)
    assert gradient_bound(make_case(1, 3, 48, 17), 3e-6) == 3e-6
