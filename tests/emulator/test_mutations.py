"""Planted mistakes in compiled kernels: each is a fault, a race or a wrong number.

The PTX of a kernel is changed in one line and executed as usual, in place of the right one. What is
not noticed must be shown to change nothing. A few of each kind in an ordinary run, all kinds of all
kernels with EMULATE=all.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")
import torch  # noqa: E402
import triton  # noqa: E402
import triton.language  # noqa: E402
from emulated_kernels import SUBJECTS  # noqa: E402
from emulator import Fault, emulated, launches  # noqa: E402
from machines import EVERYTHING  # noqa: E402

from fused_prefopt.kernels import architectures  # noqa: E402

_SMALL = ("_fold_rows_kernel", "_recompute_gradient_kernel", "_sequence_sums_kernel")
# Of kernels, and of Triton's own library.
PATHS: dict[str, list[Path]] = {}
for folder in (Path(architectures.__file__).parent, Path(triton.language.__file__).parent):
    for path in folder.glob("*.py"):
        PATHS.setdefault(path.name, []).append(path)


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
        r"((?:ld|st)\.(?:shared|global)\S*?(?:\.v(\d))?\.b(\d+)|ldmatrix\S+)"
        r"([^\[]*\[ ?%\w+)(?: ?\+ ?(\d+))? ?\]",
        lambda m: (
            f"{m[1]}{m[4]}+{int(m[5] or 0) + (int(m[2] or 1) * int(m[3]) // 8 if m[3] else 16)}]"
        ),
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


def performed(
    subject: str, text: str | None = None, instead: str | None = None
) -> tuple[Outcome, str]:
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


# -------------------------------------------------------------------- mistakes that change nothing

# Faults wherever a thread executes it.
PROBE = "st.shared.b32 [%r0+1073741824], %r0;"
ALIKE = "threads hold equal values: which of them stores is one"
TWICE = "the loop waits at its end and again at its start: the other wait stays"
RARE = "a branch of exp or log for rare values, or of a log that `where` does not take"
_LEFT = "left = tl.load(left_tile, mask=inside[None, :], other=0.0)"
_SEARCH = "a first row that is too early costs time alone"
_STEPS = {
    ("wait dropped", _LEFT): TWICE,
    ("wait one later", _LEFT): TWICE,
    ("barrier dropped", _LEFT): "between this barrier and the one before, memory is only read",
}
# Of a kernel, a kind of mistake and how a line of source begins: why nothing changes.
EXPECTED: dict[str, dict[tuple[str, str], str]] = {
    "_fold_logits_kernel": _STEPS
    | {("comparison flipped", "tl.store(target_logit + row, found, "): ALIKE},
    "_fold_rows_kernel": {
        ("comparison flipped", "tl.store(maximum + row, new)"): ALIKE,
        ("store without its mask", "tl.store(maximum + row, new)"): ALIKE,
        ("store without its mask", "tl.store(target_logit + row, "): ALIKE,
    },
    "_recompute_gradient_kernel": _STEPS
    | {
        ("comparison flipped", "tl.store(out + entry, stored, "): ALIKE,
        (
            "comparison flipped",
            "return tl.where(square < 0.09, small, 2 * tl.sigmoid(2 * x) - 1)",
        ): "both forms of tanh agree where a gradient is large enough to be seen",
    },
    "_pair_loss_kernel": {
        ("comparison flipped", "tl.store(nonfinite, "): ALIKE,
        ("store without its mask", "tl.store(nonfinite, "): ALIKE,
        ("store without its mask", "tl.store(loss, "): ALIKE,
        ("store without its mask", "tl.store(metrics"): ALIKE,
        (
            "store without its mask",
            "tl.store(details + other, ",
        ): "what is written too far is written again, rightly, behind a barrier",
        ("comparison flipped", "share64 = tl.where("): RARE,
        ("comparison flipped", "decay = tl.exp("): RARE,
        ("comparison flipped", "log1p = tl.where("): RARE,
        (
            "load without its mask",
            "value = tl.load(queue + place, ",
        ): "places beyond the queue read its first, which is still empty",
        (
            "address one further",
            "return core.reduce(input, axis, _sum_combine, ",
        ): "the place in front still holds what adds nothing, and the last one holds nothing",
        (
            "shuffle of another distance",
            "return core.reduce(input, axis, _sum_combine, ",
        ): "the lower word of a float64 is less than what is compared",
        (
            "barrier dropped",
            "tl.debug_barrier()",
        ): "what is appended was read in front of the barrier before",
    },
    "_sequence_sums_kernel": {
        ("comparison flipped", "below = tl.load(ids + middle, "): _SEARCH,
        ("address one further", "below = tl.load(ids + middle, "): _SEARCH,
        ("comparison flipped", "open_ = low < high"): _SEARCH,
        ("comparison flipped", "tl.store(sums + sequence, "): ALIKE,
        ("store without its mask", "tl.store(sums + sequence, "): ALIKE,
        ("store without its mask", "tl.store(lengths + sequence, "): ALIKE,
        (
            "shuffle of another distance",
            "return core.reduce(input, axis, _sum_combine, ",
        ): "the upper word of a count is zero",
    },
}


def harmless(subject: str, mutation: Mutation) -> str:
    """Why a mutation changes nothing in this run, empty if that cannot be shown."""
    text = right(subject)[1]
    before = "\n".join(text.splitlines()[: mutation.line])
    before = before.partition("$L__func_begin0")[2]
    if mutation.kind == "barrier dropped" and not re.search(
        r"\b(st|ld\.shared|cp\.async)\b", before
    ):
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
    line = source(text, mutation.line)
    for (kind, begin), why in EXPECTED[subject].items():
        if kind == mutation.kind and line.startswith(begin):
            return why
    return ""


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


# ------------------------------------------------------------------------------------------- tests

# How often a line of source is tried that is unrolled; how many mistakes of a kind are tried.
COPIES, SAMPLE = (4, None) if EVERYTHING else (1, 2)
NOT_THIS_TRITON = "what changes nothing is known of the code of Triton 3.9"
pytestmark = pytest.mark.skipif(not triton.__version__.startswith("3.9."), reason=NOT_THIS_TRITON)


_PRODUCTS = ("_fold_logits_kernel", "_recompute_gradient_kernel")
# Kinds that not every kernel gives an occasion for.
_ONLY_IN = {
    kind: _PRODUCTS
    for kind in (
        "wait dropped",
        "wait one later",
        "copy without its mask",
        "matrix the other way",
        "product of another type",
    )
} | {"cut off, not rounded": (*_PRODUCTS, "_fold_rows_kernel")}


@pytest.mark.parametrize(
    ("subject", "kind"),
    [
        (subject, kind)
        for subject in (SUBJECTS if EVERYTHING else _SMALL)
        for kind in KINDS
        if subject in _ONLY_IN.get(kind, SUBJECTS)
    ],
)
def test_mistakes_are_noticed(subject, kind):
    """All but those that are shown, or known by name, to change nothing."""
    tried = [one for one in chosen(subject, COPIES) if one.kind == kind]
    assert tried
    if SAMPLE is not None:
        random.Random(f"{subject} {kind}").shuffle(tried)
    missed, why = {}, set()
    for mutation in tried[:SAMPLE]:
        if noticed(subject, mutation):
            continue
        why.add(harmless(subject, mutation))
        if "" in why:
            missed[mutation.line] = mutation.before.strip()
            why.remove("")
    assert not missed
    known = {reason for (of_kind, _), reason in EXPECTED[subject].items() if of_kind == kind}
    assert SAMPLE is not None or known <= why, "known to change nothing, and noticed"


@pytest.mark.parametrize("subject", _PRODUCTS if EVERYTHING else _PRODUCTS[1:])
def test_of_two_waits_in_a_row_one_is_needed(subject):
    """Each alone changes nothing; without all of them the loop reads what has not landed."""
    _, text = right(subject)
    waits = [one for one in mutations(text) if one.kind == "wait dropped"]
    assert len(waits) > 2
    mutated = text
    for mutation in waits:
        mutated = mutation.applied(mutated)
    outcome, _ = performed(subject, text, mutated)
    assert "under way" in outcome.why
