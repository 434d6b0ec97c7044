"""Integer and logical instructions against Python's integers."""

from __future__ import annotations

from typing import Any

import pytest
from small_kernels import Case

INTEGERS = "s16 u16 s32 u32 s64 u64"
WORDS = ("b16", "b32", "b64", *INTEGERS.split())


def quotient(a: int, b: int) -> int | None:
    """Towards zero; by zero it is anybody's guess."""
    return None if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def rest(a: int, b: int) -> int | None:
    """Of the sign of the dividend."""
    return None if b == 0 else a - quotient(a, b) * b


def field(signed: bool, bits: int) -> Any:
    """bfe: `length` bits from `start`; beyond the operand zeros, or its sign."""

    def extract(a: int, start: int, length: int) -> int:
        start, length = start & 0xFF, length & 0xFF
        if not length:
            return 0
        # What sticks out of a signed operand is the top bit of the part within it.
        end = min(start + length - 1, bits - 1)
        fill = signed and a >> end & 1
        found = 0
        for place in range(min(length, bits)):
            source = start + place
            one = a >> source & 1 if source < bits else fill
            found |= one << place
        for place in range(length, bits):
            found |= fill << place
        return found

    return lambda a, start, length: extract(a % (1 << bits), start, length)


def inserted(bits: int) -> Any:
    """bfi: the low bits of a into b; what sticks out is dropped."""

    def insert(a: int, b: int, start: int, length: int) -> int:
        start, length = start & 0xFF, length & 0xFF
        for place in range(start, min(start + length, bits)):
            b = b & ~(1 << place) | (a >> (place - start) & 1) << place
        return b

    return insert


def permuted(a: int, b: int, selector: int) -> int:
    source = list((a | b << 32).to_bytes(8, "little"))
    found = []
    for place in range(4):
        choice = selector >> 4 * place & 15
        byte = source[choice & 7]
        found.append((0xFF if byte & 0x80 else 0) if choice & 8 else byte)
    return int.from_bytes(bytes(found), "little")


def table(number: int) -> Any:
    """lop3: each bit of the result is the table's, at the place that three bits name."""

    def look_up(a: int, b: int, c: int) -> int:
        places = ((a >> n & 1) << 2 | (b >> n & 1) << 1 | c >> n & 1 for n in range(32))
        return sum((number >> place & 1) << n for n, place in enumerate(places))

    return look_up


def funnel(left: bool, clamp: bool) -> Any:
    def shift(a: int, b: int, by: int) -> int:
        by = min(by, 32) if clamp else by & 31
        pair = b << 32 | a
        return pair << by >> 32 if left else pair >> by

    return shift


