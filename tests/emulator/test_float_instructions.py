"""Floating-point instructions against exact fractions, rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from exact_numbers import FORMATS, INFINITY, Format, Number, exactly, flushed
from small_kernels import Case, executed

F32, F64 = FORMATS["f32"], FORMATS["f64"]


def quotient(a: float, b: float) -> Number:
    if b == 0:
        return math.nan if a == 0 or a != a else math.copysign(INFINITY, a) * math.copysign(1, b)
    return exactly(lambda x, y: x / y)(a, b)


def root(a: float) -> Number:
    """Of enough bits to be rounded: one more says that it goes on."""
    if not a > 0 or a == INFINITY:
        return a if a == 0 or a == INFINITY else math.nan
    shifted = Fraction(a) * 4**1200
    found = math.isqrt(shifted.numerator // shifted.denominator)
    return (found + Fraction(found * found != shifted) / 2) / Fraction(2) ** 1200


def larger(a: float, b: float, sign: int = 1) -> float:
    """max, and min by its sign: not the NaN of two, and +0 above −0."""
    if a != a or b != b:
        return b if a != a else a
    return max(a, b, key=lambda x: (sign * x, sign * math.copysign(1, x)))


def of_numbers(function: Callable[[float, float], float]) -> Callable[[float, float], float]:
    """`.NaN`: NaN where an operand is."""
    return lambda a, b: math.nan if a != a or b != b else function(a, b)


def minimum(a: float, b: float) -> float:
    return larger(a, b, -1)


ADD = exactly(lambda a, b: a + b)
SUBTRACT = exactly(lambda a, b: a - b)
MULTIPLY = exactly(lambda a, b: a * b)
FUSED = exactly(lambda a, b, c: a * b + c)
ORDERED = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a < b or a > b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def unordered(function: Callable[[float, float], bool]) -> Callable[[float, float], bool]:
    return lambda a, b: a != a or b != b or function(a, b)


COMPARED = {
    **ORDERED,
    **{f"{name}u": unordered(function) for name, function in ORDERED.items()},
    "num": lambda a, b: a == a and b == b,
    "nan": lambda a, b: a != a or b != b,
}


def sides(name: str, count: int, function: Any) -> list[Case]:
    """In f32 with and without .ftz, and in f64."""
    letters = ", ".join("dabc"[: count + 1])
    return [
        Case(f"{name}.f32 {letters}", " ".join(["f32"] * (count + 1)), function),
        Case(f"{name}.ftz.f32 {letters}", " ".join(["f32"] * (count + 1)), flushed(F32, function)),
        Case(f"{name}.f64 {letters}", " ".join(["f64"] * (count + 1)), function),
    ]


def saturated(function: Callable[..., Number | None]) -> Callable[..., Any]:
    """`.sat`: into [0, 1], and NaN to 0; which zero is left open."""

    def clamp(*operands: float) -> Any:
        found = function(*operands)
        if found is None:
            return None
        if not found > 0:
            return lambda bits: bits in (0, F32.sign)
        return min(found, 1.0)

    return clamp


def negated(a: float) -> float:
    return -a


def signed_as(a: float, b: float) -> float:
    """The sign of the first on the second, where that is a number."""
    return math.nan if b != b else math.copysign(b, a) if a == a else None


def flush(a: float) -> float:
    return math.copysign(0.0, a) if abs(a) < float(F32.smallest_normal) else a


SUMS = {"add": (2, ADD), "sub": (2, SUBTRACT), "mul": (2, MULTIPLY), "fma": (3, FUSED)}
CASES = [
    *(
        Case(
            f"{name}{mode}.sat.f32 {', '.join('dabc'[: count + 1])}",
            " ".join(["f32"] * (count + 1)),
            saturated(flushed(F32, function) if "ftz" in mode else function),
        )
        for name, (count, function) in SUMS.items()
        for mode in ("", ".ftz", ".rn", ".rn.ftz")
        if name != "fma" or "rn" in mode
    ),
    *(
        case
        for name, function in (("add", ADD), ("sub", SUBTRACT), ("mul", MULTIPLY))
        for mode in ("", ".rn")
        for case in sides(name + mode, 2, function)
    ),
    *sides("fma.rn", 3, FUSED),
    *sides("div.rn", 2, quotient),
    *sides("sqrt.rn", 1, root),
    *sides("max", 2, larger),
    *sides("min", 2, minimum),
    *(
        Case(f"{name}.NaN.f32 d, a, b", "f32 f32 f32", function)
        for name, function in (
            ("max", of_numbers(larger)),
            ("min", of_numbers(minimum)),
            ("max.ftz", flushed(F32, of_numbers(larger))),
            ("min.ftz", flushed(F32, of_numbers(minimum))),
        )
    ),
    *sides("rcp.rn", 1, lambda a: quotient(1.0, a)),
    *(
        Case(f"copysign.{kind} d, a, b", f"{kind} {kind} {kind}", signed_as)
        for kind in ("f32", "f64")
    ),
    Case("neg.ftz.f32 d, a", "f32 f32", lambda a: -flush(a)),
    *(Case(f"neg.{kind} d, a", f"{kind} {kind}", negated) for kind in ("f32", "f64")),
    Case("abs.f32 d, a", "f32 f32", abs),
    Case("abs.ftz.f32 d, a", "f32 f32", lambda a: abs(flush(a))),
    Case("abs.f64 d, a", "f64 f64", abs),
    *(
        Case(f"setp.{name}.{kind} d, a, b", f"pred {kind} {kind}", function)
        for kind in ("f32", "f64")
        for name, function in COMPARED.items()
    ),
    *(
        Case(
            f"setp.{name}.ftz.f32 d, a, b",
            "pred f32 f32",
            lambda a, b, compare=function: compare(flush(a), flush(b)),
        )
        for name, function in COMPARED.items()
    ),
    # Constants as they are written.
    Case("mul.f32 d, a, 0f3FB8AA3B", "f32 f32", lambda a: MULTIPLY(a, F32.decode(0x3FB8AA3B))),
    Case("setp.ne.f32 d, a, 0fFF800000", "pred f32", lambda a: a > -INFINITY),
    Case("selp.f32 d, a, 0f00000000, b", "f32 f32 pred", lambda a, p: a if p else 0.0),
    Case("add.rn.f64 d, a, 0d0000000000000000", "f64 f64", lambda a: ADD(a, 0.0)),
    Case("max.f64 d, a, 0d3FF0000000000000", "f64 f64", lambda a: larger(a, 1.0)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.text)
def test_value(case):
    case.check()


# ------------------------------------------------------------------------- rounded once, not twice


def _ties(form: Format, count: int) -> list[tuple[float, float, float]]:
    """Operands whose fma lies next to the middle of two numbers, a tiny part of a step off it.

    Half of them are subnormal, where a step is the smallest number.
    """
    random = np.random.default_rng(5)
    unit, found = 2.0**-form.mantissa, []
    while len(found) < count:
        small = len(found) % 2
        power = form.lowest_exponent if small else int(random.integers(-20, 20))
        low, high = (0, 2**form.mantissa) if small else (2**form.mantissa, 2 ** (form.mantissa + 1))
        ticks = int(random.integers(low, high))
        half = power - form.mantissa - 1
        # A number, and a product that is half a step of it, and a little.
        up, down = (1 + unit, 1 - unit) if random.random() < 0.5 else (1 - unit / 2, 1 - unit)
        a, b = math.ldexp(up, half // 2), math.ldexp(down, half - half // 2)
        found.append((a, float(random.choice([-1, 1])) * b, math.ldexp(ticks, half + 1)))
    return found


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_fused_is_rounded_once(kind):
    form = FORMATS[kind]
    rows = _ties(form, 512)
    given = [
        np.array([form.encode(x) for x in column], f"u{form.bits // 8}")
        for column in zip(*rows, strict=True)
    ]
    (got,), _ = executed(f"fma.rn.{kind} d, a, b, c", [(kind, x) for x in given], [kind])
    wanted = [form.encode(Fraction(a) * Fraction(b) + Fraction(c)) for a, b, c in rows]
    assert got.tolist() == wanted
    if kind == "f32":
        twice = [form.encode(float(Fraction(a) * Fraction(b) + Fraction(c))) for a, b, c in rows]
        assert sum(x != y for x, y in zip(twice, wanted, strict=True)) > 50


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_fused_near_the_smallest_numbers(kind):
    """Where a step is as large as that of subnormal numbers."""
    form = FORMATS[kind]
    random = np.random.default_rng(7)
    small = [form.lowest_exponent + int(n) for n in random.integers(-form.mantissa - 1, 4, 384)]
    draw = [[float(x) for x in random.standard_normal(384)] for _ in range(3)]
    root_of = [power // 2 for power in small]
    columns = [
        [form.encode(math.ldexp(x, power)) for x, power in zip(draw[0], root_of, strict=True)],
        [
            form.encode(math.ldexp(x, p - q))
            for x, p, q in zip(draw[1], small, root_of, strict=True)
        ],
        [form.encode(math.ldexp(x, power)) for x, power in zip(draw[2], small, strict=True)],
    ]
    given = [np.array(column, f"u{form.bits // 8}") for column in columns]
    (got,), _ = executed(f"fma.rn.{kind} d, a, b, c", [(kind, x) for x in given], [kind])
    rows = zip(*([form.decode(x) for x in column] for column in columns), strict=True)
    assert got.tolist() == [form.encode(FUSED(*row)) for row in rows]


# --------------------------------------------------------------------------------- approximations


def to_digits(function: Callable[[Decimal], Decimal]) -> Callable[[float], Fraction]:
    """With 60 decimal digits."""

    def exact(value: float) -> Fraction:
        with localcontext() as context:
            context.prec = 60
            return Fraction(function(Decimal(value)))

    return exact


POWER = to_digits(lambda x: Decimal(2) ** x)
LOGARITHM = to_digits(lambda x: x.ln() / Decimal(2).ln())


def within(ulps: float, value: Number) -> Any:
    """Judges bits: units in the last place of f32; beyond the ends what rounding gives."""
    if isinstance(value, float) and not math.isfinite(value):
        return value
    rounded = F32.decode(F32.encode(value))
    if math.isinf(rounded):
        return rounded
    return lambda bits: F32.ulps(bits, Fraction(value)) <= ulps


def power(a: float) -> Number:
    if a != a or a == INFINITY:
        return a
    return (0.0 if a < 0 else INFINITY) if abs(a) > 200 else POWER(a)


def logarithm(a: float) -> Number:
    if a != a or a < 0:
        return math.nan
    if a in (0, INFINITY):
        return -INFINITY if a == 0 else INFINITY
    return LOGARITHM(a)


def inverse_root(a: float) -> Number:
    if a == 0:
        return math.copysign(INFINITY, a)
    found = root(a)
    return 0.0 if found == INFINITY else found if found != found else 1 / Fraction(found)


def approximate_quotient(a: float, b: float) -> Number | None:
    """div.approx: of divisors beyond 2^126 zero; of subnormal ones nothing is said."""
    if abs(b) <= 2.0**126 or b != b or math.isinf(b) or a != a:
        return None if 0 < abs(b) < F32.smallest_normal else quotient(a, b)
    return math.nan if math.isinf(a) else math.copysign(0.0, a) * math.copysign(1, b)


def near_one(exact: Number) -> Any:
    """lg2: absolute 2^-22 where it is small, else two units."""
    if isinstance(exact, Fraction) and abs(exact) < 1:
        return lambda bits: abs(Fraction(F32.decode(bits)) - exact) <= Fraction(2) ** -22
    return within(2, exact)


def upper_inverse(a: float) -> Any:
    """rcp.approx.ftz.f64: of the upper half of a, to 20 bits, the lower half of the result zero."""
    if a != a:
        # A payload in the lower half is not seen, so that this may be an infinity.
        return None
    value = F64.decode(F64.encode(a) & ~0xFFFFFFFF)
    if abs(value) < F64.smallest_normal:
        return math.copysign(INFINITY, value)
    exact = 0 if math.isinf(value) else 1 / Fraction(value)
    if abs(exact) < F64.smallest_normal:
        return math.copysign(0.0, value)

    def judge(got: int) -> bool:
        error = abs(Fraction(F64.decode(got)) / exact - 1)
        return not got & 0xFFFFFFFF and error <= Fraction(2) ** -19

    return judge


def judged(function: Callable[..., Any], judge: Callable[[Any], Any]) -> Callable[..., Any]:
    """What a result must be near; of a quotient or an inverse that is subnormal nothing is said."""

    def on_numbers(*operands: float) -> Any:
        found = function(*operands)
        if found is None or (isinstance(found, float) and found != 0 and math.isfinite(found)):
            return found
        return judge(found)

    return on_numbers


USUAL = [F32.encode(x / 64) for x in range(-9000, 9000, 23)]
# Name → operands, the exact function, and how near the ISA wants it.
NEAR: dict[str, tuple[int, Callable[..., Any], Callable[[Any], Any]]] = {
    "ex2.approx": (1, power, lambda x: within(2, x)),
    "lg2.approx": (1, logarithm, near_one),
    "rcp.approx": (1, lambda a: quotient(1.0, a), lambda x: within(1, x)),
    "rsqrt.approx": (1, inverse_root, lambda x: within(2, x)),
    "sqrt.approx": (1, root, lambda x: within(2, x)),
    "div.full": (2, quotient, lambda x: within(2, x)),
    "div.approx": (2, approximate_quotient, lambda x: within(2, x)),
}
APPROXIMATIONS = [
    *(
        Case(
            f"{name}{mode}.f32 {'d, a, b' if count > 1 else 'd, a'}",
            " ".join(["f32"] * (count + 1)),
            judged(flushed(F32, function) if mode else function, judge),
        )
        for name, (count, function, judge) in NEAR.items()
        for mode in ("", ".ftz")
    ),
    Case("ex2.approx.f32 d, a", "f32 f32", judged(power, NEAR["ex2.approx"][2]), {"a": USUAL}),
    Case(
        "lg2.approx.f32 d, a",
        "f32 f32",
        judged(logarithm, near_one),
        {"a": [F32.encode(x / 777) for x in range(1, 4000, 9)]},
    ),
    Case("rcp.approx.ftz.f64 d, a", "f64 f64", upper_inverse),
]


@pytest.mark.parametrize(
    "case", APPROXIMATIONS, ids=lambda case: f"{case.text}{' usual' * bool(case.values)}"
)
def test_approximation(case):
    case.check()


def test_exact_powers():
    """ex2 of whole numbers, and of both zeros, is exact; lg2 of 1 is zero."""
    whole = list(range(-126, 128)) + [0, 0]
    bits = np.array([F32.encode(float(n)) for n in whole], np.uint32)
    bits[-1] = F32.sign
    (got, back), _ = executed(
        "ex2.approx.f32 d, a; lg2.approx.f32 x, d", [("f32", bits)], ["f32", "f32"]
    )
    assert [F32.decode(x) for x in got.tolist()] == [2.0**n for n in whole]
    assert [F32.decode(x) for x in back.tolist()] == whole
