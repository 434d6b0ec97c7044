"""A few PTX instructions as a kernel of one thread an element, executed by the emulator.

Operands are single letters: `a b c e f g` are inputs, `d x y z` outputs, in the order of their
kinds. `%r1` is the program's number, `%r2` the thread's within it, `%r3` the element's; `%r40`,
`%rd40`, `%rs40` and `%p40` upwards are free, but that `%rd50` upwards point to further arrays.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from zlib import crc32

import numpy as np
import pytest

# Whoever imports this is skipped where there is no Triton.
pytest.importorskip("triton")
import torch  # noqa: E402
from emulator import Report, launch  # noqa: E402
from exact_numbers import FORMATS  # noqa: E402

THREADS = 128
INPUTS, OUTPUTS = "abcefg", "dxyz"
_REGISTER = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}
# (n,) of unsigned numbers: the bits of one operand.
Bits = np.ndarray[Any, Any]


@cache
def size_of(kind: str) -> int:
    """Bytes of a PTX type in memory; a predicate travels as a word."""
    return (
        4 if kind == "pred" else int(re.search(r"\d+", kind)[0]) // 8 * (2 if "x2" in kind else 1)
    )


def unsigned(kind: str) -> type[np.unsignedinteger[Any]]:
    return {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[size_of(kind)]


def _tensor(bits: Bits) -> torch.Tensor:
    """Of the same memory."""
    signed = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[bits.itemsize]
    return torch.from_numpy(bits.view(signed))


def kernel(
    body: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    threads: int = THREADS,
    further: int = 0,
) -> str:
    """PTX that runs the lines of `body` on operands of the kinds given, and on `further` arrays."""
    names, load, store = {}, [], []
    for place, (letter, kind) in enumerate(
        [*zip(INPUTS, inputs, strict=False), *zip(OUTPUTS, outputs, strict=False)]
    ):
        size, number = size_of(kind), 10 + place
        register = f"{_REGISTER[size]}{number}"
        names[letter] = f"%p{number}" if kind == "pred" else register
        load += [
            f"ld.param.b64 %rd{number + 10}, [_small_kernel_param_{place}];",
            f"mad.wide.u32 %rd{number + 10}, %r3, {size}, %rd{number + 10};",
        ]
        if letter in INPUTS:
            load.append(f"ld.global.b{8 * size} {{ {register} }}, [ %rd{number + 10} + 0 ];")
            if kind == "pred":
                load.append(f"setp.ne.b32 %p{number}, {register}, 0;")
        else:
            if kind == "pred":
                store.append(f"selp.b32 {register}, 1, 0, %p{number};")
            store.append(f"st.global.b{8 * size} [ %rd{number + 10} + 0 ], {{ {register} }};")

    pointers = len(names) + further
    load += [
        f"ld.param.b64 %rd{50 + n}, [_small_kernel_param_{len(names) + n}];" for n in range(further)
    ]

    def with_registers(line: str) -> str:
        opcode, _, operands = line.strip().partition(" ")
        if opcode.startswith("@"):
            guard, opcode = opcode, operands.partition(" ")[0]
            operands = operands.partition(" ")[2]
            opcode = (
                f"@{'!' * guard.startswith('@!')}{names.get(guard[-1], guard.strip('@!'))} {opcode}"
            )
        found = re.sub(r"(?<![\w%.$])[a-gxyz](?!\w)", lambda m: names.get(m[0], m[0]), operands)
        return f"{opcode} {found};".replace(" ;", ";")

    middle = [with_registers(line) for line in re.split(r";|\n", body) if line.strip()]
    start = [
        "mov.u32 %r1, %ctaid.x;",
        "mov.u32 %r2, %tid.x;",
        f"mad.lo.s32 %r3, %r1, {threads}, %r2;",
    ]
    lines = "\n".join(f"\t{line}" for line in (*start, *load, *middle, *store, "ret;"))
    parameters = ",\n".join(
        f"\t.param .u64 .ptr .global .align 1 _small_kernel_param_{n}" for n in range(pointers)
    )
    return f"""
