"""The memory of a DPO step over its context: a picture, a table and what they say.

Left what trainers' whole steps were measured to take on a CPU (`trainer_steps.run_memory`), right
what the memory model predicts of Llama-3.1-8B on one A100 (`llama_step.py`, with recorded heads).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import trainers
from benchmarks.device import MACHINES
from benchmarks.llama_step import FULL, LLAMAS, LORA, Layout, states, usable
from benchmarks.results import Row
from benchmarks.scaling import EAGER, KINDS, LIGER, OURS, TRL, Case, Heads
from benchmarks.tables import measured_on, mib, table

PICTURE = "memory.png"
START, END = "<!-- memory:start -->", "<!-- memory:end -->"
# Head → the trainer that it is measured in.
MEASURED = {
    OURS: trainers.OURS,
    TRL: trainers.TRL,
    LIGER: trainers.LIGER,
    EAGER: trainers.EAGER,
}
MODEL, RECIPE, MACHINE = LLAMAS[0], LORA, MACHINES[0]
KILO, GIB = 1024, 2**30
# Tokens of each sequence of the one pair that a step is predicted of.
CONTEXTS = tuple(2**power for power in range(10, 17))
_DENSE = tuple(int(2 ** (quarter / 4)) for quarter in range(4 * 10, 4 * 17))
_TITLE = "## The memory of a DPO step over its context"
_ALT = (
    "Memory of a DPO step over its context, with ours, TRL's, Liger's and an eager head: measured"
    " on a CPU for a small model, and predicted for {model} on one {gpu}"
)
_NOTES = """\
Measured: what a whole step of one pair takes beyond model and batch, its gradients among it, as
above all resident memory of a process of its own; half of each sequence is the answer. The model is
random, of SmolLM2-135M's width and vocabulary (D {hidden_size}, V {vocab:,}), {layers} layers,
which are checkpointed; all of it trains, in {dtype}. *Ours* is `FusedDPOTrainer` in TRL's place,
*Liger* its fused DPO loss in transformers' `Trainer`: TRL has no such head any more. TRL's tiles of
up to 4096 × 32,768 logits, of all rows on a CPU, are full from 2,048 tokens on. Each step is
compared with the eager one: at most {distance:.1%} off in loss or gradient norm. {missing}

**Predicted, not measured**: all that a GPU holds, every token labelled, by the memory model of
scaling.md. {recipe}: full fine-tuning alone takes {full:.0f} GiB of weights, gradients and
moments."""
_BOLD = "**Bold** does not fit: a step may take {usable:.0f} of {memory:.0f} GiB."


@dataclass(frozen=True)
class ContextMemory:
    """What is shown.

    Attributes:
        content: of memory.json.
        cases: head → its training of `MODEL`.
    """

    content: Mapping[str, Any]
    cases: Mapping[str, Case]

    @classmethod
    def of(cls, content: Mapping[str, Any], heads: Sequence[Row]) -> ContextMemory:
        """Of the rows of heads.json beside it."""
        known = Heads.of(heads)
        cases = {kind.name: Case(known, MODEL, RECIPE, MACHINE, kind) for kind in KINDS}
        return cls(content, cases)

    @property
    def lengths(self) -> list[int]:
        """Contexts that were measured."""
        return sorted({row["length"] for row in self.content["rows"]})

    def measured(self, head: str) -> dict[int, int]:
        """Context → bytes of its step, where there is a figure."""
        rows = (row for row in self.content["rows"] if row["candidate"] == MEASURED[head])
        found = {row["length"]: row["extra_bytes"] for row in rows if has_figure(row)}
        return dict(sorted(found.items()))

    def predicted(self, head: str, context: int) -> int:
        """Bytes of a GPU."""
        return self.cases[head].step(Layout(), context).peak

    def longest(self, head: str) -> int:
        """The longest context that fits."""
        return self.cases[head].longest(Layout())


def has_figure(row: Row) -> bool:
    """Whether a row's memory was measured, of a step that is right."""
    return row["status"] == row["memory_status"] == "ok" and row["extra_bytes"] is not None


