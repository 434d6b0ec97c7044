"""Tables of docs/scaling.md, and of the command line: bytes, time and GPUs by model and layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.device import MACHINES, Machine
from benchmarks.results import Row
from benchmarks.scaling import (
    KINDS,
    OURS,
    Case,
    Heads,
    Moved,
    layouts_of,
    moved,
)
from benchmarks.step_memory import (
    BESIDE,
    FULL,
    LLAMAS,
    LORA,
    Layout,
    Llama,
    Recipe,
    backbone_seconds,
    usable,
)
from benchmarks.tables import table

GB = 1e9
KILO = 1024
CONTEXTS = tuple(KILO * count for count in (8, 32, 128, 512, 1024))
# Of each model: a layout, and a context that fits there with some heads.
EXAMPLES = (
    (LLAMAS[0], Layout(1, 8, 1), 128 * KILO),
    (LLAMAS[1], Layout(4, 8, 2), 128 * KILO),
    (LLAMAS[2], Layout(2, 16, 8), 512 * KILO),
)
# Layouts whose bytes are shown over the context.
SHOWN = (
    (LLAMAS[0], Layout(8, 1, 1)),
    (LLAMAS[0], Layout(1, 8, 1)),
    (LLAMAS[1], Layout(8, 8, 1)),
    (LLAMAS[1], Layout(4, 2, 8)),
    (LLAMAS[2], Layout(4, 64, 1)),
    (LLAMAS[2], Layout(2, 16, 8)),
)


def same_training(rows: Sequence[Row], row: Row, name: str) -> Row:
    """The row about the same training with another head."""
    about = [row[key] for key in ("shape", "gpu", "recipe")]
    return next(
        other
        for other in rows
        if other["candidate"] == name
        and [other[key] for key in ("shape", "gpu", "recipe")] == about
    )


def fewest(row: Row, context: int) -> int | None:
    """The fewest GPUs on which a context fits."""
    pairs = zip(row["gpus"], row["longest"], strict=True)
    return next((gpus for gpus, longest in pairs if longest >= context), None)


def fewest_table(rows: Sequence[Row]) -> str:
    """A line for each model, GPU and recipe."""
    lines = []
    for row in rows:
        if row["candidate"] == OURS:
            cells = []
            for context in CONTEXTS:
                found = [fewest(same_training(rows, row, kind.name), context) for kind in KINDS]
                cells.append(" / ".join("–" if each is None else str(each) for each in found))
            lines.append([row["shape"], row["gpu"], row["recipe"], *cells])
    lines.sort(key=lambda line: [model.name for model in LLAMAS].index(line[0]))
    header = ("model", "GPU", "training", *(f"{context // KILO}k" for context in CONTEXTS))
    return table(header, lines, left=3)


def cases_of(heads: Heads, model: Llama, machine: Machine, recipe: Recipe = FULL) -> Iterator[Case]:
    for kind in KINDS:
        yield Case(heads, model, recipe, machine, kind)


def parts_table(heads: Heads) -> str:
    header = ["model", "GPU", "layout", "context", "states", "second model", "states, LoRA"]
    header += ["checkpoints", "layer"]
    header += [f"head: {kind.name}" for kind in KINDS] + ["at most: ours"]
    lines = []
    for model, layout, context in EXAMPLES:
        for machine in MACHINES:
            steps = [case.step(layout, context) for case in cases_of(heads, model, machine)]
            ours = steps[0]
            beside = next(cases_of(heads, model, machine, BESIDE)).step(layout, context)
            lora = next(cases_of(heads, model, machine, LORA)).step(layout, context)
            sizes = [ours.states, beside.reference, lora.states, ours.checkpoints, ours.at_layer]
            sizes += [*(step.head for step in steps), ours.peak]
            about = [model.name, machine.name, str(layout), f"{context // KILO}k"]
            lines.append([*about, *(gb(size) for size in sizes)])
    return table(header, lines, left=3)


def layouts_table(heads: Heads, model: Llama, machine: Machine, recipe: Recipe, gpus: int) -> str:
    """A line for each layout: GB of a GPU over the context, and the longest that fits, by head."""
    lines = []
    for layout in layouts_of(gpus):
        cases = list(cases_of(heads, model, machine, recipe))
        cells = []
        for context in CONTEXTS:
            peaks = [case.step(layout, context).peak for case in cases]
            fits = [peak <= usable(machine) for peak in peaks]
            marked = zip((gb(peak, ".0f") for peak in peaks), fits, fits, strict=True)
            cells.append(" / ".join(_marked(*each) for each in marked))
        longest = " / ".join(f"{case.longest(layout) // KILO}k" for case in cases)
        lines.append([str(layout), *cells, longest])
    header = ("layout", *(f"{context // KILO}k" for context in CONTEXTS), "longest")
    return table(header, lines, left=1)


def contexts_table(heads: Heads) -> str:
    header = ("model", "layout", *(f"{context // KILO}k" for context in CONTEXTS))
    lines = []
    for model, layout in SHOWN:
        cells = []
        for context in CONTEXTS:
            fits, sizes = {}, []
            for machine in MACHINES:
                for case in cases_of(heads, model, machine):
                    peak = case.step(layout, context).peak
                    fits[machine.name, case.kind.name] = peak <= usable(machine)
                    sizes.append(gb(peak, ".0f"))
            small, large = ([fits[m.name, kind.name] for kind in KINDS] for m in MACHINES)
            # Of ours, which follows the GPU, the larger one's.
            shown = zip(sizes[len(KINDS) :], small, large, strict=True)
            cells.append(" / ".join(_marked(*each) for each in shown))
        lines.append([model.name, str(layout), *cells])
    return table(header, lines, left=2)


def _marked(text: str, small: bool, large: bool) -> str:
    return text if small else f"*{text}*" if large else f"**{text}**"


def timed_examples() -> Iterator[tuple[Llama, Layout, int, Machine]]:
    """Examples, and each at a short context too."""
    for model, layout, context in EXAMPLES:
        for length in (CONTEXTS[0], context):
            for machine in MACHINES:
                yield model, layout, length, machine


def head_share(
    heads: Heads, model: Llama, layout: Layout, context: int, machine: Machine, kind: int = 0
) -> float:
    """Of the head's time and the layers'."""
    layers = 1e3 * backbone_seconds(model, FULL, layout, context, machine)
    ms = list(cases_of(heads, model, machine))[kind].head_ms(layout, context)
    return ms / (ms + layers)


def time_table(heads: Heads) -> str:
    header = ["model", "GPU", "layout", "context", "layers, ms", "P, ms"]
    header += [f"{kind.name}, {unit}" for kind in KINDS for unit in ("P", "share")]
    lines = []
    for model, layout, context, machine in timed_examples():
        cells = []
        for place, case in enumerate(cases_of(heads, model, machine)):
            unit = case.p_ms(layout, context)
            cells.append(f"{case.head_ms(layout, context) / unit:.2f}")
            cells.append(f"{head_share(heads, model, layout, context, machine, place):.1%}")
        layers = 1e3 * backbone_seconds(model, FULL, layout, context, machine)
        about = [model.name, machine.name, str(layout), f"{context // KILO}k"]
        lines.append([*about, f"{layers:.0f}", f"{unit:.1f}", *cells])
    return table(header, lines, left=3)


def moved_in_full(model: Llama, layout: Layout, context: int) -> Moved:
    return moved(model, FULL, layout, context)


def share_added(model: Llama, layout: Layout, context: int) -> float:
    """Bytes that our collectives add, as a share of what is moved without them."""
    found = moved_in_full(model, layout, context)
    added = found.vocabulary + found.sequences + found.statistics
    return added / (found.fsdp + found.tp + found.cp)


def moved_table() -> str:
    header = (
        *("model", "layout", "context", "FSDP", "tensor parallel", "context parallel"),
        *("ours: sharded head", "in its place: gathered", "ours adds"),
    )
    lines = []
    for example in EXAMPLES:
        model, layout, context = example
        found = moved_in_full(*example)
        sizes = (found.fsdp, found.tp, found.cp, found.vocabulary, found.whole)
        about = [model.name, str(layout), f"{context // KILO}k"]
        cells = [f"{size / 1e6:,.0f}" for size in sizes]
        lines.append([*about, *cells, f"{share_added(*example):.1%}"])
    return table(header, lines, left=2)


def gb(size: float, form: str = ".1f") -> str:
    return format(size / GB, form)
