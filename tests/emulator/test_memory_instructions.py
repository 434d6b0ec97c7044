"""Loads, stores, asynchronous copies and barriers: bytes that arrive, or must not yet."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("triton")
import torch  # noqa: E402
from emulator import Fault, launch  # noqa: E402
from small_kernels import THREADS, executed, kernel  # noqa: E402

HINTS = ("", ".L1::evict_first", ".L1::evict_last", ".L1::no_allocate")
VECTORS = {"": 1, ".v2": 2, ".v4": 4}


def spelled(space: str, name: str) -> list[str]:
    """All loads, or stores, of a space: hints, vectors and types of 16 bytes at most."""
    places = (f"{space}{hint}" for hint in (HINTS if space == "global" else ("", "::cta")))
    return [
        f"{name}.{place}{vector}.{letter}{bits}"
        for place in places
        for vector, count in VECTORS.items()
        for bits in (8, 16, 32, 64)
        for letter in ("bus" if bits < 32 else "busf")
        if count * bits <= 128
    ]


OPCODES = {
    *(
        opcode
        for space in ("shared", "global")
        for name in ("ld", "st")
        for opcode in spelled(space, name)
    ),
    *(f"ld.param.{letter}{bits}" for bits in (8, 16, 32, 64) for letter in "bus"),
    *("ld.param.f32", "ld.param.f64", "mov.b16", "bar.warp.sync"),
    *(f"cp.async.{cache}.shared{cta}.global" for cache in ("ca", "cg") for cta in ("", "::cta")),
    *("cp.async.commit_group", "cp.async.wait_group", "cp.async.wait_all"),
    *("bar.sync", "barrier.sync", "barrier.cta.sync"),
}


def drawn(kind: str, count: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    bits = int(kind[1:])
    return [random.integers(0, 2**bits, THREADS, f"u{bits // 8}") for _ in range(count)]


def parts(opcode: str) -> tuple[int, int]:
    """Bytes of a value, and how many there are."""
    found = re.search(r"(?:\.v(\d))?\.[busf](\d+)$", opcode)
    return int(found[2]) // 8, int(found[1] or 1)


@pytest.mark.parametrize("space", ["shared", "global"])
@pytest.mark.parametrize("tried", ["ld", "st"])
def test_every_load_and_store(tried, space):
    """Each in turn moves 16 bytes of a thread, or as many as it takes, and no other byte.

    The other half of the way is a plain one.
    """
    opcodes = spelled(space, tried)
    source = np.random.default_rng(0).integers(0, 2**64, 2 * THREADS, np.uint64)
    found = np.zeros((len(opcodes), 2 * THREADS), np.uint64)
    lines = ["mad.wide.u32 %rd40, %r2, 16, %rd50", "mad.wide.u32 %rd41, %r2, 16, %rd51"]
    lines += ["shl.b32 %r40, %r2, 4", "ld.global.v2.b64 {%rd42, %rd43}, [%rd40]"]
    lines += ["st.shared.v2.b64 [%r40], {%rd42, %rd43}"]
    for opcode in opcodes:
        size, count = parts(opcode)
        register = {1: "%rs4", 2: "%rs4", 4: "%r5", 8: "%rd4"}[size]
        names = [f"{register}{4 + n}" for n in range(count)]
        several = f"{{ {', '.join(names)} }}" if count > 1 else names[0]
        plain = f"{f'.v{count}' * (count > 1)}.b{8 * size}"
        where = "[%r40]" if space == "shared" else "[ %rd40 + 0 ]"
        if tried == "ld":
            lines += [f"{opcode} {several}, {where}", f"st.global{plain} [%rd41], {several}"]
        else:
            lines.append(f"ld.global{plain} {several}, [%rd40]")
            if space == "global":
                lines.append(f"{opcode} [ %rd41 + 0 ], {several}")
            else:
                beside = f"[%r40+{16 * THREADS}]"
                lines += [f"{opcode} {beside}, {several}", f"ld.shared{plain} {several}, {beside}"]
                lines.append(f"st.global{plain} [%rd41], {several}")
        lines.append(f"add.s64 %rd41, %rd41, {16 * THREADS}")
    _, report = executed("\n".join(lines), [], [], shared=32 * THREADS, further=[source, found])
    for opcode, got in zip(opcodes, found, strict=True):
        size, count = parts(opcode)
        wanted = source.view(np.uint8).reshape(THREADS, 16).copy()
        wanted[:, size * count :] = 0
        assert got.view(np.uint8).tolist() == wanted.ravel().tolist(), opcode
    assert not report.races


@pytest.mark.parametrize("space", ["shared", "global"])
def test_a_narrow_load_fills_a_wide_register(space):
    """Zeros, or the sign of a signed type."""
    for kind in ("s8", "u8", "s16", "u16", "s32", "u32"):
        bits = int(kind[1:])
        (values,) = drawn(f"b{bits}", 1)
        setup = f"mad.wide.u32 %rd40, %r2, {bits // 8}, %rd50\nmul.lo.u32 %r40, %r2, {bits // 8}"
        where = "[%rd40]" if space == "global" else "[%r40]"
        body = f"{setup}\nst.shared.b{bits} [%r40], a\nld.{space}.{kind} d, {where}"
        (got,), _ = executed(body, [(f"b{bits}", values)], ["b64"], shared=512, further=[values])
        signs = [x - 2**bits * (kind[0] == "s" and x >> (bits - 1)) for x in values.tolist()]
        assert got.tolist() == [x % 2**64 for x in signs], kind


@pytest.mark.parametrize("space", ["shared", "global"])
def test_a_false_guard_leaves_memory_and_registers(space):
    values, guard = drawn("b32", 1)[0], np.arange(THREADS) % 3 != 1
    memory = np.full(THREADS, 5, np.uint32)
    where = "[%rd40]" if space == "global" else "[%r40]"
    body = f"""
    setp.ne.b32 %p40, b, 0
    mad.wide.u32 %rd40, %r2, 4, %rd50
    shl.b32 %r40, %r2, 2
    st.shared.b32 [%r40], 5
    mov.b32 d, 7
    @%p40 st.{space}.b32 {where}, a
    @%p40 ld.{space}.b32 d, {where}
    ld.{space}.b32 x, {where}
    """
    inputs = [("b32", values), ("b32", guard.astype(np.uint32))]
    (got, after), _ = executed(body, inputs, ["b32", "b32"], shared=512, further=[memory])
    assert got.tolist() == np.where(guard, values, 7).tolist()
    assert after.tolist() == np.where(guard, values, 5).tolist()


@pytest.mark.parametrize(
    ("name", "declared", "given", "wanted"),
    [
        *((kind, "u32", -5, 0xFFFFFFFB) for kind in ("b32", "u32")),
        *((kind, "f32", 0.1, 0x3DCCCCCD) for kind in ("b32", "f32")),
        *((kind, "u64", 2**40 + 1, 2**40 + 1) for kind in ("b64", "u64", "s64")),
        *((kind, "f64", 0.1, 0x3FB999999999999A) for kind in ("b64", "f64")),
        *((kind, "u16", 0x8001, 0x8001) for kind in ("b16", "u16")),
        *((kind, "u8", 0x81, 0x81) for kind in ("b8", "u8")),
        ("s32", "u32", -5, 2**64 - 5),
        ("s16", "u16", -5, 2**64 - 5),
        ("s8", "u8", -5, 2**64 - 5),
    ],
)
def test_parameter(name, declared, given, wanted):
    """Its bits; in a wider register zeros before them, or the sign."""
    kind = "b32" if name in ("b32", "u32", "f32") else "b64"
    text = kernel(f"ld.param.{name} d, [_small_kernel_param_1]", [], [kind])
    text = text.replace("\n)\n", f",\n\t.param .{declared} _small_kernel_param_1\n)\n")
    out = torch.zeros(THREADS, dtype=torch.int64 if kind == "b64" else torch.int32)
    launch(text, [out, given], (1,), warps=4, shared=0)
    assert {x % 2 ** int(kind[1:]) for x in out.tolist()} == {wanted}


def test_moves_into_parts():
    """The first part of a vector is the lowest."""
    (low, high), (wide,) = drawn("b16", 2), drawn("b64", 1, 1)
    got, _ = executed(
        "mov.b32 d, {a, b}; mov.b32 {%rs40, %rs41}, d; mov.b16 x, %rs41; "
        "mov.b64 {%r40, %r41}, c; mov.b64 y, {%r41, %r40}",
        [("b16", low), ("b16", high), ("b64", wide)],
        ["b32", "b16", "b64"],
    )
    joined = high.astype(np.uint32) << 16 | low
    assert got[0].tolist() == joined.tolist() and got[1].tolist() == high.tolist()
    assert got[2].tolist() == [x >> 32 | (x & 0xFFFFFFFF) << 32 for x in wide.tolist()]


def test_special_registers():
    """Of 3 programs of 128 threads."""
    got, _ = executed(
        "mov.u32 d, %laneid; mov.u32 x, %nctaid.x; mov.u32 y, %ctaid.y; mov.u32 z, %ntid.x",
        [("b32", np.zeros(3 * THREADS, np.uint32))],
        ["b32"] * 4,
    )
    count = 3 * THREADS
    assert [x.tolist() for x in got] == [
        [n % 32 for n in range(count)],
        [3] * count,
        [0] * count,
        [THREADS] * count,
    ]


# ----------------------------------------------------------------------------- asynchronous copies

COPY = """
ld.param.b64 %rd40, [_small_kernel_param_0]
mad.wide.u32 %rd40, %r2, 4, %rd40
shl.b32 %r40, %r2, 2
"""


def copies(*groups: str, space: str = "shared") -> str:
    """A group of a copy each, to 512 bytes of its own."""
    return "\n".join(
        f"add.s32 %r41, %r40, {THREADS * 4 * n}\n"
        f"cp.async.ca.{space}.global [ %r41 + 0 ], [ %rd40 + 0 ], 0x4{size}\ncp.async.commit_group"
        for n, size in enumerate(groups)
    )


@pytest.mark.parametrize("order", [None, "up", "down", "random"])
@pytest.mark.parametrize("newest", [0, 1, 2])
def test_wait_lands_all_but_the_newest(newest, order):
    (values,) = drawn("b32", 1)
    for read in range(3):
        space = "shared" if order else "shared::cta"
        body = f"{COPY}{copies('', '', '', space=space)}\ncp.async.wait_group {newest}\n"
        body += f"ld.shared.b32 d, [%r40+{THREADS * 4 * read}]\ncp.async.wait_group 0"
        arguments = (body, [("b32", values)], ["b32"])
        if read < 3 - newest:
            (got,), report = executed(*arguments, shared=THREADS * 12, order=order)
            assert got.tolist() == values.tolist() and not report.races
        else:
            with pytest.raises(Fault, match="under way"):
                executed(*arguments, shared=THREADS * 12, order=order)


def test_copies_of_no_group_wait_for_the_next():
    """What is not committed is of the group that comes: no wait_group lands it, wait_all does."""
    (values,) = drawn("b32", 1)
    copy = f"{COPY}cp.async.ca.shared.global [ %r40 + 0 ], [ %rd40 + 0 ], 0x4\n"
    read = "ld.shared.b32 d, [%r40]\ncp.async.wait_all"
    with pytest.raises(Fault, match="under way"):
        executed(
            f"{copy}cp.async.wait_group 0\n{read}", [("b32", values)], ["b32"], shared=THREADS * 4
        )
    (got,), _ = executed(
        f"{copy}cp.async.wait_all\n{read}", [("b32", values)], ["b32"], shared=THREADS * 4
    )
    assert got.tolist() == values.tolist()


@pytest.mark.parametrize("space", ["shared", "shared::cta"])
def test_copy_of_nothing_fills_with_zeros(space):
    """A source size of 0 reads nothing, not even out of bounds; 16 bytes at a time."""
    (values,) = drawn("b32", 1)
    size = np.where(np.arange(THREADS) % 2, 16, 0).astype(np.uint32)
    body = f"""
    ld.param.b64 %rd40, [_small_kernel_param_0]
    mad.wide.u32 %rd40, %r2, 16, %rd40
    setp.eq.b32 %p40, b, 0
    @%p40 add.s64 %rd40, %rd40, 1048576
    setp.lt.u32 %p41, %r2, 32
    shl.b32 %r40, %r2, 4
    @%p41 cp.async.cg.{space}.global [ %r40 + 0 ], [ %rd40 + 0 ], 0x10, b
    cp.async.commit_group
    cp.async.wait_group 0
    bar.sync 0
    shl.b32 %r41, %r2, 2
    ld.shared.b32 d, [%r41]
    """
    (got,), _ = executed(body, [("b32", values), ("u32", size)], ["b32"], shared=512)
    kept = np.repeat(np.arange(32) % 2, 4).astype(np.uint32)
    assert got.tolist() == (values * kept).tolist()


def test_a_copy_from_no_tensor_is_a_fault():
    (values,) = drawn("b32", 1)
    with pytest.raises(Fault, match="which is no tensor"):
        body = f"{COPY}mov.b64 %rd40, 0\n{copies('')}\ncp.async.wait_all"
        executed(body, [("b32", values)], ["b32"], shared=THREADS * 4)


@pytest.mark.parametrize("far", [0, 256])
def test_a_source_stays_as_it_is_until_its_copy_has_landed(far):
    """Written by the thread itself behind the wait, in front of it, or by another warp there."""
    (values,) = drawn("b32", 1)
    write = f"xor.b32 %r42, %r40, {far}\ncvt.u64.u32 %rd41, %r42\n"
    write += "ld.param.b64 %rd42, [_small_kernel_param_0]\nadd.s64 %rd41, %rd42, %rd41\n"
    write += "st.global.b32 [%rd41], %r2\n"
    wait = "cp.async.wait_all\nbar.sync 0\n"
    read = "ld.shared.b32 d, [%r40]"
    arguments = ([("b32", values.copy())], ["b32"])
    (got,), report = executed(
        f"{COPY}{copies('')}\n{wait}{write}{read}", *arguments, shared=THREADS * 4
    )
    assert got.tolist() == values.tolist() and not report.races
    with pytest.raises(Fault, match="written while a copy of them is under way"):
        executed(f"{COPY}{copies('')}\n{write}{wait}{read}", *arguments, shared=THREADS * 4)


def test_another_warp_sees_a_copy_after_the_barrier():
    """A wait is of the thread's own copies; without the barrier it is a race."""
    (values,) = drawn("b32", 1)
    for barrier in (True, False):
        body = f"{COPY}{copies('')}\ncp.async.wait_group 0\n{'bar.sync 0' * barrier}\n"
        body += "xor.b32 %r42, %r40, 256\nld.shared.b32 d, [%r42]"
        (got,), report = executed(body, [("b32", values)], ["b32"], shared=THREADS * 4)
        assert bool(report.races) != barrier
        if barrier:
            assert got.tolist() == np.roll(values, 64).tolist()