def sentences(shown: ContextMemory) -> list[str]:
    """What was measured at the longest context that all have, and what is predicted."""
    found = {head: shown.measured(head) for head in MEASURED}
    common = max(set.intersection(*(set(each) for each in found.values())))
    ours, *others = ((head, found[head][common]) for head in found)
    rest = ", ".join(f"{size / GIB:.1f} with {_said(head)}" for head, size in others)
    text = f"At {common:,} tokens a whole step of a small model takes {ours[1] / GIB:.1f} GiB"
    measured = f"{text} beyond the model with ours, {rest} (**measured**, CPU)."
    by_end: dict[int, list[str]] = {}
    for head in reversed(MEASURED):
        by_end.setdefault(shown.longest(head), []).insert(0, _said(head))
    ends = ", ".join(f"{end // KILO}k with {' and '.join(by_end[end])}" for end in by_end)
    at = shown.cases[OURS].step(Layout(), shown.longest(OURS) + KILO).ended_by
    last = "whose context the layers end" if at == "layers" else "whose context the head ends"
    predicted = (
        f"The longest context of {MODEL.name} ({RECIPE.name}) that fits one {MACHINE.name} is"
        f" {ends}, {last} (**predicted**, not measured)."
    )
    return [measured, predicted]


def _said(head: str) -> str:
    names = {OURS: "ours", TRL: "TRL's", LIGER: "Liger's", EAGER: "an eager head"}
    return names[head]


def context_table(shown: ContextMemory) -> str:
    """A line for each context: measured MiB, and predicted GiB."""
    header = ["tokens", *(f"{head}, MiB" for head in MEASURED)]
    header += [f"{head}, GiB predicted" for head in MEASURED]
    lines = []
    for context in sorted({*shown.lengths, *CONTEXTS}):
        line = [f"{context:,}", *(mib(shown.measured(head).get(context)) for head in MEASURED)]
        sizes = [shown.predicted(head, context) for head in MEASURED if context in CONTEXTS]
        line += [_fitting(size) for size in sizes] or [""] * len(MEASURED)
        lines.append(line)
    return table(header, lines, left=0)


def _fitting(size: int) -> str:
    text = f"{size / GIB:.0f}"
    return text if size <= usable(MACHINE) else f"**{text}**"


def context_block(shown: ContextMemory, folder: str) -> str:
    """Picture, sentences and table, and what is bold in it.

    Args:
        shown: what they show.
        folder: where the picture is, as seen from the page.
    """
    alt = _ALT.format(model=MODEL.name, gpu=MACHINE.name)
    bold = _BOLD.format(usable=usable(MACHINE) / GIB, memory=MACHINE.memory / GIB)
    picture = f"![{alt}]({folder}/{PICTURE})"
    return "\n\n".join([picture, " ".join(sentences(shown)), context_table(shown), bold])


def context_section(shown: ContextMemory, folder: str) -> list[str]:
    """The paragraphs of the page: the block, how it came about, and who has no figure."""
    rows = shown.content["rows"]
    named = [
        f"{row['candidate']} at {row['length']:,} tokens ({_why(row)})"
        for row in rows
        if not has_figure(row)
    ]
    distances = [row["distance"] for row in rows if has_figure(row) and row["distance"] is not None]
    notes = _NOTES.format(
        **{name: rows[0][name] for name in ("hidden_size", "vocab", "layers", "dtype")},
        distance=max(distances),
        missing=f"Without a figure: {'; '.join(named)}." if named else "None failed.",
        recipe=RECIPE.name,
        full=states(MODEL, FULL, Layout()) / GIB,
    )
    return [_TITLE, context_block(shown, folder), notes, measured_on(shown.content)]


def _why(row: Row) -> str:
    reason: str = row["status"] if row["status"] != "ok" else row["memory_status"]
    return reason


