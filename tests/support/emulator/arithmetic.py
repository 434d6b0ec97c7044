"""Numbers as the PTX ISA defines them, on numpy vectors: one element a thread.

A function takes and gives arrays of the types its instruction names; bf16 values travel as fp32.
`.ftz` and `.sat` are the same for every instruction and stand at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

U1, U2, U4, U8 = np.uint8, np.uint16, np.uint32, np.uint64
I1, I2, I4, I8 = np.int8, np.int16, np.int32, np.int64
F2, F4, F8 = np.float16, np.float32, np.float64
UNSIGNED: dict[int, Any] = {1: U1, 2: U2, 4: U4, 8: U8}
SIGNED: dict[int, Any] = {1: I1, 2: I2, 4: I4, 8: I8}

# ------------------------------------------------------------------------------------- integers


def multiply_wide(a: Array, b: Array) -> Array:
    """The whole product, in twice the bits."""
    kind = SIGNED if a.dtype.kind == "i" else UNSIGNED
    wide = kind[2 * a.dtype.itemsize]
    return a.astype(wide) * b.astype(wide)


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of the product."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        return (multiply_wide(a, b) >> bits).astype(a.dtype)
    product = [(int(x) * int(y)) >> bits for x, y in zip(a, b, strict=True)]
    return np.array([x & ((1 << bits) - 1) for x in product], dtype=U8).view(a.dtype)


def multiply_add(a: Array, b: Array, c: Array) -> Array:
    return a * b + c


def multiply_add_wide(a: Array, b: Array, c: Array) -> Array:
    return multiply_wide(a, b) + c


def multiply_add_high(a: Array, b: Array, c: Array) -> Array:
    return multiply_high(a, b) + c


def divide_integers(a: Array, b: Array) -> Array:
    """Towards zero; by 0, which PTX leaves open: all ones."""
    zero = b == 0
    by = np.where(zero, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return np.where(zero, np.iinfo(a.dtype).max, a // by).astype(a.dtype)
    floor = a // by
    # numpy rounds down.
    floor += ((a % by != 0) & ((a < 0) != (by < 0))).astype(a.dtype)
    return np.where(zero, -1, floor).astype(a.dtype)


def remainder(a: Array, b: Array) -> Array:
    """With the sign of `a`."""
    return a - divide_integers(a, b) * b


def shift_left(a: Array, by: Array) -> Array:
    bits = a.dtype.itemsize * 8
    return np.where(by >= bits, a.dtype.type(0), a << np.minimum(by, bits - 1).astype(a.dtype))


def shift_right(a: Array, by: Array) -> Array:
    """Signed numbers fill with their sign."""
    bits = a.dtype.itemsize * 8
    moved = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return moved if a.dtype.kind == "i" else np.where(by >= bits, a.dtype.type(0), moved)


def _funnel(low: Array, high: Array) -> Array:
    return (high.astype(U8) << U8(32)) | low.astype(U8)


def funnel_left_wrap(low: Array, high: Array, by: Array) -> Array:
    return ((_funnel(low, high) << (by & U4(31)).astype(U8)) >> U8(32)).astype(U4)


def funnel_left_clamp(low: Array, high: Array, by: Array) -> Array:
    return ((_funnel(low, high) << np.minimum(by, U4(32)).astype(U8)) >> U8(32)).astype(U4)


def funnel_right_wrap(low: Array, high: Array, by: Array) -> Array:
    return (_funnel(low, high) >> (by & U4(31)).astype(U8)).astype(U4)


def funnel_right_clamp(low: Array, high: Array, by: Array) -> Array:
    return (_funnel(low, high) >> np.minimum(by, U4(32)).astype(U8)).astype(U4)


def extract_field(a: Array, start: Array, length: Array) -> Array:
    """bfe: of a signed number, filled with the top bit of the field, or of the number."""
    bits = a.dtype.itemsize * 8
    value = a.view(UNSIGNED[bits // 8]).astype(U8)
    start, length = (start & U4(0xFF)).astype(U8), (length & U4(0xFF)).astype(U8)
    out = np.where(start >= bits, U8(0), value >> np.minimum(start, U8(63)))
    keep = np.where(length >= 64, ~U8(0), (U8(1) << np.minimum(length, U8(63))) - U8(1))
    out = out & keep
    if a.dtype.kind == "i":
        top = np.minimum(start + length - U8(1), U8(bits - 1))
        sign = ((value >> top) & U8(1)).astype(bool) & (length > 0)
        # Beyond the top of the number, too.
        inside = np.where(
            start >= bits, U8(0), np.minimum(length, U8(bits) - np.minimum(start, U8(bits)))
        )
        filled = np.where(inside >= 64, U8(0), ~U8(0) << np.minimum(inside, U8(63)))
        out = np.where(sign, out | filled, out)
    return out.astype(UNSIGNED[bits // 8]).view(a.dtype)


def insert_field(a: Array, b: Array, start: Array, length: Array) -> Array:
    """bfi: the lowest `length` bits of `a`, put into `b` at `start`."""
    bits = a.dtype.itemsize * 8
    start, length = (start & U4(0xFF)).astype(U8), (length & U4(0xFF)).astype(U8)
    ones = np.where(length >= 64, ~U8(0), (U8(1) << np.minimum(length, U8(63))) - U8(1))
    at = np.minimum(start, U8(63))
    keep = np.where(start >= bits, U8(0), ones << at)
    return ((b.astype(U8) & ~keep) | ((a.astype(U8) << at) & keep)).astype(a.dtype)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """prmt: four bytes of eight; bit 3 of a choice spreads the byte's sign."""
    found = np.zeros_like(a)
    pair = _funnel(a, b)
    for place in range(4):
        choice = (selector >> U4(4 * place)) & U4(0xF)
        byte = ((pair >> ((choice & U4(7)).astype(U8) * U8(8))) & U8(0xFF)).astype(U4)
        sign = np.where(byte & U4(0x80), U4(0xFF), U4(0))
        found |= np.where(choice & U4(8), sign, byte) << U4(8 * place)
    return found


