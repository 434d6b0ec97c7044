"""Binary floating-point numbers as bits, and exact fractions rounded to them, in Python's integers.

What instructions are compared with, so nothing here is numpy's or the emulator's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

Number = float | Fraction
INFINITY = math.inf


@dataclass(frozen=True)
class Format:
    """An IEEE 754 format: bits of the whole, of the exponent and of the mantissa."""

    bits: int
    exponent: int
    mantissa: int

    @property
    def lowest_exponent(self) -> int:
        """Of the smallest normal number."""
        return 2 - 2 ** (self.exponent - 1)

    @property
    def smallest_normal(self) -> Fraction:
        return Fraction(2) ** self.lowest_exponent

    @property
    def infinity(self) -> int:
        """Its bits."""
        return (2**self.exponent - 1) << self.mantissa

    @property
    def sign(self) -> int:
        """The bit."""
        return 1 << (self.bits - 1)

    def decode(self, bits: int) -> float:
        """The number of its bits, exactly: all formats fit into float64."""
        sign = -1.0 if bits & self.sign else 1.0
        magnitude = bits & ~self.sign
        if magnitude > self.infinity:
            return math.nan
        if magnitude == self.infinity:
            return sign * INFINITY
        power, digits = magnitude >> self.mantissa, magnitude & (2**self.mantissa - 1)
        if power:
            digits += 2**self.mantissa
        scale = max(power, 1) - 1 + self.lowest_exponent - self.mantissa
        return math.copysign(math.ldexp(digits, scale), sign)

    def encode(self, value: Number, towards_zero: bool = False) -> int:
        """Bits of a number, rounded once, ties to even; of NaN the one without a payload."""
        if isinstance(value, float) and math.isnan(value):
            return self.infinity | (2**self.mantissa - 1)
        sign = self.sign if value < 0 or (value == 0 and math.copysign(1, value) < 0) else 0
        if isinstance(value, float) and math.isinf(value):
            return sign | self.infinity
        size = abs(Fraction(value))
        if not size:
            return sign
        power = size.numerator.bit_length() - size.denominator.bit_length()
        power -= size < Fraction(2) ** power
        power = max(power, self.lowest_exponent)
        steps = size / Fraction(2) ** (power - self.mantissa)
        digits = math.floor(steps) if towards_zero else round(steps)
        bits = ((power - self.lowest_exponent) << self.mantissa) + digits
        return sign | min(bits, self.infinity - towards_zero)

    def ulps(self, got: int, wanted: Number) -> float:
        """How far bits are from a finite number, in units in the last place of it."""
        size = abs(Fraction(wanted))
        power = self.lowest_exponent
        while Fraction(2) ** (power + 1) <= size:
            power += 1
        step = Fraction(2) ** (power - self.mantissa)
        found = self.decode(got)
        return (
            INFINITY
            if math.isnan(found) or math.isinf(found)
            else float(abs(Fraction(found) - wanted) / step)
        )


FORMATS = {
    "f16": Format(16, 5, 10),
    "bf16": Format(16, 8, 7),
    "f32": Format(32, 8, 23),
    "f64": Format(64, 11, 52),
}


def exactly(function: Callable[..., Number]) -> Callable[..., Number]:
    """`function` on fractions where its operands are finite and its value is not zero.

    Special values, and the sign of a zero, are those of Python's floats.
    """

    def on_numbers(*operands: float) -> Number:
        if all(map(math.isfinite, operands)):
            found = function(*map(Fraction, operands))
            if found:
                return found
        return function(*operands)

    return on_numbers


def flushed(form: Format, function: Callable[..., Number | None]) -> Callable[..., Number | None]:
    """`.ftz`: subnormal operands are zeros of their sign, and so is a subnormal value.

    None for a subnormal value that is rounded to a normal one: which it is then, nobody says.
    """

    def flush(value: Number) -> Number:
        return math.copysign(0.0, value) if abs(value) < form.smallest_normal else value

    def on_numbers(*operands: float) -> Number | None:
        found = function(*map(flush, operands))
        if found is None:
            return None
        small = abs(found) < form.smallest_normal
        if small and abs(form.decode(form.encode(found))) >= form.smallest_normal:
            return None
        return flush(found)

    return on_numbers
