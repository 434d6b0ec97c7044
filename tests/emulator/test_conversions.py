"""Conversions against exact numbers, and bf16 against torch's own rounding."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from exact_numbers import FORMATS, Number, flushed
from small_kernels import Case, executed

F32 = FORMATS["f32"]
ROUNDINGS = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


def clamped(kind: str, rounding: str, source: str = "f32", flush: bool = False) -> Any:
    """To an integer, its nearest where it holds no such number.

    NaN to 0, but where an operand has 64 bits: to the top bit alone.
    """
    bits = int(kind[1:])
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind[0] == "s" else (0, 2**bits - 1)

    def convert(a: float) -> int:
        if a != a:
            return 0 if source != "f64" and bits < 64 else narrowed(kind)(1 << (bits - 1))
        if math.isinf(a):
            return high if a > 0 else low
        if flush and abs(a) < F32.smallest_normal:
            return 0
        return min(max(ROUNDINGS[rounding](Fraction(a)), low), high)

    return convert


def canonical(kind: str, towards_zero: bool = False) -> Any:
    """Rounded to 16 bits; of every NaN the same one, without a sign."""
    form = FORMATS[kind]

    def judge(a: Number) -> Any:
        wanted = form.encode(a, towards_zero)
        return lambda bits: bits == wanted

    return judge


def packed(kind: str, towards_zero: bool = False) -> Any:
    """Two numbers in a word: the first operand in the upper half."""
    form = FORMATS[kind]
    return lambda a, b: form.encode(a, towards_zero) << 16 | form.encode(b, towards_zero)


WHOLE = ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")


def narrowed(kind: str) -> Any:
    """The lowest bits, as that type's number."""
    bits = int(kind[1:])

    def cut(a: int) -> int:
        found = a % (1 << bits)
        return found - (1 << bits) if kind[0] == "s" and found >> (bits - 1) else found

    return cut


def registers(kind: str) -> str:
    """What holds a number of 8 bits: its other half must be right as well."""
    return f"{kind[0]}16" if kind[1:] == "8" else kind


FLUSHED_TO = flushed(F32, lambda a: a)
CASES = [
    # Between integers: sign or zeros from the left, or the lowest bits.
    *(
        Case(f"cvt.{target}.{source} d, a", f"{registers(target)} {source}", narrowed(target))
        for target in WHOLE
        for source in WHOLE
    ),
    *(
        Case(f"cvt.rn.{target}.{source} d, a", f"{target} {source}", Fraction)
        for target in ("f16", "f32", "f64")
        for source in WHOLE
    ),
    *(
        Case(
            f"cvt.{rounding}{mode}.{target}.{source} d, a",
            f"{registers(target)} {source}",
            clamped(target, rounding, source, bool(mode)),
        )
        for rounding in ROUNDINGS
        for target in WHOLE
        for source in ("f16", "f32", "f64")
        for mode in (("", ".ftz") if source == "f32" else ("",))
    ),
    # Wider: exactly. Narrower: to nearest, ties to even.
    *(Case(f"cvt{mode}.f32.f16 d, a", "f32 f16", lambda a: a) for mode in ("", ".ftz")),
    Case("cvt.f32.bf16 d, a", "f32 bf16", lambda a: a),
    Case("cvt.f64.f16 d, a", "f64 f16", lambda a: a),
    Case("cvt.f64.f32 d, a", "f64 f32", lambda a: a),
    Case("cvt.ftz.f64.f32 d, a", "f64 f32", FLUSHED_TO),
    Case("cvt.rn.f32.f64 d, a", "f32 f64", lambda a: a),
    Case("cvt.rn.ftz.f32.f64 d, a", "f32 f64", FLUSHED_TO),
    Case("cvt.rn.f16.f64 d, a", "f16 f64", canonical("f16")),
    Case("cvt.rn.f16.f32 d, a", "f16 f32", canonical("f16")),
    Case("cvt.rn.bf16.f32 d, a", "bf16 f32", canonical("bf16")),
    Case("cvt.rz.bf16.f32 d, a", "bf16 f32", canonical("bf16", towards_zero=True)),
    Case("cvt.rz.bf16x2.f32 d, a, b", "b32 f32 f32", packed("bf16", towards_zero=True)),
    Case("cvt.rn.f16x2.f32 d, a, b", "b32 f32 f32", packed("f16")),
    Case("cvt.rn.bf16x2.f32 d, a, b", "b32 f32 f32", packed("bf16")),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.text)
def test_value(case):
    case.check()


def _around_ties(kind: str) -> np.ndarray:
    """f32 numbers at the middle of two numbers of a narrower format, and next to it."""
    form, random = FORMATS[kind], np.random.default_rng(3)
    drawn = random.integers(0, form.infinity, 512).tolist() + list(range(16))
    found = []
    for bits in drawn:
        upper = form.decode(bits + 1)
        upper = 2.0**-form.lowest_exponent * 4 if math.isinf(upper) else upper
        middle = F32.encode((Fraction(form.decode(bits)) + Fraction(upper)) / 2)
        sign = F32.sign * int(random.integers(2))
        found += [sign | max(0, middle + step) for step in (-1, 0, 1)]
    return np.array(found[: len(found) // 128 * 128], np.uint32)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_ties(kind):
    given, form = _around_ties(kind), FORMATS[kind]
    swapped = given[::-1].copy()
    (one, two), _ = executed(
        f"cvt.rn.{kind}.f32 d, a; cvt.rn.{kind}x2.f32 x, a, b",
        [("f32", given), ("f32", swapped)],
        [kind, "b32"],
    )
    wanted = [form.encode(F32.decode(x)) for x in given.tolist()]
    assert one.tolist() == wanted
    assert (two >> 16).tolist() == wanted
    assert (two & 0xFFFF).tolist() == wanted[::-1]
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    rounded = torch.from_numpy(given.view(np.float32)).to(dtype).view(torch.int16)
    assert np.array_equal(rounded.numpy().view(np.uint16), one)
    assert (
        len({F32.decode(x) - form.decode(y) for x, y in zip(given.tolist(), wanted, strict=True)})
        > 100
    )
