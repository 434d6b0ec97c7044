"""Our kernels as they are compiled for sm_90, executed; and planted mistakes in one of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

triton = pytest.importorskip("triton")

from emulator import Fault, Log, emulated, launches  # noqa: E402
from hopper_kernels import Edit, replaced  # noqa: E402
from machines import EVERYTHING  # noqa: E402

from fused_prefopt.kernels.architectures import ARCHITECTURES, Block  # noqa: E402
from fused_prefopt.kernels.fold_logits import fold_logits, merge_partials  # noqa: E402

BF16, FP16 = torch.bfloat16, torch.float16


@contextmanager
def compiled_otherwise(edit: Edit) -> Iterator[None]:
    """Kernels that use wgmma are executed as `edit` leaves them."""
    original = launches.compiled

    def compiled(launch, target):
        text, shared = original(launch, target)
        return (edit(text) if "wgmma" in text else text), shared

    launches.compiled = compiled
    try:
        yield
    finally:
        launches.compiled = original


def fold(
    shape: tuple[int, int, int], dtype: torch.dtype, block: Block, descriptors: bool, **options
) -> tuple[float, Log]:
    """The largest error of (rows,) log-sum-exps and target logits, and the log."""
    rows, vocab, depth = shape
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, depth).to(dtype), torch.randn(vocab, depth)
    weight = (weight * 25 / (hidden.double() @ weight.double().t()).abs().max()).to(dtype)
    targets, logits = torch.randint(vocab, (rows,)), hidden.double() @ weight.double().t()
    maximum, total, target = torch.full((rows,), -3e38), torch.zeros(rows), torch.zeros(rows)
    with emulated("sm_90", **options) as log:
        partials = fold_logits(
            hidden,
            weight,
            None,
            targets,
            target,
            alpha=1.0,
            ceiling=None,
            block=block,
            descriptors=descriptors,
        )
        merge_partials(partials, maximum, total)
    sums = maximum.double() + total.double().log() - logits.logsumexp(1)
    errors = torch.stack([sums, target - logits.gather(1, targets[:, None])[:, 0]])
    return float(errors.abs().max()), log


SM_90 = next(found for found in ARCHITECTURES if found.name == "sm_90")
NARROW = Block(rows=64, vocab=64, depth=32, group=8, warps=4, stages=2)  # a swizzle of 64
SMALL = Block(rows=16, vocab=32, depth=16, group=2, warps=4, stages=2)  # boxes, and mma
FOLDS = [
    # dtype, (rows, vocabulary, depth), block, descriptors, order
    (BF16, (137, 301, 448), SM_90.plain, True, None),
    (BF16, (137, 301, 448), SM_90.plain, True, "random"),
    (FP16, (137, 301, 200), SM_90.rich, True, "random"),
    (FP16, (70, 131, 72), NARROW, True, "down"),
    (FP16, (70, 131, 64), NARROW, False, "random"),  # cp.async, and a fence behind the barrier
    (BF16, (70, 131, 77), NARROW, True, None),  # no descriptors for odd strides: ordinary stores
    (BF16, (37, 131, 48), SMALL, True, "up"),
]
if EVERYTHING:
    every = itertools.product(
        (BF16, FP16, torch.float32),
        [(137, 301, 128), (137, 301, 200), (137, 301, 77), (7, 13, 16), (260, 520, 448)],
        (SM_90.plain, SM_90.rich, NARROW, SMALL),
        (True, False),
    )
    orders = itertools.cycle((None, "up", "random", "down", "random"))
    FOLDS += [
        (*case, next(orders)) for case in every if case[0].itemsize == 2 or case[2].rows <= 64
    ]


# Tritons before 3.9, seen of 3.4 and 3.6, put no fence between cp.async and wgmma. Whole 16 values
# a row are copied by cp.async, others by ordinary stores, for which they do have a fence.
OLDER = not triton.__version__.startswith("3.9.")


@pytest.mark.parametrize(("dtype", "shape", "block", "descriptors", "order"), FOLDS)
def test_folds_compiled_for_sm_90(dtype, shape, block, descriptors, order):
    wgmma, copied = dtype.itemsize == 2 and block.rows >= 64, shape[2] % 16 == 0
    if OLDER and wgmma and copied and not descriptors:
        with pytest.raises(Fault, match="ordinary stores wrote, no fence.proxy.async: wgmma"):
            fold(shape, dtype, block, descriptors, order=order)
        return
    error, log = fold(shape, dtype, block, descriptors, order=order)
    # Sums are rounded to nearest, fp32 at each step of the depth, wgmma and mma at every 16th. Of a
    # logit of 25 that is a walk of σ² = steps / 18 half places (`rounding.logp_bound` derives it);
    # 4 σ are allowed, since what is compared is one logit, or a sum of many that errs less. At
    # small depths all other roundings count.
    steps = shape[2] if dtype.itemsize == 4 else shape[2] / 16
    assert error <= max(5e-6, 4 * (steps / 18) ** 0.5 * 2.0**-24 * 25)
    assert not log.races | log.unwritten


def without_barriers(first: int, count: int) -> Edit:
    """Barriers by their number in the text."""

    def edit(text: str) -> str:
        found = list(re.finditer(r"bar.sync\s+0;", text))
        for one in reversed(found[first : first + count]):
            text = text[: one.start()] + text[one.end() :]
        return text

    return edit


SWIZZLED = "4611686293305294848"  # 128 bytes, 1024 from 8 rows to the next 8
MUTATIONS: dict[str, Edit] = {
    "no wgmma fence": replaced(r"wgmma.fence.sync.aligned;", ""),
    "no wait in the loop": replaced(r"wgmma.wait_group.sync.aligned 1;", ""),
    "a looser wait": replaced(
        r"wgmma.wait_group.sync.aligned 1;", "wgmma.wait_group.sync.aligned 2;"
    ),
    "no last wait": replaced(r"wgmma.wait_group.sync.aligned 0;", ""),
    "no commit": replaced(r"wgmma.commit_group.sync.aligned;", ""),
    "too few bytes": replaced(r"(expect_tx.*), 49152", r"\1, 49136"),
    "too many bytes": replaced(r"(expect_tx.*), 49152", r"\1, 49168"),
    "no sums": replaced(r"mov.pred\s+(%p\d+), -1;", r"mov.pred \1, 0;"),
    "another dtype": replaced(r"\.bf16\.bf16 ", ".f16.f16 "),
}
# Registers, numbers and barriers as Triton 3.9 writes them.
MUTATIONS_OF_THIS_TRITON: dict[str, Edit] = {
    "no mbarrier wait": replaced(r"\tmbarrier.try_wait[^;]*;\s*@!complete bra.uni waitLoop;", ""),
    "another swizzle": replaced(SWIZZLED, str((2 << 62) | 0x4000010000)),
    "no swizzle": replaced(SWIZZLED, str(0x4000010000)),
    "another stride": replaced(SWIZZLED, str(int(SWIZZLED) ^ 0x6000000000)),
    "a shifted descriptor": replaced(r"(or.b64\s+%rd7, %rd19), (\d+)", r"\1, 4611686293305294856"),
    "a step too far": replaced(r"(add.s32\s+%r7[67], %r7[45]), 2;", r"\1, 4;"),
    "a shifted box": replaced(r"(mov.b32\s+%r19), 64;", r"\1, 56;"),
    "a box elsewhere": replaced(r"(add.s32\s+%r20, %r16), 32768;", r"\1, 33792;"),
    "no barriers before the loop": without_barriers(0, 6),
    "no barriers before new boxes": without_barriers(7, 2),
}


def noticed(edit: Edit, order: str | None) -> bool:
    """Whether a fold with a mistake is a fault, has a race, or is wrong."""
    with compiled_otherwise(edit):
        try:
            error, log = fold((70, 301, 320), BF16, SM_90.plain, True, order=order)
        except Fault:
            return True
    return bool(log.races) or not error <= 1e-3


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("order", [None, "random"] if EVERYTHING else [None])
def test_mutations_of_a_compiled_fold_are_noticed(name, order):
    assert noticed(MUTATIONS[name], order)


@pytest.mark.skipif(OLDER, reason="edits know the registers that Triton 3.9 names")
@pytest.mark.parametrize("name", MUTATIONS_OF_THIS_TRITON)
@pytest.mark.parametrize("order", [None, "random"] if EVERYTHING else [None])
def test_mutations_of_this_tritons_fold_are_noticed(name, order):
    assert noticed(MUTATIONS_OF_THIS_TRITON[name], order)


def test_the_fold_that_mutations_change_is_right():
    assert not noticed(lambda text: text, None)
