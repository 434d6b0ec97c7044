"""The table of instructions: a line says what is matched, the types, and what is done.

A pattern stands for every opcode it spells: `{a,b}` is one of these, `[.a,.b]` one or nothing. What
no line spells is not known, modifiers included, and a program with it is refused. The types read
"result = operands":

* `u32`, `f64`, `pred`, …: a number of that type. `T` is the last type in the opcode, `D` the last
  but one, `W` a `T` of twice the bits, `B` the bits of a `T`;
* `{b32}`: a vector of them, or one alone; `{P}`: a vector whose parts fill a `T`;
* `b32|pred`: a result and, where the program asks for it, a second;
* `a32`, `a64`: an address of shared, of global memory; `param`: one in the parameters;
* `places`: a vector of registers, by their places; `box`: an address and coordinates in a tensor;
* `i`: a number that stands in the text; a `?` behind: may be missing;
* `n`: (no operand) how many results there are; `d`: (no operand) the numpy type of a `D`.

`pure` lines name a function of arrays, one element a thread. `effect` lines name a method of the
machine, `part.method`, called with the `Site` (what stands where), the mask of the threads that
execute it (None: all) and the operands. `.ftz` and `.sat`, where a line spells them, are applied to
what a pure function takes and gives.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from . import arithmetic as by

SIZES = {f"{letter}{bits}": bits // 8 for letter in "bus" for bits in (8, 16, 32, 64)}
SIZES |= {"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4, "pred": 0}


@dataclass(frozen=True)
class Line:
    """Of the table.

    Attributes:
        pattern, types: as above.
        function: of arrays, or the name of the machine's method.
        ulps: by how much an approximation may be off; 0 where the result is the nearest number.
        wider: registers may be wider than their type (ld, st and cvt).
    """

    pattern: str
    types: str
    function: Callable[..., Any] | str
    ulps: int = 0
    wider: bool = False


@dataclass(frozen=True)
class Form:
    """A line for one opcode; `type` and `other` are the last type in it, and the last but one."""

    line: Line
    opcode: str
    type: str
    other: str

    @property
    def modifiers(self) -> frozenset[str]:
        return frozenset(self.opcode.split("."))


@dataclass(frozen=True)
class Site:
    """What a method of the machine is told about the instruction.

    Attributes:
        opcode: with its modifiers.
        modifiers: of the opcode, each.
        type: the last one in the opcode.
        size: of it, in bytes.
        count: of results, or of the values of a store.
        text: the instruction as it is written, and where it comes from.
    """

    opcode: str
    modifiers: frozenset[str]
    type: str
    size: int
    count: int
    text: str

    def __str__(self) -> str:
        return self.text


pure = Line
convert = partial(Line, wider=True)
effect = partial(Line, wider=True)

_INTEGERS = "{u16,s16,u32,s32,u64,s64}"
_ANY = "{b16,u16,s16,b32,u32,s32,b64,u64,s64,f32,f64}"
_HINTS = "[.L1::evict_first,.L1::evict_last,.L1::no_allocate]"
_INTEGERS_OF_8 = "{u8,s8,u16,s16,u32,s32,u64,s64}"
_MATRICES = ".sync.aligned.m8n8.{x1,x2,x4}[.trans].shared[::cta].b16"
_PRODUCT = ".sync.aligned.{m16n8k8,m16n8k16}.row.col"
_Named = dict[str, Callable[..., Any]]
_EXACT: _Named = {"eq": np.equal, "ne": np.not_equal}
_SIGNED: _Named = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
_UNSIGNED: _Named = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
_ORDERED: _Named = {
    "eq": np.equal,
    "ne": by.ordered_unequal,
    "num": by.ordered,
    "nan": by.unordered,
}
# Unordered or …: not the opposite.
_OPPOSITES: _Named = {"equ": by.ordered_unequal, "neu": np.equal, "ltu": np.greater_equal}
_OPPOSITES |= {"leu": np.greater, "gtu": np.less_equal, "geu": np.less}
_ROUNDED = {"rzi": by.to_integer_towards_zero, "rni": by.to_nearest_integer}
_ROUNDED |= {"rmi": by.to_integer_below, "rpi": by.to_integer_above}


def _not(function: Callable[..., Any], a: by.Array, b: by.Array) -> by.Array:
    return ~function(a, b)


LINES: tuple[Line, ...] = (
    # Integers.
    pure(f"add.{_INTEGERS}", "T = T T", np.add),
    pure(f"sub.{_INTEGERS}", "T = T T", np.subtract),
    pure(f"mul.lo.{_INTEGERS}", "T = T T", np.multiply),
    pure(f"mul.hi.{_INTEGERS}", "T = T T", by.multiply_high),
    pure("mul.wide.{u16,s16,u32,s32}", "W = T T", by.multiply_wide),
    pure(f"mad.lo.{_INTEGERS}", "T = T T T", by.multiply_add),
    pure(f"mad.hi.{_INTEGERS}", "T = T T T", by.multiply_add_high),
    pure("mad.wide.{u16,s16,u32,s32}", "W = T T W", by.multiply_add_wide),
    pure(f"div.{_INTEGERS}", "T = T T", by.divide_integers),
    pure(f"rem.{_INTEGERS}", "T = T T", by.remainder),
    pure(f"min.{_INTEGERS}", "T = T T", np.minimum),
    pure(f"max.{_INTEGERS}", "T = T T", np.maximum),
    pure("neg.{s16,s32,s64}", "T = T", np.negative),
    pure("abs.{s16,s32,s64}", "T = T", np.abs),
    # Bits.
    pure("and.{pred,b16,b32,b64}", "T = T T", np.bitwise_and),
    pure("or.{pred,b16,b32,b64}", "T = T T", np.bitwise_or),
    pure("xor.{pred,b16,b32,b64}", "T = T T", np.bitwise_xor),
    pure("not.{pred,b16,b32,b64}", "T = T", np.invert),
    pure("shl.{b16,b32,b64}", "T = T u32", by.shift_left),
    pure("shr.{b16,u16,s16,b32,u32,s32,b64,u64,s64}", "T = T u32", by.shift_right),
    pure("shf.l.wrap.b32", "T = T T u32", by.funnel_left_wrap),
    pure("shf.l.clamp.b32", "T = T T u32", by.funnel_left_clamp),
    pure("shf.r.wrap.b32", "T = T T u32", by.funnel_right_wrap),
    pure("shf.r.clamp.b32", "T = T T u32", by.funnel_right_clamp),
    pure("bfe.{u32,s32,u64,s64}", "T = T u32 u32", by.extract_field),
    pure("bfi.{b32,b64}", "T = T T u32 u32", by.insert_field),
    pure("prmt.b32", "T = T T u32", by.permute_bytes),
    pure("lop3.b32", "T = T T T i", by.lookup_three),
    pure("popc.{b32,b64}", "u32 = T", by.count_ones),
    # Choices.
    pure(f"selp.{_ANY}", "B = B B pred", by.choose),
    *(pure(f"setp.{n}.{{b16,b32,b64}}", "pred = T T", f) for n, f in _EXACT.items()),
    *(pure(f"setp.{n}.{_INTEGERS}", "pred = T T", f) for n, f in (_EXACT | _SIGNED).items()),
    *(pure(f"setp.{n}.{{u16,u32,u64}}", "pred = T T", f) for n, f in _UNSIGNED.items()),
    *(pure(f"setp.{n}[.ftz].f32", "pred = T T", f) for n, f in (_SIGNED | _ORDERED).items()),
    *(pure(f"setp.{n}.f64", "pred = T T", f) for n, f in (_SIGNED | _ORDERED).items()),
    *(pure(f"setp.{n}[.ftz].f32", "pred = T T", partial(_not, f)) for n, f in _OPPOSITES.items()),
    *(pure(f"setp.{n}.f64", "pred = T T", partial(_not, f)) for n, f in _OPPOSITES.items()),
    # Floating point.
    pure("add[.rn][.ftz][.sat].f32", "T = T T", np.add),
    pure("sub[.rn][.ftz][.sat].f32", "T = T T", np.subtract),
    pure("mul[.rn][.ftz][.sat].f32", "T = T T", np.multiply),
    pure("fma.rn[.ftz][.sat].f32", "T = T T T", by.fused_multiply_add),
    pure("add[.rn].f64", "T = T T", np.add),
    pure("sub[.rn].f64", "T = T T", np.subtract),
    pure("mul[.rn].f64", "T = T T", np.multiply),
    pure("fma.rn.f64", "T = T T T", by.fused_multiply_add_double),
    pure("min[.ftz].f32", "T = T T", by.smallest),
    pure("max[.ftz].f32", "T = T T", by.largest),
    pure("min[.ftz].NaN.f32", "T = T T", by.smallest_or_nan),
    pure("max[.ftz].NaN.f32", "T = T T", by.largest_or_nan),
    pure("min.f64", "T = T T", by.smallest),
    pure("max.f64", "T = T T", by.largest),
    pure("abs[.ftz].f32", "T = T", np.abs),
    pure("neg[.ftz].f32", "T = T", np.negative),
    pure("abs.f64", "T = T", np.abs),
    pure("neg.f64", "T = T", np.negative),
    pure("copysign.{f32,f64}", "T = T T", by.copy_sign),
    pure("div.rn[.ftz].f32", "T = T T", np.divide),
    pure("div.rn.f64", "T = T T", np.divide),
    pure("rcp.rn[.ftz].f32", "T = T", by.reciprocal),
    pure("rcp.rn.f64", "T = T", by.reciprocal),
    pure("sqrt.rn[.ftz].f32", "T = T", np.sqrt),
    pure("sqrt.rn.f64", "T = T", np.sqrt),
    # Approximations, with the error that the ISA allows them.
    pure("div.full[.ftz].f32", "T = T T", np.divide, ulps=2),
    pure("div.approx[.ftz].f32", "T = T T", by.divide_approximately, ulps=2),
    pure("rcp.approx[.ftz].f32", "T = T", by.reciprocal, ulps=1),
    pure("rcp.approx.ftz.f64", "T = T", by.reciprocal_high),
    pure("sqrt.approx[.ftz].f32", "T = T", np.sqrt, ulps=1),
    pure("rsqrt.approx[.ftz].f32", "T = T", by.reciprocal_square_root, ulps=2),
    pure("ex2.approx[.ftz].f32", "T = T", by.exp2, ulps=2),
    pure("lg2.approx[.ftz].f32", "T = T", by.log2, ulps=1),
    # Moves and conversions.
    pure("mov.pred", "T = T", by.same),
    pure("mov.{b16,u16,s16,b32,u32,s32,f32,b64,u64,s64,f64}", "B = B", by.same),
    pure("mov.{b16,b32,b64}", "{P} = T n", by.unpack),
    pure("mov.{b16,b32,b64}", "T = {P}", by.pack),
    pure("cvta[.to].global.u64", "T = T", by.same),
    pure("cvta.param.u64", "T = T", by.same),
    convert(f"cvt.{_INTEGERS_OF_8}.{_INTEGERS_OF_8}", "D = T d", by.convert),
    convert(f"cvt.rn.{{f16,f32,f64}}.{_INTEGERS_OF_8}", "D = T d", by.convert),
    *(convert(f"cvt.{n}[.ftz].{_INTEGERS_OF_8}.f32", "D = T d", f) for n, f in _ROUNDED.items()),
    *(convert(f"cvt.{n}.{_INTEGERS_OF_8}.{{f16,f64}}", "D = T d", f) for n, f in _ROUNDED.items()),
    pure("cvt[.ftz].f32.f16", "D = T d", by.convert),
    pure("cvt.f64.f16", "D = T d", by.convert),
    pure("cvt[.ftz].f64.f32", "D = T d", by.convert),
    pure("cvt.rn[.ftz].f32.f64", "D = T d", by.convert),
    pure("cvt.rn.f16.{f32,f64}", "D = T d", by.convert),
    pure("cvt.f32.bf16", "D = T", by.same),
    pure("cvt.rn.bf16.f32", "D = T", by.same),
    pure("cvt.rz.bf16.f32", "D = T", by.cut_off_to_bf16),
    pure("cvt.rn.bf16x2.f32", "b32 = T T", by.to_bf16_pair),
    pure("cvt.rz.bf16x2.f32", "b32 = T T", by.cut_off_to_bf16_pair),
    pure("cvt.rn.f16x2.f32", "b32 = T T", by.to_f16_pair),
    # Memory.
    effect(
        "ld.param.{b8,u8,s8,b16,u16,s16,b32,u32,s32,f32,b64,u64,s64,f64}", "T = param", "parameter"
    ),
    *(
        effect(f"{name}{vectors}.{types}", operands, method)
        # 16 bytes at most.
        for vectors, types in (
            ("[.v2,.v4]", "{b8,u8,s8,b16,u16,s16,b32,u32,s32,f32}"),
            ("[.v2]", "{b64,u64,s64,f64}"),
        )
        for name, operands, method in (
            (f"ld.global{_HINTS}", "{T} = a64", "tensors.load"),
            (f"st.global{_HINTS}", "= a64 {T}", "tensors.store"),
            ("ld.shared[::cta]", "{T} = a32", "shared.load"),
            ("st.shared[::cta]", "= a32 {T}", "shared.store"),
        )
    ),
    effect(f"ldmatrix{_MATRICES}", "{b32} = a32", "warps.load_matrices"),
    effect(f"stmatrix{_MATRICES}", "= a32 {b32}", "warps.store_matrices"),
    effect("cp.async.{ca,cg}.shared[::cta].global", "= a32 a64 i u32?", "copies.start"),
    effect("cp.async.commit_group", "=", "copies.commit"),
    effect("cp.async.wait_group", "= i", "copies.wait"),
    effect("cp.async.wait_all", "=", "copies.wait_for_all"),
    # Bulk copies, and the mbarriers that they arrive at.
    effect("mbarrier.init.shared[::cta].b64", "= a32 u32", "mbarriers.init"),
    effect("mbarrier.inval.shared[::cta].b64", "= a32", "mbarriers.invalidate"),
    effect("mbarrier.arrive.expect_tx.shared[::cta].b64", "T = a32 u32", "mbarriers.arrive"),
    effect("mbarrier.try_wait.parity.shared[::cta].b64", "pred = a32 u32", "mbarriers.wait"),
    # Without clusters, shared memory of the cluster is that of the program.
    effect(
        "cp.async.bulk.tensor.2d.{shared::cta,shared::cluster}.global.mbarrier::complete_tx::bytes",
        "= a32 box a32",
        "mbarriers.copy",
    ),
    effect("fence.proxy.async.shared::cta", "=", "proxy.fence"),
    # Threads together.
    effect("elect.sync", "b32|pred = b32", "warps.elect"),
    effect("{bar,barrier,barrier.cta}.sync", "= i", "barrier"),
    effect("bar.warp.sync", "= b32", "warps.meet"),
    effect("shfl.sync.{up,down,bfly,idx}.b32", "b32|pred = b32 b32 b32 b32", "warps.shuffle"),
    effect("redux.sync.{add,min,max}.{u32,s32}", "T = T b32", "warps.reduce"),
    effect("redux.sync.{and,or,xor}.b32", "T = T b32", "warps.reduce"),
    effect("vote.sync.{any,all}.pred", "T = T b32", "warps.vote"),
    effect("vote.sync.ballot.b32", "T = pred b32", "warps.ballot"),
    # Tensor cores.
    effect(f"mma{_PRODUCT}.f32.bf16.bf16.f32", "{b32} = {b32} {b32} {b32}", "cores.multiply"),
    effect(f"mma{_PRODUCT}.f32.f16.f16.f32", "{b32} = {b32} {b32} {b32}", "cores.multiply"),
    effect("wgmma.fence.sync.aligned", "=", "warpgroups.fence"),
    *(
        effect(
            f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{{bf16.bf16,f16.f16}}",
            "= places u64 u64 pred i i i i",
            "warpgroups.multiply",
        )
        for n in range(8, 257, 8)
    ),
    effect("wgmma.commit_group.sync.aligned", "=", "warpgroups.commit"),
    effect("wgmma.wait_group.sync.aligned", "= i", "warpgroups.wait"),
)

# Instructions of these parts need all threads of a warp at once.
TOGETHER = ("warps.", "cores.", "warpgroups.", "proxy.", "barrier")


def spell(pattern: str) -> Iterator[str]:
    """Every opcode of a pattern."""
    pieces = re.split(r"(\{[^}]*\}|\[[^\]]*\])", pattern)
    choices = []
    for piece in pieces:
        inner = piece[1:-1].split(",")
        choices.append(["", *inner] if piece[:1] == "[" else inner if piece[:1] == "{" else [piece])
    return ("".join(choice) for choice in itertools.product(*choices))


def forms(lines: tuple[Line, ...] = LINES) -> dict[str, list[Form]]:
    """Opcode → its forms, several where they differ in the shape of their operands."""
    found: dict[str, list[Form]] = {}
    for line in lines:
        for opcode in spell(line.pattern):
            types = [part for part in opcode.split(".") if part in SIZES] or [""]
            form = Form(line, opcode, types[-1], types[-2] if len(types) > 1 else "")
            found.setdefault(opcode, []).append(form)
    return found


FORMS = forms()
