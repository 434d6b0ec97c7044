"""Planted mistakes in compiled kernels: each is a fault, a race or a wrong number.

The PTX of a kernel is changed in one line and executed as usual, in place of the right one. What is
not noticed must be shown to change nothing. A few of each kind in an ordinary run, all of them
with EMULATE=all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import triton
from emulator import Fault, emulated, launches
from loss_cases import random_batch
from problems import LOWEST, problem

from fused_prefopt.kernels import architectures
from fused_prefopt.kernels.architectures import ARCHITECTURES
from fused_prefopt.kernels.fold_logits import fold_logits, merge_partials
from fused_prefopt.kernels.fold_rows import fold_rows
from fused_prefopt.kernels.recompute_gradient import recompute_gradient
from fused_prefopt.kernels.sequence_sums import sequence_sums
from fused_prefopt.loss_kernel import launch_loss
from fused_prefopt.losses import DynamicMargin, LogRatio, PairwiseLoss

EVERYTHING = os.environ.get("EMULATE") == "all"
BF16 = torch.bfloat16
# One rounding to bf16, and what the sums before it are off by.
ROUNDED = {"rtol": 2.0**-8 * 1.01 + 3e-5, "atol": 1e-6}


# ---------------------------------------------------------------------------------- right kernels


def fold_logits_kept() -> None:
    """Two programs each way, more steps than stages, nothing a multiple of the tile."""
    given = problem((133, 150, 336), BF16, transform=(4.0, 30.0), bias=True)
    rows, vocab = given.logits.shape
    block = ARCHITECTURES[0].block(2, rich=True)
    maximum, total, logit = torch.full((rows,), LOWEST), torch.zeros(rows), torch.zeros(rows)
    kept = torch.full((rows, vocab + 3), torch.nan, dtype=BF16)
    operands = (given.hidden, given.weight, given.bias, given.targets, logit)
    tiles = {"block": block, "descriptors": False}
    partials = fold_logits(*operands, **given.head, **tiles, kept=kept[:, :vocab])
    merge_partials(partials, maximum, total)
    assert (maximum.double() + total.double().log() - given.logsumexps).abs().max() <= 1e-5
    assert (logit - given.target_logits).abs().max() <= 1e-5
    above = partials.maximum.double().repeat_interleave(block.vocab, 0)[:vocab].t()
    torch.testing.assert_close(kept[:, :vocab].double(), (given.logits - above).exp(), **ROUNDED)
    assert kept[:, vocab:].isnan().all()


def fold_rows_kept() -> None:
    torch.manual_seed(0)
    products, bias = torch.randn(5, 777) * 9, torch.randn(777).to(BF16)
    products[3] = 200 * torch.rand(777)
    logits = 30 * torch.tanh((products.double() + bias.double()) * 1.3 / 30)
    targets, kept = torch.randint(0, 777, (5,)), torch.full((5, 780), torch.nan, dtype=BF16)
    maximum, total, logit = torch.full((5,), LOWEST), torch.zeros(5), torch.zeros(5)
    more = {"alpha": 1.3 / 30, "ceiling": 30.0, "kept": kept[:, :777]}
    fold_rows(products, bias, targets, maximum, total, logit, **more)
    assert (maximum.double() + total.double().log() - logits.logsumexp(1)).abs().max() <= 1e-5
    assert (logit - logits.gather(1, targets[:, None])[:, 0]).abs().max() <= 1e-5
    wanted = (logits - maximum.double()[:, None]).exp()
    torch.testing.assert_close(kept[:, :777].double(), wanted, **ROUNDED)
    assert kept[:, 777:].isnan().all()


def recomputed_gradient() -> None:
    given = problem((133, 150, 336), BF16, transform=(4.0, 30.0), bias=True)
    rows, vocab = given.logits.shape
    scale, store = torch.randn(rows), torch.full((rows, vocab + 3), torch.nan, dtype=BF16)
    sums = recompute_gradient(
        given.hidden,
        given.weight,
        given.bias,
        given.logsumexps.float(),
        **given.of_targets(scale),
        out=store[:, :vocab],
        **given.head,
        block=ARCHITECTURES[0].block(2, rich=True),
        descriptors=False,
        sums=True,
    )
    wanted = given.gradient(scale)
    found = store[:, :vocab].double()
    size = wanted.abs() * ROUNDED["rtol"] + scale.abs()[:, None] * 1e-7
    assert ((found - wanted).abs() <= size).all()
    assert (sums - wanted.sum(0)).norm() <= 1e-5 * wanted.sum(0).norm()
    assert store[:, vocab:].isnan().all()


def dynamic_pair_loss() -> None:
    """γ-PO with a queue of margins that the second batch draws from."""
    loss = PairwiseLoss(LogRatio(beta=0.5), DynamicMargin(gamma=2.0, tau=5.0, queue_size=400, sample_size=300))
    ours, truth = loss.statistics(), loss.statistics()
    for seed in (0, 1):
        batch = random_batch(2 * 150, seed, torch.float32)
        batch = replace(batch, policy=batch.policy.detach().requires_grad_())
        exact = _doubled(batch)
        got = launch_loss(loss, ours, batch)
        wanted = loss(exact, truth(loss.observe(exact)))
        for name in ("losses", "loss", "rewards", "target_margins"):
            _close(getattr(got, name), getattr(wanted, name))
        (found,) = torch.autograd.grad(got.losses.sum(), batch.policy)
        (right,) = torch.autograd.grad(wanted.losses.sum(), exact.policy)
        _close(found, right)
        for key, value in wanted.metrics.items():
            _close(got.metrics[key], value)
        for key, value in truth.state_dict().items():
            _close(ours.state_dict()[key].nan_to_num(), value.nan_to_num())


def _doubled(batch):
    floats = {
        name: value.detach().double()
        for name, value in vars(batch).items()
        if value is not None and value.is_floating_point()
    }
    return replace(batch, **floats | {"policy": floats["policy"].requires_grad_()})


def _close(got, wanted) -> None:
    torch.testing.assert_close(got.detach().double(), wanted.detach().double(), rtol=1e-6, atol=1e-6)


def summed_sequences() -> None:
    """Of lengths that end in every part of a block of 1024 rows."""
    torch.manual_seed(0)
    lengths = torch.tensor([3, 130, 300, 400, 0, 520, 700, 800, 900, 1020, 1025, 2100])
    ids = torch.arange(12).repeat_interleave(lengths)
    values = torch.randn(len(ids)) * 100
    sums, found = sequence_sums(values, ids, 12, True)
    wanted = torch.zeros(12, dtype=torch.float64).index_add(0, ids, values.double())
    torch.testing.assert_close(sums.double(), wanted, rtol=1e-7, atol=0)
    assert torch.equal(found, lengths)


# Of kernels, and of Triton's own library.
PATHS: dict[str, list[Path]] = {}
for folder in (Path(architectures.__file__).parent, Path(triton.language.__file__).parent):
    for path in folder.glob("*.py"):
        PATHS.setdefault(path.name, []).append(path)

SUBJECTS: dict[str, Callable[[], None]] = {
    "_fold_logits_kernel": fold_logits_kept,
    "_fold_rows_kernel": fold_rows_kept,
    "_recompute_gradient_kernel": recomputed_gradient,
    "_pair_loss_kernel": dynamic_pair_loss,
    "_sequence_sums_kernel": summed_sequences,
}


# --------------------------------------------------------------------------------------- mutations


@dataclass(frozen=True)
class Mutation:
    """One line of a kernel, and what stands there instead.

    Attributes:
        kind: what is wrong.
        line: its place in the PTX, from 0.
        before: the line.
        after: the mistake; empty where the line is dropped.
    """

    kind: str
    line: int
    before: str = field(repr=False)
    after: str

    def applied(self, text: str, instead: str | None = None) -> str:
        lines = text.splitlines()
        assert lines[self.line] == self.before
        lines[self.line] = self.after if instead is None else instead
        return "\n".join(lines) + "\n"


COMPLEMENT = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
COMPLEMENT |= {"ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}


def _further(match: re.Match[str]) -> str:
    """An address one access further on."""
    head, width, kind, rest, offset = match.groups()
    size = 16 if kind is None else int(width or 1) * int(kind) // 8
    return f"{head}{rest}+{int(offset or 0) + size}]"


def _shuffled(match: re.Match[str]) -> str:
    return f"{match[1]}{1 if int(match[2]) >= 16 else 2 * int(match[2])}, "


# Kind → pattern of an instruction, and what becomes of it: one line each.
KINDS: dict[str, tuple[str, str | Callable[[re.Match[str]], str]]] = {
    "barrier dropped": (r"^.*\bbar\.sync\b.*$", ""),
    "wait dropped": (r"(cp\.async\.wait_group\s+)\d+", r"\g<1>63"),
    "wait one later": (
        r"(cp\.async\.wait_group\s+)(\d+)",
        lambda m: f"{m[1]}{int(m[2]) + 1}",
    ),
    "store without its mask": (r"@!?%p\d+ (st\.global)", r"\1"),
    "load without its mask": (r"@!?%p\d+ (ld\.global)", r"\1"),
    "copy without its mask": (r"selp\.b32(\s+%r\d+), 16, 0, %p\d+", r"mov.b32\1, 16"),
    "matrix the other way": (
        r"(ldmatrix\S*?)(\.trans)?(\.shared)",
        lambda m: m[1] + ("" if m[2] else ".trans") + m[3],
    ),
    "product of another type": (r"\bbf16\.bf16\b", "f16.f16"),
    "shuffle of another distance": (r"(shfl\.sync\.\w+\.b32\s+\S+ \S+ )(\d+), ", _shuffled),
    "comparison flipped": (
        rf"\bsetp\.({'|'.join(COMPLEMENT)})\.",
        lambda m: f"setp.{COMPLEMENT[m[1]]}.",
    ),
    "address one further": (
        r"((?:ld|st)\.(?:shared|global)\S*?(?:\.v(\d))?\.b(\d+)|ldmatrix\S+)([^\[]*\[ ?%\w+)(?: ?\+ ?(\d+))? ?\]",
        lambda m: f"{m[1]}{m[4]}+{int(m[5] or 0) + (int(m[2] or 1) * int(m[3]) // 8 if m[3] else 16)}]",
    ),
    "cut off, not rounded": (r"\bcvt\.rn\.bf16", "cvt.rz.bf16"),
}


def mutations(text: str) -> Iterator[Mutation]:
    """All of them, of every kind, but for flipped ends of loops: those are endless."""
    lines = text.splitlines()
    labels = {line.partition(":")[0]: place for place, line in enumerate(lines) if line[:1] == "$"}
    jumps = re.compile(r"\s*@!?(%p\d+) bra\S*\s+(\$\w+);")
    ends = {
        found[1]
        for place, line in enumerate(lines)
        if (found := jumps.match(line)) and labels[found[2]] < place
    }
    for place, line in enumerate(lines):
        code = line.partition("//")[0]
        for kind, (pattern, instead) in KINDS.items():
            changed = re.sub(pattern, instead, code, count=1)
            ended = re.match(r"\s*setp\S+\s+(%p\d+)", code)
            if changed != code and not (kind == "comparison flipped" and ended[1] in ends):
                yield Mutation(kind, place, line, changed)


@dataclass
class Outcome:
    """Why a run is not right; empty where it is."""

    why: str
    races: frozenset[str] = frozenset()


def performed(subject: str, text: str | None = None, instead: str | None = None) -> tuple[Outcome, str]:
    """Run a subject, `instead` in place of the kernel `text`; the outcome, and the kernel's PTX."""
    found, original = [], launches.compiled

    def compiled(launch, target):
        ptx, *more = original(launch, target)
        if launch.name == subject and ptx not in found:
            found.append(ptx)
        return (instead if ptx == text else ptx, *more)

    why, log = "", None
    launches.compiled = compiled
    try:
        torch.manual_seed(0)
        with emulated() as log:
            SUBJECTS[subject]()
    except Fault as fault:
        why = f"fault: {fault}"
    except AssertionError as error:
        why = f"wrong: {str(error).strip()[:200]}"
    finally:
        launches.compiled = original
        launches._CODES.pop(instead, None)
    seen = frozenset(log.races) | {f"unwritten: {one}" for one in log.unwritten}
    return Outcome(why, seen), (found[-1] if found else "")


