"""What sm_90 adds: tensor maps, mbarriers, warpgroup products, and the fences between proxies."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from emulator import Fault, Report, launch  # noqa: E402
from emulator.async_proxy import swizzled  # noqa: E402
from emulator.mbarriers import TensorMap  # noqa: E402
from hopper_kernels import BOXES_WARPS, PRODUCT_WARPS, Edit, boxes, product, replaced  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

BF16, FP16 = torch.bfloat16, torch.float16
WIDTHS = [0, 32, 64, 128]


def published_swizzle(address: int, width: int) -> int:
    """CUTLASS's Swizzle<B, 4, 3>: bits 7 … 6 + B, moved by three, are XORed into 4 … 3 + B."""
    bits = {0: 0, 32: 1, 64: 2, 128: 3}[width]
    return address ^ ((address & (((1 << bits) - 1) << 7)) >> 3)


@pytest.mark.parametrize("width", WIDTHS)
def test_swizzles_are_the_published_ones(width):
    address = np.arange(4096)
    wanted = [published_swizzle(int(one), width) for one in address]
    assert np.array_equal(swizzled(address, width), wanted)
    assert len(set(wanted)) == len(wanted)


# ---------------------------------------------------------------------------------------- boxes


def copied(
    matrix: torch.Tensor,
    corner: tuple[int, int],
    box: tuple[int, int],
    width: int,
    *,
    rounds: int = 1,
    edit: Edit = str,
    **options,
) -> tuple[bytes, Report]:
    """The shared bytes of each round's box, and the report."""
    nbytes = box[0] * box[1] * matrix.element_size()
    text, shared = boxes(box[0], nbytes, rounds)
    out = torch.zeros(rounds * nbytes // 4, dtype=torch.int32)
    descriptor = TensorDescriptor.from_tensor(matrix, list(box))
    said = {"swizzle": WIDTHS.index(width), "elem_size": matrix.element_size()}
    said |= {"block_size": list(box), "fp4_padded": False}
    report = launch(
        edit(text),
        [descriptor, out, *corner],
        (1,),
        warps=BOXES_WARPS,
        shared=shared,
        descriptors=[said],
        **options,
    )
    return out.numpy().tobytes(), report


def box_as_published(matrix: torch.Tensor, corner, box, width: int) -> bytes:
    """The box, zeros outside of the matrix, each 16 bytes where the swizzle puts them."""
    padded = torch.zeros(box, dtype=matrix.dtype)
    for row in range(box[0]):
        for column in range(box[1]):
            place = corner[0] + row, corner[1] + column
            if 0 <= place[0] < matrix.shape[0] and 0 <= place[1] < matrix.shape[1]:
                padded[row, column] = matrix[place]
    flat = padded.view(torch.uint8).numpy().tobytes()
    found = bytearray(len(flat))
    for place in range(0, len(flat), 16):
        there = published_swizzle(place, width)
        found[there : there + 16] = flat[place : place + 16]
    return bytes(found)


CORNERS = [(8, 16), (-3, 16), (33, 16), (8, -5), (8, 75), (-9, 90), (40, 0), (-16, -16)]


@pytest.mark.parametrize("width", WIDTHS)
def test_boxes_that_stick_out_on_each_side(width):
    matrix = torch.arange(40 * 96, dtype=torch.float32).to(FP16).view(40, 96)[:, :83]
    wide = width or 64
    box = (2048 // wide, wide // 2)
    for corner in CORNERS:
        found, report = copied(matrix, corner, box, width)
        assert found == box_as_published(matrix, corner, box, width), corner
        assert (report.races, report.unwritten, report.copied) == (set(), set(), 2048)


@pytest.mark.parametrize("order", [None, "up", "down", "random"])
def test_phases_over_several_rounds(order):
    matrix = torch.randn(80, 64).to(BF16)
    found, report = copied(matrix, (4, 0), (16, 64), 128, rounds=5, order=order)
    wanted = [box_as_published(matrix, (4 + 16 * n, 0), (16, 64), 128) for n in range(5)]
    assert found == b"".join(wanted)
    assert not report.races


@pytest.mark.parametrize(
    "changed",
    [
        {"address": 8},
        {"pitch": 24},
        {"shape": (0, 8)},
        {"box": (257, 8)},
        {"box": (8, 12)},
        {"swizzle": 16},
        {"box": (8, 32), "swizzle": 32},
    ],
    ids=str,
)
def test_tensor_maps_that_the_driver_refuses(changed):
    right = {"address": 0, "shape": (8, 8), "pitch": 16, "itemsize": 2, "box": (8, 8), "swizzle": 0}
    TensorMap(**right)
    with pytest.raises(Fault, match="tensor map"):
        TensorMap(**right | changed)


INIT = r"@%p1 mbarrier.init.*?;"
WAIT = r"\tmbarrier.try_wait[^;]*;\s*@!complete bra.uni waitLoop;"
COPY = r"(@%p1 cp.async.bulk\S*\s*)\[%r2\]"
BOX_FAULTS = {
    "not initialised": (INIT, "", "was not initialised"),
    "twice initialised": (rf"({INIT})", r"\1 \1", "init of one that is in use"),
    "no arrivals": (r"(mbarrier.init.*), 1;", r"\1, 0;", "0 arrivals"),
    "arrival missing": (r"(mbarrier.init.*), 1;", r"\1, 2;", "for ever.* lacks 1 of 2 arrivals"),
    "misaligned mbarrier": (r"(add.s32\s+%r4, %r2), 2048", r"\1, 2052", "wanted whole 8"),
    "too few bytes": (r"(expect_tx.*), 2048;", r"\1, 2032;", "more bytes than .* expects"),
    "too many bytes": (r"(expect_tx.*), 2048;", r"\1, 2064;", "for ever.* 2048 of 2064 bytes"),
    "no copy": (r"@%p1 cp.async.bulk[^;]*;", "", "for ever.* bring 0 of 2048"),
    "no expectation": (r"@%p1 mbarrier.arrive.*?;", "", "for ever.* lacks 1 of 1 arrivals"),
    "no wait": (WAIT, "", "read while a bulk copy is under way"),
    "wrong parity": (r"and.b32\s+%r9, %r8, 1", "and.b32 %r9, %r8, 0", "read while a bulk copy"),
    "no reuse": (r"\[%r4\], %r9", "[%r4], 1", "read while a bulk copy is under way"),
    "misaligned box": (COPY, r"add.s32 %r30, %r2, 128; \1[%r30]", "wanted whole 1024 bytes"),
    "box too far": (COPY, r"add.s32 %r30, %r2, 1024; \1[%r30]", "2048 bytes at 1024 of 2064"),
    "no tensor map": (r"\[%rd2, ", "[%rd3, ", "no tensor map"),
    "two copies": (rf"({COPY}[^;]*;)", r"\1 \1", "two bulk copies|more bytes"),
    "written meanwhile": (WAIT, "@%p1 st.shared.b32 [%r2], %r1;", "written while a bulk copy"),
    "mbarrier as memory": (
        r"(\$L__PIECE:)",
        r"\1 @%p1 st.shared.b32 [%r4], %r1;",
        "as plain memory",
    ),
    "invalid too soon": (WAIT, "@%p1 mbarrier.inval.shared::cta.b64 [%r4];", "inval while copies"),
    "no fence": (r"(mov.b32\s+%r8, 0;)", r"\1 st.shared.b32 [%r3+0], %r1;", "no fence.proxy.async"),
    "never waited for": (r"(\$L__PIECE:)", r"ret; \1", None),
}


@pytest.mark.parametrize("name", BOX_FAULTS)
def test_faults_of_bulk_copies(name):
    pattern, by, message = BOX_FAULTS[name]
    matrix = torch.randn(80, 64).to(BF16)
    edit = replaced(pattern, by)
    if message is None:
        wait = replaced(WAIT, "")
        edit, message = (lambda text: wait(replaced(pattern, by)(text))), "ended while a bulk copy"
    with pytest.raises(Fault, match=message):
        copied(matrix, (4, 0), (16, 64), 128, rounds=3, edit=edit)


BOX_RACES = {
    # The first barrier, behind the init; the last, before the next round.
    "init not visible": (r"(init.*\s*)bar.sync\s+0;", r"\1", "before its init is visible"),
    "box still read": (r"bar.sync\s+0;(\s+add.s32\s+%r8)", r"\1", "another warp uses|may still"),
    "one warp waits": (r"(\{\s*\.reg \.pred complete)", r"@!%p4 bra $L__GO; \1", "not waited for"),
}


@pytest.mark.parametrize("name", BOX_RACES)
def test_races_of_bulk_copies(name):
    pattern, by, message = BOX_RACES[name]
    edit = replaced(pattern, by)
    if "GO" in by:
        go = replaced(r"(mov.b32\s+%r10, %r3;)", r"$L__GO: \1")
        less = replaced(r"(setp.eq.b32\s+%p1, %r1, 0;)", r"\1 setp.lt.u32 %p4, %r1, 32;")
        plain = edit
        edit = lambda text: less(go(plain(text)))  # noqa: E731
    matrix = torch.randn(80, 64).to(BF16)
    _, report = copied(matrix, (4, 0), (16, 64), 128, rounds=3, edit=edit)
    assert any(re.search(message, race) for race in report.races), report.races


# ------------------------------------------------------------------------------------- products


def element_place(outer: int, depth: int, width: int, across: bool, offsets) -> int:
    """Byte of an element in CUTLASS's canonical layouts of `make_gmma_desc`, T = 8 values."""
    leading, stride = offsets
    o, k, span = divmod(outer, 8), divmod(depth, 8), max(width, 16)
    if not across:
        # ((8, m), (T, 2)): ((span, SBO), (1, T)), without a swizzle (1, LBO).
        along = 16 if width else leading
        place = o[1] * span + o[0] * stride + 2 * k[1] + k[0] * along
    elif width:
        # ((T, span / 16, m), (8, k)): ((1, T, LBO), (span, SBO)).
        block = divmod(o[0], span // 16)
        place = 2 * o[1] + 16 * block[1] + block[0] * leading + k[1] * span + k[0] * stride
    else:
        # ((T, 1, m), (8, k)): ((1, T, SBO), (T, LBO)).
        place = 2 * o[1] + o[0] * stride + 16 * k[1] + k[0] * leading
    return place


class Operand:
    """A matrix (outer, 16) in shared memory from `base` on, and its descriptor."""

    def __init__(self, outer: int, kind: torch.dtype, width: int, across: bool, base: int) -> None:
        self.values = torch.randn(outer, 16).to(kind)
        eights = -(-outer // 8)
        if across:
            self.offsets = (16 * width, 8 * width) if width else (128 * eights, 128)
            self.nbytes = max(
                1024, 16 * width * -(-outer // (width // 2)) if width else 256 * eights
            )
        else:
            self.offsets = (16, 8 * width) if width else (128, 256)
            self.nbytes = max(1024, 8 * width * eights if width else 256 * eights)
        self.nbytes = -(-self.nbytes // 1024) * 1024
        self.places = [
            [
                published_swizzle(base + element_place(o, k, width, across, self.offsets), width)
                for k in range(16)
            ]
            for o in range(outer)
        ]
        fields = (base >> 4) | (self.offsets[0] >> 4 << 16) | (self.offsets[1] >> 4 << 32)
        self.descriptor = fields | {0: 0, 128: 1, 64: 2, 32: 3}[width] << 62


def multiplied(
    columns: int,
    kind: torch.dtype,
    width: int,
    across: tuple[bool, bool] = (False, False),
    signs: tuple[int, int] = (1, 1),
    keep: bool = True,
    edit: Edit = str,
    **options,
) -> tuple[torch.Tensor, torch.Tensor, Report]:
    """(64, columns) sums of a wgmma, the same in float64, and the report."""
    torch.manual_seed(columns)
    left = Operand(64, kind, width, across[0], 0)
    right = Operand(columns, kind, width, across[1], left.nbytes)
    image = torch.full(((left.nbytes + right.nbytes) // 2,), torch.nan).to(kind)
    for operand in (left, right):
        image[torch.tensor(operand.places) // 2] = operand.values
    start, out = torch.randn(columns // 2, 128), torch.zeros(columns // 2, 128)
    name = {BF16: "bf16", FP16: "f16"}[kind]
    more = ", ".join(map(str, (*signs, *map(int, across))))
    report = launch(
        edit(product(columns, name, 2 * len(image), more)),
        [image, start, out, left.descriptor, right.descriptor, int(keep)],
        (1,),
        warps=PRODUCT_WARPS,
        shared=2 * len(image),
        **options,
    )
    found, wanted = torch.zeros(2, 64, columns)
    # PTX ISA, the figure of D's fragment.
    i, t = torch.meshgrid(torch.arange(columns // 2), torch.arange(128), indexing="ij")
    row = 16 * (t // 32) + t % 32 // 4 + 8 * (i // 2 % 2)
    column = 8 * (i // 4) + 2 * (t % 4) + i % 2
    found[row, column], wanted[row, column] = out, start * keep
    exact = (left.values.double() @ right.values.double().t()) * signs[0] * signs[1]
    return found, wanted.double() + exact, report


PRODUCTS = [(8, 0), (16, 64), (64, 64), (64, 128), (128, 128), (128, 0), (200, 32), (256, 128)]


@pytest.mark.parametrize(("columns", "width"), PRODUCTS)
@pytest.mark.parametrize("order", [None, "random"])
def test_products(columns, width, order):
    for place, kind in enumerate((BF16, FP16)):
        more = {"signs": (-1, 1), "keep": False} if place == (columns // 8) % 2 else {}
        found, wanted, report = multiplied(columns, kind, width, order=order, **more)
        torch.testing.assert_close(found.double(), wanted, rtol=2.0**-23, atol=1e-6)
        assert not report.races | report.unwritten


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("across", [(True, False), (False, True), (True, True)])
def test_transposed_products(width, across):
    found, wanted, _ = multiplied(128, BF16, width, across)
    torch.testing.assert_close(found.double(), wanted, rtol=2.0**-23, atol=1e-6)


PROXY = r"fence.proxy.async.shared::cta;"
FENCE = r"wgmma.fence.sync.aligned;"
MMA = r"(wgmma.mma_async[^;]*;)"
WAITED = r"wgmma.wait_group.sync.aligned 0;"
COMMIT = r"wgmma.commit_group.sync.aligned;"
PRODUCT_FAULTS = {
    "no proxy fence": (PROXY, "", "no fence.proxy.async"),
    "one warp's proxy fence": (
        rf"{PROXY}\s*bar.sync\s+0;",
        "setp.lt.u32 %p5, %r1, 32; bar.sync 0; @!%p5 bra $L__ON;"
        " fence.proxy.async.shared::cta; $L__ON:",
        "no fence.proxy.async",
    ),
    "no fence": (FENCE, "", "without a wgmma.fence"),
    "written behind the fence": (
        rf"({FENCE})",
        r"\1 add.s32 %r100, %r100, 77;",
        "written after wgmma",
    ),
    "written meanwhile": (MMA, rf"\1 mov.b32 %r100, 7; {COMMIT}", "written while a wgmma"),
    "memory written meanwhile": (MMA, r"\1 st.shared.b32 [%r3], %r1;", "may still read them"),
    "no wait": (rf"{COMMIT}\s*{WAITED}", "", "ended while a wgmma"),
    "not committed": (COMMIT, "", "ended while a wgmma"),
    "threads differ": (MMA, r"setp.lt.u32 %p4, %r1, 5; \1", "give different operands"),
    "warps differ": (
        MMA,
        r"setp.lt.u32 %p5, %r1, 32; @%p5 add.s64 %rd5, %rd5, 2; \1",
        "different descr",
    ),
    "not a first row": (MMA, r"add.s64 %rd5, %rd5, 8; \1", "not the first row"),
    "meaningless bits": (MMA, r"or.b64 %rd5, %rd5, 16384; \1", "bits that mean nothing"),
    "out of memory": (MMA, r"add.s64 %rd5, %rd5, 2048; \1", "wgmma reads"),
    "accumulators missing": (r"\{%r100, %r101, ", "{%r101, ", "with 31 accumulators"),
    "sign of 2": (r", 1, 1, 0, 0;", ", 2, 1, 0, 0;", "signs and transpositions"),
}


@pytest.mark.parametrize("name", PRODUCT_FAULTS)
def test_faults_of_products(name):
    pattern, by, message = PRODUCT_FAULTS[name]
    with pytest.raises(Fault, match=message):
        multiplied(64, BF16, 128, edit=replaced(pattern, by))


def test_sums_are_poison_until_they_are_waited_for():
    late = replaced(rf"{WAITED}([^}}]*)ret;", r"\1 wgmma.wait_group.sync.aligned 0; ret;")
    found, _, _ = multiplied(64, BF16, 128, edit=late)
    assert found.isnan().all()


def test_a_proxy_fence_behind_the_barrier_is_one_too():
    swapped = replaced(rf"({PROXY})(\s*bar.sync\s+0;)", r"\2 \1")
    for order in (None, "random"):
        found, wanted, _ = multiplied(64, BF16, 128, edit=swapped, order=order)
        torch.testing.assert_close(found.double(), wanted, rtol=2.0**-23, atol=1e-6)
