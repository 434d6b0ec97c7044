"""Small PTX kernels of sm_90: one copies boxes of a matrix, one multiplies with `wgmma`."""

from __future__ import annotations

import re
from collections.abc import Callable

Edit = Callable[[str], str]


def replaced(pattern: str, by: str) -> Edit:
    """An edit of every place in a PTX text that matches, which there must be."""

    def edit(text: str) -> str:
        found, count = re.subn(pattern, by, text)
        assert count, pattern
        return found

    return edit


_HEAD = """
.version 8.7
.target sm_90a
.address_size 64

.extern .shared .align 16 .b8 global_smem[];
.visible .entry {name}(
{parameters}
)
.reqntid {threads}
{{
	.reg .pred 	%p<9>;
	.reg .b32 	%r<399>;
	.reg .b64 	%rd<29>;
	mov.u32 	%r1, %tid.x;
	setp.eq.b32 	%p1, %r1, 0;
	mov.b32 	%r2, global_smem;
	shl.b32 	%r3, %r1, 4;
"""
_BOXES = """
	add.s32 	%r4, %r2, {barrier};
	@%p1 mbarrier.init.shared::cta.b64 [%r4], 1;
	bar.sync 	0;
	mov.b32 	%r5, boxes_param_0;
	cvt.u64.u32 	%rd1, %r5;
	cvta.param.u64 	%rd2, %rd1;
	ld.param.b64 	%rd3, [boxes_param_5];
	ld.param.b32 	%r6, [boxes_param_6];
	ld.param.b32 	%r7, [boxes_param_7];
	mov.b32 	%r8, 0;
$L__ROUND:
	@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], {nbytes};
	@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes
		[%r2], [%rd2, {{%r7, %r6}}], [%r4];
	and.b32 	%r9, %r8, 1;
{{
	.reg .pred complete;
	waitLoop:
	mbarrier.try_wait.parity.shared::cta.b64 complete, [%r4], %r9;
	@!complete bra.uni waitLoop;
}}
	mov.b32 	%r10, %r3;
$L__PIECE:
	add.s32 	%r11, %r2, %r10;
	ld.shared.v4.b32 	{{%r12, %r13, %r14, %r15}}, [%r11];
	cvt.u64.u32 	%rd4, %r10;
	add.s64 	%rd5, %rd3, %rd4;
	st.global.v4.b32 	[%rd5], {{%r12, %r13, %r14, %r15}};
	add.s32 	%r10, %r10, 1024;
	setp.lt.u32 	%p2, %r10, {nbytes};
	@%p2 bra 	$L__PIECE;
	add.s64 	%rd3, %rd3, {nbytes};
	add.s32 	%r6, %r6, {rows};
	bar.sync 	0;
	add.s32 	%r8, %r8, 1;
	setp.lt.u32 	%p3, %r8, {rounds};
	@%p3 bra 	$L__ROUND;
	@%p1 mbarrier.inval.shared::cta.b64 [%r4];
	ret;
}}
"""
BOXES_WARPS = 2


def boxes(rows: int, nbytes: int, rounds: int = 1) -> tuple[str, int]:
    """PTX of (descriptor, out, row, column), and its shared bytes.

    Each round copies a box of `rows` rows, `nbytes` in all, as it lies in shared memory to `out`,
    and goes on below it.
    """
    kinds = [".align 64 .b8 {}[128]", *[".u32 {}"] * 2, *[".u64 {}"] * 3, *[".u32 {}"] * 2]
    parameters = ",\n".join(f"\t.param {k.format(f'boxes_param_{n}')}" for n, k in enumerate(kinds))
    head = _HEAD.format(name="boxes", parameters=parameters, threads=32 * BOXES_WARPS)
    body = _BOXES.format(barrier=nbytes, nbytes=nbytes, rows=rows, rounds=rounds)
    return head + body, nbytes + 16


_PRODUCT = """
	ld.param.b64 	%rd1, [product_param_0];
	ld.param.b64 	%rd2, [product_param_1];
	ld.param.b64 	%rd3, [product_param_2];
	ld.param.b64 	%rd4, [product_param_3];
	ld.param.b64 	%rd5, [product_param_4];
	ld.param.b32 	%r6, [product_param_5];
	setp.ne.b32 	%p4, %r6, 0;
	mov.b32 	%r10, %r3;
$L__PIECE:
	cvt.u64.u32 	%rd6, %r10;
	add.s64 	%rd7, %rd1, %rd6;
	ld.global.v4.b32 	{{%r12, %r13, %r14, %r15}}, [%rd7];
	add.s32 	%r11, %r2, %r10;
	st.shared.v4.b32 	[%r11], {{%r12, %r13, %r14, %r15}};
	add.s32 	%r10, %r10, 2048;
	setp.lt.u32 	%p2, %r10, {nbytes};
	@%p2 bra 	$L__PIECE;
	mul.wide.u32 	%rd8, %r1, 4;
	add.s64 	%rd2, %rd2, %rd8;
	add.s64 	%rd3, %rd3, %rd8;
{start}
	fence.proxy.async.shared::cta;
	bar.sync 	0;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind}
		{{{sums}}}, %rd4, %rd5, %p4, {more};
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
{store}
	ret;
}}
"""
PRODUCT_WARPS = 4


def product(columns: int, kind: str, nbytes: int, more: str = "1, 1, 0, 0") -> str:
    """PTX of (image, start, out, left, right, keep): a 64 by `columns` by 16 product.

    The image of `nbytes` is put into shared memory; `left` and `right` are matrix descriptors.
    Accumulator i of thread t is element (i, t) of `start` and `out`. `more`: signs and
    transpositions.
    """
    kinds = [*[".u64"] * 5, ".u32"]
    parameters = ",\n".join(f"\t.param {k} product_param_{n}" for n, k in enumerate(kinds))
    head = _HEAD.format(name="product", parameters=parameters, threads=32 * PRODUCT_WARPS)
    sums = [f"%r{100 + n}" for n in range(columns // 2)]
    at = [f"%rd{{}}+{512 * n}" for n in range(columns // 2)]
    start = [f"\tld.global.b32 {s}, [{a.format(2)}];" for s, a in zip(sums, at, strict=True)]
    store = [f"\tst.global.b32 [{a.format(3)}], {s};" for s, a in zip(sums, at, strict=True)]
    body = _PRODUCT.format(
        nbytes=nbytes,
        start="\n".join(start),
        columns=columns,
        kind=kind,
        sums=", ".join(sums),
        more=more,
        store="\n".join(store),
    )
    return head + body