def lookup_three(a: Array, b: Array, c: Array, table: int) -> Array:
    """lop3: bit by bit, the bit of `table` at (a, b, c)."""
    found = np.zeros_like(a)
    for place in range(8):
        if table >> place & 1:
            found |= (a if place & 4 else ~a) & (b if place & 2 else ~b) & (c if place & 1 else ~c)
    return found


def count_ones(a: Array) -> Array:
    return np.unpackbits(a.view(U1).reshape(len(a), -1), axis=1).sum(1, dtype=U4)


def choose(a: Array, b: Array, first: Array) -> Array:
    return np.where(first, a, b)


def unpack(whole: Array, count: int) -> list[Array]:
    """`count` equal parts, the lowest bits first."""
    parts = whole.view(UNSIGNED[whole.dtype.itemsize // count]).reshape(-1, count)
    return [np.ascontiguousarray(parts[:, place]) for place in range(count)]


def pack(parts: list[Array]) -> Array:
    """One number of equal parts, the lowest bits first."""
    size = parts[0].dtype.itemsize * len(parts)
    return np.stack(parts, 1).view(UNSIGNED[size])[:, 0]


def same(a: Array) -> Array:
    return a


# ------------------------------------------------------------------------------- floating point


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """Of fp32, rounded once."""
    product = a.astype(F8) * b.astype(F8)
    wide = c.astype(F8)
    total = product + wide
    # fp64 holds the product; its sum is rounded, which matters where it ends up half way, or where
    # fp32 has fewer digits.
    half = (total.view(U8) & U8(0x1FFFFFFF)) == U8(0x10000000)
    half |= np.abs(total) < 2.0**-125
    if half.any():
        at = np.nonzero(half)[0]
        total[at] = _to_odd(product[at], wide[at])
    return total.astype(F4)


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b, and exactly what it lacks (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _to_odd(a: Array, b: Array) -> Array:
    """a + b, towards the odd neighbour where it is not exact: can be rounded once more, rightly."""
    total, lost = _two_sum(a, b)
    # The lowest digits come first, also of the 80 bits that fill 128.
    digits = np.ascontiguousarray(total).view(U8)[:: total.dtype.itemsize // 8]
    wanted = (lost != 0) & ((digits & U8(1)) == 0) & np.isfinite(total)
    towards = np.copysign(np.full_like(total, np.inf), lost)
    return np.where(wanted, np.nextafter(total, towards), total)


def fused_multiply_add_double(a: Array, b: Array, c: Array) -> Array:
    """Of fp64, rounded once, in the machine's extended precision (Boldo and Melquiond 2008)."""
    wide = np.longdouble
    product = a.astype(wide) * b.astype(wide)
    # What the product lacks, of halves whose products are exact.
    a1, b1 = ((x.view(U8) & ~U8(0x7FFFFFF)).view(F8) for x in (a, b))
    a0, b0 = (a - a1).astype(wide), (b - b1).astype(wide)
    a1, b1 = a1.astype(wide), b1.astype(wide)
    lost = (((a1 * b1 - product) + a1 * b0) + a0 * b1) + a0 * b0
    upper, lower = _two_sum(c.astype(wide), lost)
    total, more = _two_sum(product, upper)
    exact = _to_odd(total, _to_odd(lower, more))
    # Infinities and NaN have no halves.
    plain = product + c.astype(wide)
    return np.where(np.isfinite(plain) & np.isfinite(exact), exact, plain).astype(F8)


def largest(a: Array, b: Array) -> Array:
    """The other one where one is NaN; +0 above −0."""
    found = np.fmax(a, b)
    zero = (found == 0) & (a == b)
    return np.where(zero, np.where(np.signbit(a), b, a), found) if zero.any() else found


def smallest(a: Array, b: Array) -> Array:
    """The other one where one is NaN; −0 below +0."""
    found = np.fmin(a, b)
    zero = (found == 0) & (a == b)
    return np.where(zero, np.where(np.signbit(a), a, b), found) if zero.any() else found


def largest_or_nan(a: Array, b: Array) -> Array:
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), largest(a, b))


def smallest_or_nan(a: Array, b: Array) -> Array:
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), smallest(a, b))


