"""Instructions of whole warps: the lanes, rows and columns that the PTX ISA's tables name."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import reduce
from typing import Any

import numpy as np
import pytest
from exact_numbers import FORMATS
from small_kernels import THREADS, Bits, decoded, drawn, encoded, executed

WARPS = THREADS // 32
MODES = ("up", "down", "bfly", "idx")
F32 = FORMATS["f32"]


def words(count: int, seed: int) -> list[Bits]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 2**32, THREADS, np.uint32) for _ in range(count)]


# ----------------------------------------------------------------------------------------- shuffles


def source_lane(mode: str, lane: int, by: int, clamp: int) -> tuple[int, bool]:
    """Where a lane reads, and whether that is within its segment; else it reads itself."""
    segment, by, last = clamp >> 8 & 31, by & 31, clamp & 31
    first = lane & segment
    limit = first | last & ~segment
    wanted = {
        "up": lane - by,
        "down": lane + by,
        "bfly": lane ^ by,
        "idx": first | by & ~segment,
    }[mode]
    inside = wanted >= limit if mode == "up" else wanted <= limit
    return (wanted if inside else lane), inside


@pytest.mark.parametrize("width", [32, 16, 8, 2, 1])
@pytest.mark.parametrize("mode", MODES)
def test_shuffle(mode, width):
    """Distances up to 33, of segments of each width: beyond their ends a lane keeps its own."""
    (values,) = words(1, 0)
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    for by in (*range(4), 7, 8, 15, 16, 17, 31, 33):
        (got, inside), _ = executed(
            f"shfl.sync.{mode}.b32 d|x, a, {by}, {clamp}, -1", [("b32", values)], ["b32", "pred"]
        )
        sources = [source_lane(mode, lane, by, clamp) for lane in range(32)] * WARPS
        wanted = [values[n // 32 * 32 + lane] for n, (lane, _) in enumerate(sources)]
        assert got.tolist() == wanted, by
        assert inside.tolist() == [within for _, within in sources], by


def test_shuffle_of_registers():
    """The distance and the ends may be another in each lane."""
    values, by = words(2, 1)
    by, (clamps,) = by % 40, words(1, 2)
    clamps &= 0x1F1F
    (got,), _ = executed(
        "shfl.sync.idx.b32 d, a, b, c, -1", [("b32", x) for x in (values, by, clamps)], ["b32"]
    )
    lanes = [source_lane("idx", n % 32, int(by[n]), int(clamps[n]))[0] for n in range(THREADS)]
    assert got.tolist() == [values[n // 32 * 32 + lane] for n, lane in enumerate(lanes)]


# --------------------------------------------------------------------------------------- reductions

REDUCTIONS: dict[str, Callable[[int, int], int]] = {
    "add.s32": lambda a, b: a + b,
    "add.u32": lambda a, b: a + b,
    "min.s32": min,
    "min.u32": min,
    "max.s32": max,
    "max.u32": max,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction(name):
    kind = name.split(".")[1]
    (values,) = drawn((kind,), THREADS)
    (got,), _ = executed(f"redux.sync.{name} d, a, -1", [(kind, values)], [kind])
    numbers = [decoded(kind, x) for x in values.tolist()]
    wanted = [
        encoded(kind, reduce(REDUCTIONS[name], numbers[n : n + 32])) for n in range(0, THREADS, 32)
    ]
    assert got.tolist() == np.repeat(wanted, 32).tolist()


@pytest.mark.parametrize("chance", [0.0, 0.03, 0.5, 0.97, 1.0])
def test_votes(chance):
    given = (np.random.default_rng(0).random(THREADS) < chance).astype(np.uint32)
    got, _ = executed(
        "vote.sync.any.pred d, a, -1; vote.sync.all.pred x, a, -1; vote.sync.ballot.b32 y, a, -1",
        [("pred", given)],
        ["pred", "pred", "b32"],
    )
    warps = given.reshape(WARPS, 32).tolist()
    wanted = [
        [int(any(warp)) for warp in warps],
        [int(all(warp)) for warp in warps],
        [sum(bit << lane for lane, bit in enumerate(warp)) for warp in warps],
    ]
    assert [x.tolist() for x in got] == [np.repeat(x, 32).tolist() for x in wanted]


# ----------------------------------------------------------------------------------------- matrices

FILL = """
shl.b32 %r40, %r2, 4
st.shared.v4.b32 [%r40], {a, b, c, e}
bar.sync 0
"""


def load_matrices(count: int, trans: bool, cta: bool) -> str:
    return f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' * trans}.shared{'::cta' * cta}.b16"


@pytest.mark.parametrize("cta", [False, True])
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, trans, cta):
    """Row r of matrix i lies at lane 8i + r's address; a lane gets two neighbours of a row."""
    contents = words(4, 3)
    random = np.random.default_rng(4)
    rows = np.concatenate([random.permutation(THREADS)[:32] for _ in range(WARPS)])
    outputs = ["d", "x", "y", "z"][:count]
    got, report = executed(
        f"{FILL} {load_matrices(count, trans, cta)} {{{', '.join(outputs)}}}, [f]",
        [*(("b32", x) for x in contents), ("u32", rows * 16)],
        ["b32"] * count,
        shared=16 * THREADS,
    )
    halves = np.stack(contents, 1).view(np.uint16)  # 8 of each row
    for matrix, found in enumerate(got):
        for thread in range(THREADS):
            warp, lane = divmod(thread, 32)
            row, pair = divmod(lane, 4)

            def element(r: int, c: int, warp: int = warp, matrix: int = matrix) -> int:
                return int(halves[rows[32 * warp + 8 * matrix + r], c])

            if trans:
                wanted = element(2 * pair, row) | element(2 * pair + 1, row) << 16
            else:
                wanted = element(row, 2 * pair) | element(row, 2 * pair + 1) << 16
            assert found[thread] == wanted, (matrix, thread)
    assert not report.races