@cache
def right(subject: str) -> tuple[Outcome, str]:
    outcome, text = performed(subject)
    assert not outcome.why, outcome.why
    return outcome, text


def noticed(subject: str, mutation: Mutation, instead: str | None = None) -> str:
    """How a mutation shows, empty if it does not; `instead` of its line, another one."""
    known, text = right(subject)
    outcome, _ = performed(subject, text, mutation.applied(text, instead))
    new = sorted(outcome.races - known.races)
    return outcome.why or (f"race: {new[0]}" if new else "")


# ------------------------------------------------------------------------ mistakes that change nothing

# Faults wherever a thread executes it.
PROBE = "st.shared.b32 [%r0+1073741824], %r0;"
# What a mistake at a line of source does not change, for a reason of the kernel.
EXPECTED: dict[tuple[str, str], str] = {}


def harmless(subject: str, mutation: Mutation) -> str:
    """Why a mutation changes nothing in this run, empty if that cannot be shown."""
    text = right(subject)[1]
    before = "\n".join(text.splitlines()[: mutation.line])
    before = before.partition("$L__func_begin0")[2]
    if mutation.kind == "barrier dropped" and not re.search(r"\b(st|ld\.shared)\b", before):
        return "nothing has been written before it"
    guard = re.match(r"\s*@(!?)(%p\d+)", mutation.before)
    own = f"@{guard[1]}{guard[2]} " if guard else ""
    if not noticed(subject, mutation, f"{own}{PROBE} {mutation.before}"):
        return "no thread executes it"
    mask = guard or re.match(r".*, 16, 0, ()(%p\d+)", mutation.before)
    if mask and mutation.kind.endswith("without its mask"):
        other = f"@{'' if mask[1] else '!'}{mask[2]} "
        if not noticed(subject, mutation, f"{other}{PROBE} {mutation.before}"):
            return "its mask is true in every thread"
    return EXPECTED.get((mutation.kind, source(text, mutation.line)), "")


@cache
def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@cache
def _sources(text: str) -> list[str]:
    found, current = [], ""
    for line in text.splitlines():
        place = re.search(r"\.loc\s.*// (\w+\.py):(\d+):\d+", line)
        if place:
            (path,) = PATHS[place[1]]
            current = _lines(path)[int(place[2]) - 1].strip()
        found.append(current)
    return found


def source(text: str, line: int) -> str:
    """The line of a kernel's source that a line of its PTX comes from."""
    return _sources(text)[line]


@cache
def chosen(subject: str, copies: int) -> list[Mutation]:
    """Mutations of a subject; of those that a source line's unrolled copies make, so many."""
    text = right(subject)[1]
    alike: dict[tuple[str, str], list[Mutation]] = {}
    for mutation in mutations(text):
        alike.setdefault((mutation.kind, source(text, mutation.line)), []).append(mutation)
    return [one for found in alike.values() for one in found[:: -(-len(found) // copies)]]