def copy_sign(a: Array, b: Array) -> Array:
    """PTX: the sign of `a` on `b`."""
    return np.copysign(b, a)


def ordered(a: Array, b: Array) -> Array:
    return ~unordered(a, b)


def unordered(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


def ordered_unequal(a: Array, b: Array) -> Array:
    return (a < b) | (a > b)


def divide_approximately(a: Array, b: Array) -> Array:
    """div.approx: beyond 2^126 the divisor's reciprocal is lost: the quotient is 0 times `a`."""
    far = (np.abs(b) > F4(2.0**126)) & np.isfinite(b)
    return np.where(far, a * np.copysign(F4(0), b), a / b)


def reciprocal(a: Array) -> Array:
    return a.dtype.type(1) / a


def reciprocal_square_root(a: Array) -> Array:
    return (1 / np.sqrt(a.astype(F8))).astype(a.dtype)


def exp2(a: Array) -> Array:
    return np.exp2(a.astype(F8)).astype(F4)


def log2(a: Array) -> Array:
    return np.log2(a.astype(F8)).astype(F4)


def sine(a: Array) -> Array:
    return np.sin(a.astype(F8)).astype(F4)


def cosine(a: Array) -> Array:
    return np.cos(a.astype(F8)).astype(F4)


def tangent_hyperbolic(a: Array) -> Array:
    return np.tanh(a.astype(F8)).astype(F4)


def reciprocal_high(a: Array) -> Array:
    """rcp.approx.ftz.f64: of the upper 32 bits, into the upper 32 bits."""
    upper = U8(0xFFFFFFFF00000000)
    found = flush(1.0 / flush((a.view(U8) & upper).view(F8)))
    return (found.view(U8) & upper).view(F8)


# ---------------------------------------------------------------------------------- conversions


def convert(a: Array, kind: Any) -> Array:
    """Between integers: cut off, or extended as the source's sign says; to a float: to nearest."""
    if kind == F2 and a.dtype.kind == "f":
        return f32_to_f16(a).view(F2)
    return a.astype(kind)


def _to_integer(rounded: Array, source: Array, kind: Any) -> Array:
    limits = np.iinfo(kind)
    bits = limits.bits
    if bits < 64 and source.dtype != F8:
        nan = kind(0)
    else:
        nan = UNSIGNED[bits // 8](1 << (bits - 1)).view(kind)
    wide = np.where(np.isnan(rounded), 0, rounded).astype(np.longdouble)
    found = np.clip(wide, np.longdouble(limits.min), np.longdouble(limits.max)).astype(kind)
    return np.where(np.isnan(source), nan, found)


def to_integer_towards_zero(a: Array, kind: Any) -> Array:
    return _to_integer(np.trunc(a), a, kind)


def to_nearest_integer(a: Array, kind: Any) -> Array:
    return _to_integer(np.rint(a), a, kind)


def to_integer_below(a: Array, kind: Any) -> Array:
    return _to_integer(np.floor(a), a, kind)


def to_integer_above(a: Array, kind: Any) -> Array:
    return _to_integer(np.ceil(a), a, kind)


def bf16_to_f32(bits: Array) -> Array:
    return (bits.astype(U4) << U4(16)).view(F4)


def f32_to_bf16(values: Array) -> Array:
    """Bits of the nearest; NaN is 0x7FFF."""
    bits = np.ascontiguousarray(values, dtype=F4).view(U4)
    rounded = ((bits + U4(0x7FFF) + ((bits >> U4(16)) & U4(1))) >> U4(16)).astype(U2)
    return np.where(np.isnan(values), U2(0x7FFF), rounded)


def f32_to_f16(values: Array) -> Array:
    """Bits of the nearest; NaN is 0x7FFF."""
    return np.where(np.isnan(values), U2(0x7FFF), values.astype(F2).view(U2))


def cut_off_to_bf16(values: Array) -> Array:
    """Towards zero."""
    cut = (np.ascontiguousarray(values).view(U4) & U4(0xFFFF0000)).view(F4)
    return np.where(np.isnan(values), values, cut)


def cut_off_to_bf16_pair(high: Array, low: Array) -> Array:
    return to_bf16_pair(cut_off_to_bf16(high), cut_off_to_bf16(low))


def _pair(high: Array, low: Array) -> Array:
    return (high.astype(U4) << U4(16)) | low.astype(U4)


def to_bf16_pair(high: Array, low: Array) -> Array:
    return _pair(f32_to_bf16(high), f32_to_bf16(low))


def to_f16_pair(high: Array, low: Array) -> Array:
    return _pair(f32_to_f16(high), f32_to_f16(low))


# ------------------------------------------------------------------------------------ modifiers


def flush(values: Array) -> Array:
    """`.ftz`: a subnormal is a zero of its sign."""
    least = np.finfo(values.dtype).tiny
    return np.where(np.abs(values) < least, np.copysign(values.dtype.type(0), values), values)


def saturate(values: Array) -> Array:
    """`.sat`: into [0, 1]; NaN is +0."""
    inside = np.clip(values, values.dtype.type(0), values.dtype.type(1)) + values.dtype.type(0)
    return np.where(np.isnan(values), values.dtype.type(0), inside)