# ------------------------------------------------------------------------------------ tensor cores


def place_of(operand: str, lane: int, item: int) -> tuple[int, int]:
    """(row, column) of a fragment's item: 16-bit ones of A and B, of C and D fp32."""
    group, within = divmod(lane, 4)
    if operand == "a":
        return group + 8 * (item // 2 % 2), 2 * within + item % 2 + 8 * (item // 4)
    if operand == "b":
        return 2 * within + item % 2 + 8 * (item // 2), group
    return group + 8 * (item // 2), 2 * within + item % 2


def fragments(operand: str, matrix: np.ndarray, items: int) -> np.ndarray:
    """(32, items) of a (rows, columns) matrix of bits."""
    return np.array(
        [[matrix[place_of(operand, lane, n)] for n in range(items)] for lane in range(32)]
    )


def product(kind: str, depth: int) -> str:
    return f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32"


def multiplied(kind: str, depth: int, a: Any, b: Any, c: Any) -> np.ndarray:
    """(warps, 16, 8) bits of D, of matrices of bits."""
    halves = depth // 8
    first = np.stack([fragments("a", x, 4 * halves) for x in a]).astype(np.uint16).view(np.uint32)
    second = np.stack([fragments("b", x, 2 * halves) for x in b]).astype(np.uint16).view(np.uint32)
    third = np.stack([fragments("c", x, 4) for x in c]).astype(np.uint32)
    columns = [x.reshape(THREADS, -1)[:, n] for x in (first, second) for n in range(x.shape[-1])]
    # All operands in one array of outputs' registers: they come by way of shared memory.
    lines, inputs = [], [("b32", x) for x in columns]
    letters = "abcefg"[: len(columns)]
    sources = third.reshape(THREADS, 4)
    lines.append("mad.wide.u32 %rd40, %r3, 16, %rd50")
    lines.append("ld.global.v4.b32 {d, x, y, z}, [%rd40]")
    left, right = letters[: 2 * halves], letters[2 * halves :]
    lines.append(
        f"{product(kind, depth)} {{d, x, y, z}}, {{{', '.join(left)}}}, {{{', '.join(right)}}},"
        " {d, x, y, z}"
    )
    got, _ = executed("\n".join(lines), inputs, ["f32"] * 4, further=[sources])
    found = np.zeros((WARPS, 16, 8), np.uint32)
    for thread in range(THREADS):
        for item in range(4):
            found[(thread // 32, *place_of("c", thread % 32, item))] = got[item][thread]
    return found


@pytest.mark.parametrize("depth", [16, 8])
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_mma(kind, depth):
    """Exact sums of exact products, rounded once to fp32."""
    form, random = FORMATS[kind], np.random.default_rng(depth)

    def draw(rows: int, columns: int, form: Any = form) -> np.ndarray:
        numbers = random.standard_normal((WARPS, rows, columns)) * 4.0 ** random.integers(
            -2, 3, (WARPS, rows, columns)
        )
        return np.array([form.encode(float(x)) for x in numbers.ravel()]).reshape(numbers.shape)

    a, b, c = draw(16, depth), draw(depth, 8), draw(16, 8, F32)
    found = multiplied(kind, depth, a, b, c)

    def exact(warp: int, row: int, column: int) -> Fraction:
        terms = (
            Fraction(form.decode(int(a[warp, row, k])))
            * Fraction(form.decode(int(b[warp, k, column])))
            for k in range(depth)
        )
        return sum(terms, Fraction(F32.decode(int(c[warp, row, column]))))

    wanted = [
        [[F32.encode(exact(w, r, n)) for n in range(8)] for r in range(16)] for w in range(WARPS)
    ]
    assert found.tolist() == wanted


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_mma_of_special_values(kind):
    """An infinity of a row, its product with zero, a NaN, and subnormal operands that are kept."""
    form = FORMATS[kind]
    a = np.zeros((WARPS, 16, 16), np.int64)
    b, c = np.full((WARPS, 16, 8), form.encode(1.0)), np.zeros((WARPS, 16, 8), np.int64)
    a[:, 0, 3], a[:, 1, 2], a[:, 2, 5] = form.infinity, form.infinity | form.sign, form.sign - 1
    a[:, 3, 1] = 1
    c[:, 4, :], c[:, 5, 2] = F32.infinity, F32.encode(-2.5)
    b[:, 3, 7] = 0
    found = multiplied(kind, 16, a, b, c)[0]
    values = [[F32.decode(x) for x in row] for row in found.tolist()]
    assert values[0][:7] == [math.inf] * 7 and math.isnan(values[0][7])
    assert values[1] == [-math.inf] * 8 and all(map(math.isnan, values[2]))
    assert values[3] == [form.decode(1)] * 8 and values[4] == [math.inf] * 8
    assert values[5] == [0, 0, -2.5, 0, 0, 0, 0, 0]


OPCODES = {
    *(f"shfl.sync.{mode}.b32" for mode in MODES),
    *(f"redux.sync.{name}" for name in REDUCTIONS),
    *("vote.sync.any.pred", "vote.sync.all.pred", "vote.sync.ballot.b32"),
    *(load_matrices(n, trans, cta) for n in (1, 2, 4) for trans in (0, 1) for cta in (0, 1)),
    *(product(kind, depth) for kind in ("bf16", "f16") for depth in (8, 16)),
}
