"""The machine: a fold of bf16, whatever the order of its warps, and each kind of fault."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from machines import is_harmless

pytest.importorskip("triton")

from emulator import Fault, emulated, launch  # noqa: E402

from fused_prefopt import kernels  # noqa: E402
from fused_prefopt.kernels.architectures import ARCHITECTURES  # noqa: E402
from fused_prefopt.kernels.fold_logits import fold_logits, merge_partials  # noqa: E402

PRODUCT = "sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
HEAD = """
.version 8.7
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry tried(
    .param .u64 .ptr .global .align 1 tried_param_0,
    .param .u32 tried_param_1
)
.reqntid 64
{
    .reg .pred %p<8>;
    .reg .b32 %r<16>;
    .reg .b64 %rd<8>;
    .loc 1 7 5 // tried.py:7:5
    ld.param.b64 %rd1, [tried_param_0];
    ld.param.b32 %r9, [tried_param_1];
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    cvt.u64.u32 %rd2, %r2;
    add.s64 %rd3, %rd1, %rd2;
    xor.b32 %r3, %r2, 128;
    setp.lt.u32 %p1, %r1, 32;
    setp.lt.u32 %p2, %r1, 5;
    and.b32 %r8, %r2, 64;
    setp.eq.b32 %p3, %r8, 0;
"""


def tried(body: str, *, numbers: int = 64, programs: int = 1, order: str | None = None):
    """The report of two warps that start from HEAD, and the 64 numbers they were given."""
    given = torch.arange(numbers, dtype=torch.int32)
    text = f"{HEAD}{body}\nret;\n}}\n"
    return launch(text, [given, 3], (programs,), warps=2, shared=256, order=order), given


@pytest.mark.parametrize("order", [None, "up", "down", "random"])
def test_warps_exchange_numbers_through_shared_memory(order):
    body = """
        ld.global.b32 %r4, [%rd3];
        st.shared.b32 [%r2], %r4;
        bar.sync 0;
        ld.shared.b32 %r5, [%r3];
        mad.lo.s32 %r5, %r5, 10, %r9;
        @%p2 mov.b32 %r5, 7;
        st.global.b32 [%rd3], %r5;
    """
    report, found = tried(body, order=order)
    wanted = (torch.arange(64) ^ 32) * 10 + 3
    wanted[:5] = 7
    assert found.tolist() == wanted.tolist()
    assert not report.races and not report.unwritten


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("ld.global.b32 %r4, [%rd3+4];", r"out of bounds: 4 bytes at offset 256 .*tried\.py:7:5"),
        ("ld.global.b32 %r4, [%rd2];", "which is no tensor"),
        ("st.shared.b32 [%r2+4], %r1;", "out of bounds: 4 shared bytes at 256 of 256"),
        ("ld.global.b64 %rd4, [%rd1+4];", "misaligned global access of 8 bytes"),
        ("ld.shared.b32 %r4, [%r2+2];", "misaligned shared access of 4 bytes"),
        ("st.shared.b32 [global_smem], %r1;", "different values to one shared address"),
        ("st.global.b32 [%rd1], %r1;", "different values to one global address"),
        ("@%p1 bar.sync 0;", "barrier that not all threads reach together"),
        ("@%p2 bar.warp.sync -1;", "warp instruction that some lanes of a warp do not reach"),
        (
            "@%p2 bra there; shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1; there:",
            "a branch at which the threads of a warp part: @%p2 bra there",
        ),
        (
            "@%p2 bra.uni there; add.s32 %r4, %r1, 1; there:",
            "a branch at which the threads of a warp part: @%p2 bra.uni there",
        ),
        (
            """cp.async.ca.shared.global [%r2], [%rd3], 4;
            cp.async.commit_group;
            ld.shared.b32 %r4, [%r2];""",
            "shared bytes read while a copy to them is under way",
        ),
        (
            """cp.async.ca.shared.global [%r2], [%rd3], 4;
            cp.async.commit_group;""",
            "ended with 64 copies under way",
        ),
        (
            f"mma.{PRODUCT} {{%r4,%r5,%r6,%r7}},{{%r4,%r5}},{{%r4}},{{%r4,%r5,%r6,%r7}};",
            "mma of 2, 1 and 4 registers",
        ),
        (
            f"mma.{PRODUCT} {{%r4,%r5}},{{%r4,%r5,%r6,%r7}},{{%r4,%r5}},{{%r4,%r5,%r6,%r7}};",
            "mma with 2 results",
        ),
    ],
)
def test_what_a_gpu_would_not_forgive_is_a_fault(body, says):
    with pytest.raises(Fault, match=says):
        tried(body)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("fns.b32 %r4, %r1, 0, 1;", r"fns\.b32 .*tried\.py:7:5.*no such opcode"),
        ("add.rz.f32 %r4, %r1, %r1;", r"add\.rz\.f32"),
        ("ld.volatile.global.b32 %r4, [%rd3];", r"ld\.volatile"),
        ("add.s32 %r4, %r1, %rd1;", "register %rd1 of 8 bytes as s32"),
        ("add.s32 %r4, %r1;", "too few operands"),
        ("add.s32 %r4, %r1, %r1, %r1;", "too many operands"),
        ("mov.u32 %r4, %clock;", "%clock"),
        ("bar.sync 1;", "a barrier other than 0"),
        ("shfl.sync.bfly.b32 %r4, %r1, 1, 31, 15;", "a part of a warp"),
        (".local .b32 %r77;", r"\.local"),
        ("@%r1 add.s32 %r4, %r1, 1;", "@%r1 is no predicate"),
        ("setp.lt.s32 %p4|%p5, %r1, 5;", "a pair as a result"),
        ("add.s32 %r4, %r1, 4294967296;", "the number 4294967296 as s32"),
        ("ld.global.v4.b32 {%r4, %r5}, [%rd1];", "2 values, wanted 4"),
        ("ld.global.b32 {%r4, %r5}, [%rd1];", "2 values, wanted 1"),
        ("st.shared.v2.b32 [%r3], %r1;", "1 values, wanted 2"),
        ("mov.b32 {%r4, %r5, %r6}, %r1;", "3 parts of b32"),
        ("@%p2 fence.proxy.async.shared::cta;", "a proxy fence of a part of a warp"),
    ],
)
def test_what_is_not_known_is_refused(body, says):
    with pytest.raises(NotImplementedError, match=says):
        tried(body)


def test_a_module_of_two_entries_is_refused():
    with pytest.raises(NotImplementedError, match="2 entries"):
        tried("ret; } .visible .entry other() {".replace("}", "\n}\n"))


def test_arguments_that_are_not_there_or_do_not_fit():
    given, text = torch.arange(64, dtype=torch.int32), f"{HEAD}ret;\n}}\n"
    with pytest.raises(Fault, match="no argument was given for tried_param_1"):
        launch(text, [given], (1,), warps=2, shared=256)
    with pytest.raises(ValueError, match="tried_param_1: got 4294967296, wanted a number of 32"):
        launch(text, [given, 1 << 32], (1,), warps=2, shared=256)
    text = text.replace(".reqntid 64", ".reqntid 64, 2")
    with pytest.raises(ValueError, match="got 2 warps, wanted 128 threads"):
        launch(text, [given, 3], (1,), warps=2, shared=256)


@pytest.mark.parametrize("order", [None, "up", "down", "random"])
def test_warps_come_to_a_barrier_from_either_side_of_it(order):
    body = """
        @%p1 bra meet;
        bra later;
    meet:
        st.shared.b32 [%r2], %r1;
        bar.sync 0;
        ld.shared.b32 %r5, [%r3];
        st.global.b32 [%rd3], %r5;
        bra done;
    later:
        add.s32 %r1, %r1, 1;
        bra meet;
    done:
    """
    report, found = tried(body, order=order)
    lanes = torch.arange(64) ^ 32
    assert found.tolist() == (lanes + (lanes >= 32)).tolist()
    assert not report.races and not report.unwritten


def test_bytes_that_nothing_was_written_to_are_listed():
    report, found = tried("ld.shared.b32 %r4, [%r2]; st.global.b32 [%rd3], %r4;")
    assert len(report.unwritten) == 1
    # NaN, of any type.
    assert (found == -1).all()


@pytest.mark.parametrize(
    ("body", "programs", "says"),
    [
        ("st.shared.b32 [%r2], %r1; ld.shared.b32 %r4, [%r3];", 1, "has just written"),
        ("ld.shared.b32 %r4, [%r3]; st.shared.b32 [%r2], %r1;", 1, "may still read"),
        ("st.global.b32 [%rd3], %r1;", 2, "what another program of the launch wrote"),
        ("ld.global.b32 %r4, [%rd3]; st.global.b32 [%rd3], %r4;", 2, "another program reads"),
    ],
)
def test_races_are_listed(body, programs, says):
    report, _ = tried(body, programs=programs)
    assert any(says in race for race in report.races)


def test_the_threads_of_a_warp_part_where_nothing_needs_them_together():
    body = """
        mov.b32 %r4, 0;
    again:
        add.s32 %r4, %r4, 1;
        setp.lt.u32 %p4, %r4, %r1;
        @%p4 bra again;
        @%p3 bra even;
        mul.lo.s32 %r4, %r4, -1;
    even:
        shfl.sync.idx.b32 %r5, %r4, 31, 31, -1;
        add.s32 %r4, %r4, %r5;
        st.global.b32 [%rd3], %r4;
    """
    _, found = tried(body)
    lanes = torch.arange(64)
    alone = lanes.clamp(min=1) * torch.where(lanes & 16 == 0, 1, -1)
    assert found.tolist() == (alone + alone[lanes | 31]).tolist()


@pytest.mark.parametrize("shape", [(137, 301, 128), (130, 270, 208)])
def test_a_fold_with_the_tile_of_the_architecture(shape):
    rows, vocab, depth = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, depth, generator=generator).bfloat16()
    weight = (torch.randn(vocab, depth, generator=generator) / 4).bfloat16()
    targets = torch.randint(vocab, (rows,), generator=generator)
    found = []
    for order in (None, "up", "down"):
        maximum = torch.full((rows,), torch.finfo(torch.float32).min)
        total, target_logit = torch.zeros(2, rows)
        with emulated(order=order) as log:
            partials = fold_logits(
                hidden,
                weight,
                None,
                targets,
                target_logit,
                alpha=1.0,
                ceiling=None,
                block=ARCHITECTURES[0].plain,
                descriptors=False,
            )
            merge_partials(partials, maximum, total)
        assert log.names == ["_fold_logits_kernel", "_merge_partials_kernel"]
        assert log.reports[0].copied and not log.races and not log.unwritten
        found.append(torch.stack([maximum, total, target_logit]))
    logits = hidden.double() @ weight.double().t()
    logsumexps = found[0][0].double() + found[0][1].double().log()
    assert (logsumexps - logits.logsumexp(1)).abs().max() <= 1e-5
    wanted = logits.gather(1, targets[:, None])[:, 0]
    assert (found[0][2] - wanted).abs().max() <= 1e-5
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("called", ["", " @[ a.py:1:2 ]", " @[ a.py:1:2 @[ b.py:3:4 ] ]"])
def test_an_instructions_place_is_its_own_line(called):
    """Older Tritons say from where a function was called, too."""
    place = f".loc 1 171 24 // loss_parts.py:171:24{called}"
    with pytest.raises(Fault, match=r"misaligned .*  \[loss_parts\.py:171:24\]$"):
        tried(f"add.s32 %r3, %r3, 1;\n{place}\nld.shared.b32 %r4, [%r3];")


def test_races_are_harmless_by_the_numbers_of_their_line():
    lines = Path(kernels.__path__[0], "loss_parts.py").read_text(encoding="utf-8").splitlines()
    (count,) = (n for n, line in enumerate(lines, 1) if "tl.store(nonfinite, " in line)
    (average,) = (n for n, line in enumerate(lines, 1) if "tl.store(average, " in line)

    def race(kind: str, line: int) -> str:
        place = f"[loss_parts.py:{line}:7]"
        return f"{kind} bytes another warp may still read: st.global.b64 [%rd1], %rd2  {place}"

    assert is_harmless(race("global", count))
    assert not is_harmless(race("global", average)) and not is_harmless(race("shared", count))