# ---------------------------------------------------------------------------------------- barriers


@pytest.mark.parametrize("order", [None, "up", "down", "random"])
@pytest.mark.parametrize("name", ["bar", "barrier", "barrier.cta"])
def test_barrier_parts_writes_from_reads(name, order):
    (values,) = drawn("b32", 1)
    for barrier in (True, False):
        line = f"{name}.sync 0" * barrier
        body = f"shl.b32 %r40, %r2, 2\nst.shared.b32 [%r40], a\n{line}\n"
        body += "xor.b32 %r42, %r40, 256\nld.shared.b32 d, [%r42]"
        (got,), report = executed(body, [("b32", values)], ["b32"], shared=THREADS * 4, order=order)
        assert bool(report.races or report.unwritten) != barrier
        if barrier:
            assert got.tolist() == np.roll(values, 64).tolist()


def test_lanes_of_a_warp_need_no_barrier():
    (values,) = drawn("b32", 1)
    body = "shl.b32 %r40, %r2, 2\nst.shared.b32 [%r40], a\nbar.warp.sync -1\n"
    body += "xor.b32 %r42, %r40, 64\nld.shared.b32 d, [%r42]"
    (got,), report = executed(body, [("b32", values)], ["b32"], shared=THREADS * 4)
    assert got.tolist() == values.reshape(-1, 2, 16)[:, ::-1].ravel().tolist()
    assert not report.races