COMPARED = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
FIELD = {"b": [*range(36), 63, 64, 255, 256, 261], "c": [*range(36), 63, 64, 255, 256, 257]}
CASES = [
    *(
        Case(f"{name}.{kind} d, a, b", f"{kind} {kind} {kind}", function)
        for name, kinds, function in (
            ("add", INTEGERS, lambda a, b: a + b),
            ("sub", INTEGERS, lambda a, b: a - b),
            ("mul.lo", INTEGERS, lambda a, b: a * b),
            ("div", INTEGERS, quotient),
            ("rem", INTEGERS, rest),
            ("min", INTEGERS, min),
            ("max", INTEGERS, max),
            ("and", "b16 b32 b64", lambda a, b: a & b),
            ("or", "b16 b32 b64", lambda a, b: a | b),
            ("xor", "b16 b32 b64", lambda a, b: a ^ b),
        )
        for kind in kinds.split()
    ),
    *(
        Case(
            f"mul.hi.{kind} d, a, b",
            f"{kind} {kind} {kind}",
            lambda a, b, n=kind: a * b >> int(n[1:]),
        )
        for kind in INTEGERS.split()
    ),
    *(
        Case(f"{name}.wide.{kind} d, {letters}", f"{wide} {kind} {kind}{more}", function)
        for kind, wide in (("s16", "s32"), ("u16", "u32"), ("s32", "s64"), ("u32", "u64"))
        for name, letters, more, function in (
            ("mul", "a, b", "", lambda a, b: a * b),
            ("mad", "a, b, c", f" {wide}", lambda a, b, c: a * b + c),
        )
    ),
    *(
        Case(f"mad.{half}.{kind} d, a, b, c", f"{kind} {kind} {kind} {kind}", function)
        for kind in INTEGERS.split()
        for half, function in (
            ("lo", lambda a, b, c: a * b + c),
            ("hi", lambda a, b, c, n=kind: (a * b >> int(n[1:])) + c),
        )
    ),
    *(Case(f"neg.{kind} d, a", f"{kind} {kind}", lambda a: -a) for kind in ("s16", "s32", "s64")),
    *(Case(f"abs.{kind} d, a", f"{kind} {kind}", abs) for kind in ("s16", "s32", "s64")),
    *(Case(f"not.{kind} d, a", f"{kind} {kind}", lambda a: ~a) for kind in ("b16", "b32", "b64")),
    *(Case(f"popc.{kind} d, a", f"b32 {kind}", int.bit_count) for kind in ("b32", "b64")),
    *(
        Case(f"{name}.{kind} d, a, b", f"{kind} {kind} u32", function)
        for name, kinds, function in (
            ("shl", "b16 b32 b64", lambda a, by: a << min(by, 64)),
            ("shr", "b16 u16 s16 b32 u32 s32 b64 u64 s64", lambda a, by: a >> min(by, 64)),
        )
        for kind in kinds.split()
    ),
    *(
        Case(
            f"shf.{way}.{mode}.b32 d, a, b, c",
            "b32 b32 b32 u32",
            funnel(way == "l", mode == "clamp"),
        )
        for way in "lr"
        for mode in ("wrap", "clamp")
    ),
    *(
        Case(
            f"bfe.{kind} d, a, b, c",
            f"{kind} {kind} u32 u32",
            field(kind[0] == "s", int(kind[1:])),
            FIELD,
        )
        for kind in ("u32", "s32", "u64", "s64")
    ),
    *(
        Case(
            f"bfi.b{bits} d, a, b, c, e",
            f"b{bits} b{bits} b{bits} u32 u32",
            inserted(bits),
            {"c": FIELD["b"], "e": FIELD["c"]},
        )
        for bits in (32, 64)
    ),
    Case("prmt.b32 d, a, b, c", "b32 b32 b32 b32", permuted),
    *(
        Case(f"lop3.b32 d, a, b, c, {n:#x}", "b32 b32 b32 b32", table(n))
        for n in (0, 0x96, 0xCA, 0xE8, 0x1B, 255)
    ),
    *(
        Case(
            f"selp.{kind} d, a, b, c",
            f"b{kind[1:]} b{kind[1:]} b{kind[1:]} pred",
            lambda a, b, p: a if p else b,
        )
        for kind in (*WORDS, "f32", "f64")
    ),
    *(
        Case(f"setp.{name}.{kind} d, a, b", f"pred {kind} {kind}", function)
        for kind in ("s16", "u16", "s32", "u32", "s64", "u64", "b16", "b32", "b64")
        for name, function in COMPARED.items()
        if kind[0] != "b" or name in ("eq", "ne")
    ),
    *(
        Case(f"setp.{name}.{kind} d, a, b", f"pred {kind} {kind}", COMPARED[other])
        for kind in ("u16", "u32", "u64")
        for name, other in (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge"))
    ),
    *(
        Case(f"{name}.pred d, a, b", "pred pred pred", function)
        for name, function in (
            ("and", lambda a, b: a and b),
            ("or", lambda a, b: a or b),
            ("xor", lambda a, b: a != b),
        )
    ),
    Case("not.pred d, a", "pred pred", lambda a: not a),
    Case("mov.pred d, a", "pred pred", lambda a: a),
    *(
        Case(f"mov.{kind} d, a", f"b{kind[1:]} b{kind[1:]}", lambda a: a)
        for kind in (*WORDS, "f32", "f64")
    ),
    *(
        Case(f"{name}.u64 d, a", "u64 u64", lambda a: a)
        for name in ("cvta.global", "cvta.to.global")
    ),
    # Immediate operands, each in a way that they are written.
    Case("and.b32 d, a, 96", "b32 b32", lambda a: a & 96),
    Case("add.s32 d, a, -1", "s32 s32", lambda a: a - 1),
    Case("setp.gt.s64 d, a, -1", "pred s64", lambda a: a > -1),
    Case("setp.gt.u32 d, a, 2146435070", "pred u32", lambda a: a > 2146435070),
    Case("prmt.b32 d, a, b, 0x3340U", "b32 b32 b32", lambda a, b: permuted(a, b, 0x3340)),
    Case("selp.b16 d, 0x0000, a, b", "b16 b16 pred", lambda a, p: 0 if p else a),
    Case("bfe.s32 d, a, 2, 1", "s32 u32", lambda a: -(a >> 2 & 1)),
    # A guard leaves what was there.
    Case("mov.b32 d, b; @c add.s32 d, a, b", "u32 u32 u32 pred", lambda a, b, p: a + b if p else b),
    Case(
        "mov.b32 d, b; @!c add.s32 d, a, b", "u32 u32 u32 pred", lambda a, b, p: b if p else a + b
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.text)
def test_value(case):
    case.check()