# Where a head's name stands beside the end of its predicted line: offset in points, alignment.
_BESIDE = {
    OURS: ((10, -8), "left", "top"),
    LIGER: ((8, -6), "left", "top"),
    EAGER: ((-9, -2), "right", "top"),
}


def draw_context(shown: ContextMemory, path: Path) -> None:
    """Two panels, each line with its name at its end."""
    # Only here: who reads results needs no matplotlib.
    from benchmarks.pictures import FAINT, HEAD_LINES, STYLE, pyplot, save

    with pyplot.rc_context({**STYLE, "font.size": 11, "axes.titlesize": 11}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.2, 4.4))
        for head, (colour, line, marker, width) in HEAD_LINES.items():
            style = {"color": colour, "linestyle": line, "linewidth": width}
            dots = {"marker": marker, "markersize": 3 + width}
            found = {length: size / GIB for length, size in shown.measured(head).items()}
            left.plot(list(found), list(found.values()), **style, **dots)
            place = max(found), found[max(found)]
            name = f"{head} {place[1]:.1f}"
            left.annotate(name, place, (7, 0), color=colour, va="center", **_IN_POINTS)
            _draw_predicted(right, shown, head, style | {"label": head}, dots)
        row = shown.content["rows"][0]
        about = f"{row['layers']} layers, V {row['vocab']:,}, {row['dtype']}"
        left.set_title(f"measured, CPU\n{about}")
        right.set_title(f"predicted, not measured\n{MODEL.name}, LoRA, {MACHINE.name}")
        left.set_ylabel("memory of a step, GiB")
        for panel, ticks in ((left, shown.lengths), (right, list(CONTEXTS))):
            panel.set_xscale("log", base=2)
            panel.set_xticks(ticks, [_short(tick) for tick in ticks])
            panel.minorticks_off()
            panel.set_xlabel("context, tokens")
            panel.set_ylim(bottom=0)
            panel.grid(color=FAINT)
        # Room for the names.
        left.set_xlim(right=2.5 * shown.lengths[-1])
        right.set_xlim(right=2 * CONTEXTS[-1])
        right.set_ylim(top=1.15 * MACHINE.memory / GIB)
        _draw_limits(right)
        save(figure, path)


_IN_POINTS: dict[str, Any] = {"textcoords": "offset points", "annotation_clip": False}


def _draw_predicted(
    panel: Any, shown: ContextMemory, head: str, style: Mapping[str, Any], dots: Mapping[str, Any]
) -> None:
    """A line up to the longest context that fits, where heads that end there are named."""
    end = shown.longest(head)
    places = [*(context for context in _DENSE if context < end), end]
    sizes = [shown.predicted(head, context) / GIB for context in places]
    panel.plot(places, sizes, **style, **dots, markevery=[-1])
    together = [other for other in MEASURED if shown.longest(other) == end]
    if head == together[0]:
        offset, across, along = _BESIDE.get(head, _BESIDE[OURS])
        name = f"{', '.join(together)}\n{_short(end)}"
        text = {"color": style["color"], "ha": across, "va": along}
        panel.annotate(name, (end, sizes[-1]), offset, **text, **_IN_POINTS)


def _draw_limits(panel: Any) -> None:
    room = usable(MACHINE) / GIB
    left, right = panel.get_xlim()
    for size, line, name, place, across in (
        (MACHINE.memory / GIB, "-", "the card's 80 GB", left, "left"),
        (room, ":", f"a step may take {room:.0f} GiB", right, "right"),
    ):
        panel.axhline(size, color="#444444", linestyle=line, linewidth=1)
        offset = (4 if across == "left" else -4, 3)
        text = {"color": "#444444", "fontsize": 9, "ha": across}
        panel.annotate(name, (place, size), offset, **text, **_IN_POINTS)


def _short(tokens: int) -> str:
    return f"{tokens // KILO}k" if tokens >= KILO else str(tokens)