# ------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.shared.b32 d, [%r2+1]", "misaligned"),
        ("shl.b32 %r40, %r2, 2; ld.shared.b32 d, [%r40+4]", "out of bounds"),
        ("mad.wide.u32 %rd40, %r3, 4, %rd50; ld.global.b32 { d }, [ %rd40 + 4 ]", "out of bounds"),
        ("mov.u64 %rd40, 0; ld.global.b32 { d }, [ %rd40 + 0 ]", "no tensor"),
        ("mov.u32 %r40, 0; st.shared.b32 [%r40], %r2; mov.b32 d, 0", "different values"),
    ],
)
def test_fault(body, message):
    with pytest.raises(Fault, match=message):
        executed(body, [], ["b32"], shared=4 * THREADS, further=[np.zeros(THREADS, np.uint32)])


@pytest.mark.parametrize(
    "line",
    [
        "add.rz.f32 d, d, d",
        "cvt.rz.f16.f32 %rs40, d",
        "add.f16 d, d, d",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {d}, {d}, {d}, {d}",
        "bar.sync 1",
        "frobnicate.b32 d, d",
    ],
)
def test_what_is_unknown_is_named(line):
    """Neither skipped nor taken for something like it."""
    with pytest.raises(NotImplementedError, match=line.split()[0].split(".")[0]):
        executed(line, [], ["b32"])
