"""Loads, stores, asynchronous copies and barriers: bytes that arrive, and those that must not yet."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulator import Fault, launch
from small_kernels import THREADS, executed, kernel

PLACE = "shl.b32 %r40, %r2, 4"  # 16 bytes a thread
LETTERS = {"b8": 1, "b16": 1, "b32": 1, "b64": 1}


def drawn(kind: str, count: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    bits = int(kind[1:])
    return [random.integers(0, 2**bits, THREADS, f"u{bits // 8}") for _ in range(count)]


def braced(letters: str, space: str) -> str:
    return f"{{ {', '.join(letters)} }}" if len(letters) > 1 or space == "global" else letters


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("space", ["shared", "shared::cta", "global"])
@pytest.mark.parametrize(
    ("kind", "count"), [("b8", 1), ("b16", 1), ("b32", 1), ("b32", 2), ("b32", 4), ("b64", 1), ("b64", 2)]
)
def test_store_and_load(kind, count, space, masked):
    """As they were, at any place; where a guard is false, neither memory nor a register changes."""
    values, guard = drawn(kind, count), np.arange(THREADS) % 3 != 1
    vector = f".v{count}" if count > 1 else ""
    if space == "global":
        setup, where = "mad.wide.u32 %rd40, %r3, 16, %rd50", "[ %rd40 + 0 ]"
    else:
        setup, where = PLACE, "[%r40+16]"
    given, taken = braced("abce"[:count], space), braced("dxyz"[:count], space)
    clear = "; ".join(f"mov.{'b16' if kind == 'b8' else kind} {x}, 7" for x in "dxyz"[:count])
    store, load = (f"{name}.{space}{vector}.{kind}" for name in ("st", "ld"))
    body = f"""
    setp.ne.b32 %p40, f, 0
    {setup}
    {clear}
    {f"{store} {where}, {given}" if not masked else f"@%p40 {store} {where}, {given}"}
    {f"@%p40 {load} {taken}, {where}" if masked else f"{load} {taken}, {where}"}
    """
    letters = "abce"[:count]
    further = np.zeros(4 * THREADS, np.uint32)
    inputs = [*((kind, x) for x in values)]
    # The guard is the operand that follows.
    body = body.replace(", f, 0", f", {'abcefg'[count]}, 0")
    got, report = executed(
        body,
        [*inputs, ("b32", guard.astype(np.uint32))],
        [kind] * count,
        shared=16 * THREADS + 16,
        further=[further],
    )
    assert letters
    for found, value in zip(got, values, strict=True):
        wanted = np.where(guard, value, value.dtype.type(7)) if masked else value
        assert found.tolist() == wanted.tolist()
    if space == "global":
        size = values[0].itemsize
        written = further.view(f"u{size}").reshape(THREADS, -1)[:, :count]
        kept = np.stack(values, 1) * (guard[:, None] if masked else True)
        assert written.tolist() == kept.tolist()
    assert not report.races


@pytest.mark.parametrize(
    ("name", "declared", "given", "wanted"),
    [
        ("b32", "u32", -5, 0xFFFFFFFB),
        ("s32", "u32", -5, 2**64 - 5),
        ("b32", "f32", 0.1, 0x3DCCCCCD),
        ("b64", "u64", 2**40 + 1, 2**40 + 1),
        ("b64", "f64", 0.1, 0x3FB999999999999A),
    ],
)
def test_parameter(name, declared, given, wanted):
    """Its bits; `ld.param.s32` into 64 bits takes the sign along."""
    kind = "b64" if "64" in name or wanted > 2**32 else "b32"
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
    assert [x.tolist() for x in got] == [[n % 32 for n in range(count)], [3] * count, [0] * count, [THREADS] * count]


# --------------------------------------------------------------------------------- asynchronous copies

COPY = """
ld.param.b64 %rd40, [_small_kernel_param_0]
mad.wide.u32 %rd40, %r2, 4, %rd40
shl.b32 %r40, %r2, 2
"""


def copies(*groups: str) -> str:
    """A group of a copy each, to 512 bytes of its own."""
    return "\n".join(
        f"add.s32 %r41, %r40, {THREADS * 4 * n}\n"
        f"cp.async.ca.shared.global [ %r41 + 0 ], [ %rd40 + 0 ], 0x4{size}\ncp.async.commit_group"
        for n, size in enumerate(groups)
    )


@pytest.mark.parametrize("order", [None, "up", "down", "random"])
@pytest.mark.parametrize("newest", [0, 1, 2])
def test_wait_lands_all_but_the_newest(newest, order):
    (values,) = drawn("b32", 1)
    for read in range(3):
        body = f"{COPY}{copies('', '', '')}\ncp.async.wait_group {newest}\n"
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
        executed(f"{copy}cp.async.wait_group 0\n{read}", [("b32", values)], ["b32"], shared=THREADS * 4)
    (got,), _ = executed(
        f"{copy}cp.async.wait_all\n{read}", [("b32", values)], ["b32"], shared=THREADS * 4
    )
    assert got.tolist() == values.tolist()


def test_copy_of_nothing_fills_with_zeros():
    """A source size of 0 reads nothing, not even out of bounds; 16 bytes at a time."""
    (values,) = drawn("b32", 1)
    size = np.where(np.arange(THREADS) % 2, 16, 0).astype(np.uint32)
    body = """
    ld.param.b64 %rd40, [_small_kernel_param_0]
    mad.wide.u32 %rd40, %r2, 16, %rd40
    setp.eq.b32 %p40, b, 0
    @%p40 add.s64 %rd40, %rd40, 1048576
    setp.lt.u32 %p41, %r2, 32
    shl.b32 %r40, %r2, 4
    @%p41 cp.async.cg.shared.global [ %r40 + 0 ], [ %rd40 + 0 ], 0x10, b
    cp.async.commit_group
    cp.async.wait_group 0
    bar.sync 0
    shl.b32 %r41, %r2, 2
    ld.shared.b32 d, [%r41]
    """
    (got,), _ = executed(body, [("b32", values), ("u32", size)], ["b32"], shared=512)
    kept = np.repeat(np.arange(32) % 2, 4).astype(np.uint32)
    assert got.tolist() == (values * kept).tolist()


def test_another_warp_sees_a_copy_after_the_barrier():
    """A wait is of the thread's own copies; without the barrier it is a race."""
    (values,) = drawn("b32", 1)
    for barrier in (True, False):
        body = f"{COPY}{copies('')}\ncp.async.wait_group 0\n{'bar.sync 0' * barrier}\n"
        body += f"xor.b32 %r42, %r40, 256\nld.shared.b32 d, [%r42]"
        (got,), report = executed(body, [("b32", values)], ["b32"], shared=THREADS * 4)
        assert bool(report.races) != barrier
        if barrier:
            assert got.tolist() == np.roll(values, 64).tolist()


# ------------------------------------------------------------------------------------------ barriers


@pytest.mark.parametrize("order", [None, "up", "down", "random"])
def test_barrier_parts_writes_from_reads(order):
    (values,) = drawn("b32", 1)
    for barrier in (True, False):
        body = f"shl.b32 %r40, %r2, 2\nst.shared.b32 [%r40], a\n{'bar.sync 0' * barrier}\n"
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


# ---------------------------------------------------------------------------------------------- faults


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