.version 8.0
.target sm_80
.address_size 64

	// .globl	_small_kernel
.extern .shared .align 16 .b8 global_smem[];
.visible .entry _small_kernel(
{parameters}
)
.reqntid {threads}
{{
	.reg .pred 	%p<60>;
	.reg .b16 	%rs<60>;
	.reg .b32 	%r<99>;
	.reg .b64 	%rd<60>;
	.loc	1 1 0                          // small_kernel.py:1:0
$L__func_begin0:
{lines}
$L__func_end0:
}}
"""


def executed(
    body: str,
    inputs: Sequence[tuple[str, Bits]],
    outputs: Sequence[str],
    *,
    threads: int = THREADS,
    shared: int = 0,
    further: Sequence[Bits] = (),
    **options: Any,
) -> tuple[list[Bits], Report]:
    """Outputs of `body`, one element a thread, and what the launch did.

    Args:
        body: PTX instructions, one a line or parted by `;`.
        inputs: kind and bits of each; all are as long, a multiple of `threads`.
        outputs: kinds.
        threads: of a program.
        shared: bytes of a program.
        further: arrays that the body reads and writes by `%rd50` upwards, in place.
        options: of `emulator.launch`.
    """
    count = len(inputs[0][1]) if inputs else threads
    assert count % threads == 0
    arrays = [np.array(bits, unsigned(kind)) for kind, bits in inputs]
    arrays += [np.full(count, np.iinfo(unsigned(kind)).max, unsigned(kind)) for kind in outputs]
    text = kernel(body, [kind for kind, _ in inputs], outputs, threads, len(further))
    report = launch(
        text,
        [_tensor(array) for array in (*arrays, *further)],
        (count // threads,),
        warps=threads // 32,
        shared=shared,
        **options,
    )
    return arrays[len(inputs) :], report


# ------------------------------------------------------------------------ one value of each operand

_WHOLE = [0, 1, 2, 3, 5, 31, 32, 33, 63, 64, 65, 0x7F, 0x80, 0xFF, 0x100]


def edges(kind: str) -> list[int]:
    """Bits that are an end of something."""
    if kind == "pred":
        return [0, 1]
    bits = 8 * size_of(kind)
    if kind in FORMATS:
        form = FORMATS[kind]
        one = form.encode(1.0)
        smallest = 1 << form.mantissa
        positive = [
            0,
            1,
            2,
            smallest - 1,
            smallest,
            smallest + 1,
            form.encode(0.5),
            form.encode(2.5),
        ]
        positive += [one - 1, one, one + 1, form.encode(3.0), form.infinity - 1, form.infinity]
        positive += [form.infinity + 1, form.infinity | (smallest >> 1), form.sign - 1]
        return [x | sign for x in positive for sign in (0, form.sign)]
    top = 1 << (bits - 1)
    ends = [top - 2, top - 1, top, top + 1, 2 * top - 32, 2 * top - 3, 2 * top - 2, 2 * top - 1]
    return [x for x in _WHOLE if x < 2 * top] + ends


def decoded(kind: str, bits: int) -> Any:
    """The value that a type gives its bits."""
    if kind in FORMATS:
        return FORMATS[kind].decode(bits)
    if kind == "pred":
        return bool(bits)
    width = 8 * size_of(kind)
    return bits - (1 << width) if kind[0] == "s" and bits >> (width - 1) else bits


def encoded(kind: str, value: Any) -> int:
    """Bits of a value; integers wrap."""
    return FORMATS[kind].encode(value) if kind in FORMATS else int(value) % (1 << 8 * size_of(kind))


@cache
def drawn(kinds: tuple[str, ...], count: int = 2 * THREADS) -> list[Bits]:
    """Operands of a case: pairs of edges, then edges and bits at random, seeded by their kinds."""
    random = np.random.default_rng(crc32(repr(kinds).encode()))
    ends = [edges(kind) for kind in kinds]
    rows = list(itertools.product(*ends)) if len(kinds) < 3 else []
    if len(rows) > 2 * count // 3:
        rows = [rows[n] for n in random.permutation(len(rows))[: 2 * count // 3]]
    while len(rows) < count:
        row = []
        for kind, own in zip(kinds, ends, strict=True):
            wild = int.from_bytes(random.bytes(size_of(kind)), "little") & (
                1 if kind == "pred" else -1
            )
            row.append(own[random.integers(len(own))] if random.random() < 0.4 else wild)
            if kind in FORMATS and len(row) > 1 and random.random() < 0.3:
                # Of like size: sums that cancel.
                row[-1] = _near(kind, row[-2], random) if kind == kinds[len(row) - 2] else row[-1]
        rows.append(tuple(row))
    return [
        np.array(column, unsigned(kind))
        for kind, column in zip(kinds, zip(*rows, strict=True), strict=True)
    ]


def _near(kind: str, bits: int, random: np.random.Generator) -> int:
    form = FORMATS[kind]
    moved = (
        (bits ^ form.sign)
        + int(random.integers(-3, 4))
        + (int(random.integers(-2, 3)) << form.mantissa)
    )
    return moved % (1 << form.bits)


@dataclass(frozen=True)
class Case:
    """One instruction, and what the PTX ISA says of it.

    Attributes:
        text: the instruction with operands, `add.s32 d, a, b`.
        kinds: of d, then of the inputs, `s32 s32 s32`.
        function: of the inputs' values, None where the ISA leaves it open; a callable it returns
            judges the bits instead.
        values: for an input's letter the only bits it takes.
    """

    text: str
    kinds: str
    function: Callable[..., Any]
    values: dict[str, Sequence[int]] | None = None

    @property
    def opcodes(self) -> set[str]:
        lines = [line.split() for line in self.text.split(";")]
        return {parts[1] if parts[0].startswith("@") else parts[0] for parts in lines}

    def operands(self) -> list[Bits]:
        """One for each input: the bits of every element."""
        kinds = tuple(self.kinds.split()[1:])
        found = list(drawn(kinds))
        for letter, values in (self.values or {}).items():
            place = INPUTS.index(letter)
            random = np.random.default_rng(crc32(self.text.encode()) + place)
            found[place] = random.permutation(
                np.resize(np.array(values, unsigned(kinds[place])), len(found[place]))
            )
        return found

    def check(self) -> None:
        """Execute it on edges and random bits, and compare every element."""
        kind, *kinds = self.kinds.split()
        given = self.operands()
        (got,), _ = executed(self.text, list(zip(kinds, given, strict=True)), [kind])
        compared, wrong = 0, []
        for place, bits in enumerate(zip(*(x.tolist() for x in given), strict=True)):
            wanted = self.function(*map(decoded, kinds, bits))
            if wanted is None:
                continue
            compared += 1
            found = int(got[place])
            if not _agrees(kind, found, wanted):
                shown = wanted if callable(wanted) else f"{encoded(kind, wanted):#x}"
                wrong.append(f"{[hex(x) for x in bits]}: got {found:#x}, wanted {shown}")
        assert compared > len(got) // 4, compared
        assert not wrong, f"{self.text}: {len(wrong)} of {compared} wrong\n" + "\n".join(wrong[:10])


def _agrees(kind: str, found: int, wanted: Any) -> bool:
    if callable(wanted):
        return bool(wanted(found))
    if kind in FORMATS and isinstance(wanted, float) and wanted != wanted:
        # Which NaN: no kernel reads its payload. Of cvt it is checked, by bits.
        return FORMATS[kind].decode(found) != FORMATS[kind].decode(found)
    return found == encoded(kind, wanted)
