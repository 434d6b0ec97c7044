"""docs/scaling.md with its tables and pictures, and the command line's table of layouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.device import LIBRARY, MACHINES, WIDE, Machine
from benchmarks.llama_step import (
    BESIDE,
    FULL,
    LLAMAS,
    LORA,
    RESERVE,
    Layout,
    Llama,
    Recipe,
    StepBytes,
    backbone_seconds,
    moved,
    usable,
)
from benchmarks.results import Row
from benchmarks.scaling import (
    EAGER,
    GPUS,
    KINDS,
    LIGER,
    OURS,
    SPLITS,
    TRL,
    Case,
    Heads,
    layouts_of,
    load_scaling,
)
from benchmarks.tables import origin, table

NAME = "scaling.md"
LONGEST_PICTURE, STEP_PICTURE = "scaling.png", "scaling-step.png"
GB = 1e9
KILO = 1024
CONTEXTS = tuple(KILO * count for count in (8, 32, 128, 512, 1024))
# Bytes and times are shown on the larger GPU; the smaller one's differ by ours' workspace.
SHOWN_ON = MACHINES[-1]

# A model, what trains, a layout, and a context that fits there with some heads.
Example = tuple[Llama, Recipe, Layout, int]
# Full fine-tuning of each model.
EXAMPLES: tuple[Example, ...] = (
    (LLAMAS[0], FULL, Layout(1, 8, 1), 128 * KILO),
    (LLAMAS[1], FULL, Layout(4, 8, 2), 128 * KILO),
    (LLAMAS[2], FULL, Layout(2, 16, 8), 512 * KILO),
)
# From few GPUs to many.
STEPS: tuple[Example, ...] = (
    (LLAMAS[0], LORA, Layout(), 16 * KILO),
    EXAMPLES[0],
    (LLAMAS[0], FULL, Layout(64, 8, 1), 128 * KILO),
    (LLAMAS[1], LORA, Layout(1, 8, 1), 32 * KILO),
    EXAMPLES[1],
    (LLAMAS[1], FULL, Layout(32, 8, 2), 128 * KILO),
    (LLAMAS[2], LORA, Layout(1, 8, 8), 128 * KILO),
    EXAMPLES[2],
    (LLAMAS[2], FULL, Layout(4, 16, 8), 512 * KILO),
)

_INTRODUCTION = """\
# From 8B to 405B, on paper

Written by `python -m benchmarks report` from `benchmarks/results/scaling`; edit nothing here.
**Nothing on this page was measured on a GPU.** What a head holds is recorded from its own code
without a GPU. The rest is a model of a step's memory, which agrees with real code on a CPU
(*How it is checked*).

![The longest context over the number of GPUs]({longest})

The longest context of one pair that all GPUs share: context and tensor parallel ranks split it,
FSDP2 shards the weights. Llama-3.1, full fine-tuning with AdamW, every token labelled, reference
log-probs known. A missing point: nothing fits."""
_STEP = """\
## Where the head ends the context first

![Bytes at the head and in a layer's backward]({step})

A step holds most either at the head or in the backward of its last layer (*a layer*). The head ends
the context where its bar is the longer one. It is where there are logits of all tokens: eager ones
take 12 bytes an entry, Liger's 8. Layouts are data × context × tensor parallel, here and below."""
_FEWEST = """\
## The fewest GPUs

The fewest on which one pair fits, in powers of two up to {most}: one number where all heads need as
many, else {heads} ("–": on none). More pairs at a time are data parallel ranks beside these."""
_BYTES = """\
## A step, part by part

GB of a GPU, one pair for each data parallel rank. *States*: weights, gradients and moments.
*Reference*: what a second model would add. *Checkpoints*: each layer's input. *Layer*: what its
backward takes beside them. *Head*: hidden states, logits or tiles, the gradients of both and of the
head, and the whole head where tensor parallel ranks gather it. *At most* is the peak of all.
A GPU has room for {usable}:
*slanted* is too much for the smaller one, **bold** for both.
`python -m benchmarks fits 70b 64 --gpu A100-80GB --training lora` shows every layout of so many
GPUs."""
_TIMES = """\
## The head's share of the time

The replay's time of the head's forward and backward on a rank of an {gpu}, in P (one product of its
rows with its share of the head), and as a share of it and the layers' arithmetic, both at the
replay's rates ({rate:.0%} of the peak, attention {fused:.0%}). What else a step does (norms,
collectives, launches) is left out, so real shares are smaller. Of Liger only the products count."""
_MOVED = """\
## What our collectives add

MB that a GPU receives in a step. Where tensor parallel ranks hold rows of the head, each gathers
three fp32 numbers of every token from the others and adds ∂hidden up in fp32 (*sharded head*). To
gather the whole head and add its gradient up takes *gathered head* instead. Ranks that share
sequences add their sums up: {sequences:.0f} KB a step at most. A loss with a statistic gathers 4
bytes for each pair of the other data parallel ranks."""
_ASSUMED = """\
## What is assumed

{assumptions}

Left to the reserve: CUDA's context, NCCL's and cuBLAS's buffers, fragmentation, rotary tables."""
_CHECKED = """\
## How it is checked

- Heads: real code between the recorded lengths is within {bound:.1%} of the GPU's memory (or of its
  own bytes) of the line that is drawn. Liger's bytes: its compiled step, measured on a CPU, within
  0.5%.
- A layer: transformers' own, checkpointed, full size, without data: its bytes within 0.1%, with or
  without LoRA; its products exactly.
- A step: FSDP2's own code with transformers' Llama on a CPU, one of eight ranks and one alone: live
  bytes within 3% at the head and in a layer; what it gathers and scatters exactly.
- Collectives: those of the sharded head and of shared sequences as their code calls them, to the
  byte but for a few by which ranks see that their labels agree.
- Parameters: the published {parameters}.

Context and tensor parallel layers are counted, not run."""
# How far a recorded peak may be from the line between two others, as a share of the memory and of
# itself.
BOUND = 0.006


def write_scaling(page: Path, results: Path) -> None:
    """Write page and pictures; nothing where nothing was made."""
    contents = load_scaling(results)
    if not contents:
        return
    from benchmarks.pictures import draw_longest, draw_step

    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(scaling_text(contents), encoding="utf-8")
    rows = [row for row in contents["contexts"]["rows"] if row["recipe"] == FULL.name]
    draw_longest(rows, page.with_name(LONGEST_PICTURE))
    heads = Heads.of(contents["heads"]["rows"])
    limits = {machine.name: usable(machine) / GB for machine in MACHINES}
    bars = [step_bars(heads, example) for example in EXAMPLES]
    draw_step(bars, limits, page.with_name(STEP_PICTURE))


def check_scaling(page: Path, results: Path) -> bool:
    """Whether the page shows exactly what the results say and its pictures exist; where there are
    no results, whether there is no page."""
    contents = load_scaling(results)
    if not contents:
        return not page.exists()
    pictures = (page.with_name(name) for name in (LONGEST_PICTURE, STEP_PICTURE))
    if not page.is_file() or not all(picture.is_file() for picture in pictures):
        return False
    return page.read_text(encoding="utf-8") == scaling_text(contents)


def scaling_text(contents: Mapping[str, Any]) -> str:
    """The whole page."""
    heads, rows = Heads.of(contents["heads"]["rows"]), contents["contexts"]["rows"]
    sums = max(moved(*example).sequences for example in EXAMPLES)
    parts = [
        _INTRODUCTION.format(longest=LONGEST_PICTURE),
        "\n".join(f"- {line}" for line in answers(rows, heads)),
        _STEP.format(step=STEP_PICTURE),
        _FEWEST.format(most=GPUS[-1], heads=_each(kind.name for kind in KINDS)),
        fewest_table(rows),
        _BYTES.format(usable=_limits()),
        steps_table(heads),
        _TIMES.format(gpu=SHOWN_ON.name, rate=LIBRARY, fused=SHOWN_ON.fused[WIDE]),
        time_table(heads),
        _MOVED.format(sequences=sums / 1e3),
        moved_table(),
        _ASSUMED.format(assumptions=_assumptions()),
        _CHECKED.format(
            bound=BOUND, parameters=", ".join(f"{model.parameters:,}" for model in LLAMAS)
        ),
        "Made on " + origin(contents["heads"]),
    ]
    return "\n\n".join(parts) + "\n"


def answers(rows: Sequence[Row], heads: Heads) -> list[str]:
    """What the page says first."""
    found = {kind.name: list(_compared(rows, kind.name)) for kind in KINDS}
    ended = {name: sum(each.ends for each in cases) for name, cases in found.items()}
    middle = {name: median(each.share for each in cases) for name, cases in found.items()}
    alike = sum(each.share == 1 for each in found[TRL])
    apart = min((c for c in found[TRL] if c.longest), key=lambda each: each.share)
    shares = [head_share(*each) for each in _timed(heads) if each[0].kind.name == OURS]
    added = max(share_added(example) for example in EXAMPLES)
    return [
        f"**The head ends the context first** in {ended[EAGER]} of {len(found[OURS])} cases with"
        f" eager logits, in {ended[LIGER]} with Liger's fused DPO, in {ended[TRL]} with TRL's"
        f" function, in {ended[OURS]} with ours; elsewhere the layers do. A case is a model, a kind"
        " and number of GPUs, and a training (full, full with a second model, LoRA).",
        f"**The longest context** is {middle[EAGER]:.0%} of ours with eager logits in the median"
        f" case, {middle[LIGER]:.0%} with Liger's fused DPO. With TRL's function it is ours in"
        f" {alike} cases, and shorter where there is little room for the whole head and the fp32"
        f" sum of its gradient ({apart.about}: {apart.longest // KILO}k tokens, ours"
        f" {apart.ours // KILO}k).",
        f"**The time** of our head is {min(shares):.1%} to {max(shares):.1%} of a step's"
        " arithmetic: from 8B on, a head decides about memory, not speed.",
        f"**Our collectives** add {added:.1%} at most to the bytes that a step moves anyway.",
        "**Not all of this runs**: TRL's DPO trainer and Liger's loss take whole sequences. Under"
        " context parallel, what is shown of them is what their functions would hold for a rank's"
        " tokens.",
    ]


@dataclass(frozen=True)
class _Compared:
    """A case in which some context fits with ours: whether another head ends its context."""

    about: str
    ends: bool
    longest: int
    ours: int

    @property
    def share(self) -> float:
        """The longest context as a share of ours."""
        return self.longest / self.ours


def _compared(rows: Sequence[Row], name: str) -> Iterator[_Compared]:
    for row in (row for row in rows if row["candidate"] == name):
        most = same_training(rows, row, OURS)["longest"]
        found = zip(row["gpus"], row["longest"], row["ended_by"], most, strict=True)
        for gpus, longest, ended, ours in found:
            about = f"{row['shape']} on {gpus} {row['gpu']}, {row['recipe']}"
            if ours:
                yield _Compared(about, ended == "head" or not longest, longest, ours)


def same_training(rows: Sequence[Row], row: Row, name: str) -> Row:
    """The row about the same training with another head."""
    wanted = row | {"candidate": name}
    keys = ("candidate", "shape", "gpu", "recipe")
    return next(each for each in rows if all(each[key] == wanted[key] for key in keys))


def step_bars(heads: Heads, example: Example) -> tuple[str, dict[str, dict[str, float]]]:
    """A title, and GB by what they are of each bar: of each head, and of a layer."""
    model, recipe, layout, context = example
    bars = {}
    for case in cases_of(heads, model, SHOWN_ON, recipe):
        step = case.step(layout, context)
        fixed = {"weights, gradients, optimizer": step.states, "checkpoints": step.checkpoints}
        rest = {"gathered weights, last norm": step.at_head - step.head, "head": step.head}
        bars[case.kind.name] = fixed | rest
    bars["a layer"] = fixed | {"layer": step.at_layer}
    title = f"{model.name}, {context // KILO}k tokens, {layout.gpus} GPUs ({layout})"
    return title, {
        bar: {name: size / GB for name, size in parts.items()} for bar, parts in bars.items()
    }


def fewest(row: Row, context: int) -> int | None:
    """The fewest GPUs on which a context fits."""
    pairs = zip(row["gpus"], row["longest"], strict=True)
    return next((gpus for gpus, longest in pairs if longest >= context), None)


def fewest_table(rows: Sequence[Row]) -> str:
    """A line for each model, GPU and training, without second models."""
    lines = []
    for row in rows:
        if row["candidate"] == OURS and row["recipe"] != BESIDE.name:
            cells = []
            for context in CONTEXTS:
                found = [fewest(same_training(rows, row, kind.name), context) for kind in KINDS]
                cells.append(_each("–" if each is None else str(each) for each in found))
            lines.append([row["shape"], row["gpu"], row["recipe"], *cells])
    lines.sort(key=lambda line: [model.name for model in LLAMAS].index(line[0]))
    header = ("model", "GPU", "training", *(_kilo(context) for context in CONTEXTS))
    return table(header, lines, left=3)


def cases_of(heads: Heads, model: Llama, machine: Machine, recipe: Recipe) -> list[Case]:
    """The same training with each head."""
    return [Case(heads, model, recipe, machine, kind) for kind in KINDS]


def steps_table(heads: Heads) -> str:
    header = ["model", "training", "GPUs", "layout", "context", "states", "reference"]
    header += ["checkpoints", "layer", *(f"head: {kind.name}" for kind in KINDS)]
    header += [f"at most: {_each(kind.name for kind in KINDS)}"]
    lines = []
    for model, recipe, layout, context in STEPS:
        steps = [c.step(layout, context) for c in cases_of(heads, model, SHOWN_ON, recipe)]
        ours = steps[0]
        second = cases_of(heads, model, SHOWN_ON, BESIDE)[0].step(layout, context).reference
        sizes = [_gb(ours.states), "–" if recipe.rank else _gb(second)]
        sizes += [_gb(size) for size in (ours.checkpoints, ours.at_layer)]
        sizes += [*(_gb(step.head) for step in steps), _each(_marked(step) for step in steps)]
        about = [model.name, recipe.name.split(",")[0], str(layout.gpus), str(layout)]
        lines.append([*about, _kilo(context), *sizes])
    return table(header, lines, left=4)


def layouts_table(heads: Heads, model: Llama, machine: Machine, recipe: Recipe, gpus: int) -> str:
    """A line for each layout: GB of a GPU over the context, and the longest that fits, by head."""
    lines, cases = [], cases_of(heads, model, machine, recipe)
    for layout in layouts_of(gpus):
        cells = [
            _each(_marked(case.step(layout, context), (machine,)) for case in cases)
            for context in CONTEXTS
        ]
        longest = _each(f"{case.longest(layout) // KILO}k" for case in cases)
        lines.append([str(layout), *cells, longest])
    header = ("layout", *(_kilo(context) for context in CONTEXTS), "longest")
    return table(header, lines, left=1)


def _marked(step: StepBytes, machines: Sequence[Machine] = MACHINES) -> str:
    """GB at the peak, and whether it is too much for all machines, or for some."""
    text = _gb(step.peak, ".0f")
    fits = [step.peak <= usable(machine) for machine in machines]
    return text if all(fits) else f"*{text}*" if any(fits) else f"**{text}**"


def _each(texts: Iterator[str]) -> str:
    """What is said of each head, once where it is the same of all."""
    found = list(texts)
    return found[0] if len(set(found)) == 1 else " / ".join(found)


def _timed(heads: Heads) -> Iterator[tuple[Case, Layout, int]]:
    """Examples, and each at a short context too, with each head."""
    for model, recipe, layout, context in EXAMPLES:
        for length in (CONTEXTS[0], context):
            for case in cases_of(heads, model, SHOWN_ON, recipe):
                yield case, layout, length


def layers_ms(case: Case, layout: Layout, context: int) -> float:
    """Milliseconds of the layers' arithmetic."""
    return 1e3 * backbone_seconds(case.model, case.recipe, layout, context, case.machine)


def head_share(case: Case, layout: Layout, context: int) -> float:
    """Of the head's time and the layers'."""
    ms = case.head_ms(layout, context)
    return ms / (ms + layers_ms(case, layout, context))


def time_table(heads: Heads) -> str:
    header = ("model", "layout", "context", "layers, ms", "P, ms", *(kind.name for kind in KINDS))
    lines: list[list[str]] = []
    for case, layout, context in _timed(heads):
        unit = case.p_ms(layout, context)
        if case.kind.name == OURS:
            layers = f"{layers_ms(case, layout, context):,.0f}"
            lines.append([case.model.name, str(layout), _kilo(context), layers, f"{unit:.1f}"])
        share = head_share(case, layout, context)
        lines[-1].append(f"{case.head_ms(layout, context) / unit:.1f} P, {share:.1%}")
    return table(header, lines, left=2)


def share_added(example: Example) -> float:
    """Bytes that our collectives add, as a share of what is moved without them."""
    found = moved(*example)
    added = found.vocabulary + found.sequences + found.statistics
    return added / (found.fsdp + found.tp + found.cp)


def moved_table() -> str:
    header = (
        *("model", "layout", "context", "FSDP", "tensor parallel", "context parallel"),
        *("sharded head", "gathered head", "ours adds"),
    )
    lines = []
    for example in EXAMPLES:
        model, _, layout, context = example
        found = moved(*example)
        sizes = (found.fsdp, found.tp, found.cp, found.vocabulary, found.whole)
        cells = [f"{size / 1e6:,.0f}" for size in sizes]
        about = [model.name, str(layout), _kilo(context)]
        lines.append([*about, *cells, f"{share_added(example):.1%}"])
    return table(header, lines, left=2)


def _assumptions() -> str:
    lines = {
        "a GPU": f"{RESERVE:.0%} of its memory is reserved, {_limits()} can be taken",
        "states, full": "fp32 weight, gradient and two moments: 16 bytes, over all GPUs; gradients"
        " stay, as under accumulation; fused AdamW, which takes nothing more",
        "states, LoRA": f"bf16 weights; an adapter of rank {LORA.rank} on all seven linear maps of"
        " a layer, 16 bytes",
        "FSDP2": "as accelerate shards: units are a layer, the embedding, and last norm with head;"
        " bf16 is gathered and reduced. At a time: the layer that runs, the next one, and what is"
        " being reduced. One GPU is a mesh of one",
        "layers": "transformers' LlamaDecoderLayer with flash attention, checkpointed, its input"
        " kept in bf16",
        "context parallel": "torch's ring (accelerate's `cp_comm_strategy: alltoall`); its default,"
        " `allgather`, holds the keys and values of all ranks at once, which is not counted",
        "tensor parallel": f"up to {SPLITS[-1]} ranks with sequence parallelism, as torchtitan:"
        " what is outside the products is sharded over the tokens. Transformers' own plans have"
        " none: every rank holds all checkpoints and norms",
        "reference": "log-probs known, or the model without its adapter: nothing. A second model:"
        " bf16, sharded by layers as the first. TRL's `prepare_fsdp` makes one unit of it instead,"
        f" and so gathers all of it ({LLAMAS[1].name}: {2 * LLAMAS[1].parameters / GB:.0f} GB);"
        " a model that is sharded already it leaves as it is",
        "tokens": "every one is labelled. Rows of a prompt cost ours and TRL's head nothing,"
        " Liger's and an eager one as much as others",
        "head, ours": "the GPU's default workspace; under tensor parallelism its rows of the head"
        " for all tokens, or the gathered head for its own (`sequence_group`), whichever holds"
        " less",
        "head, TRL": "`ChunkedLogProbFunction`; the gathered head, a rank's own tokens",
        "head, Liger": "`LigerFusedLinearDPOLoss`, compiled, as by default; the gathered head, a"
        " rank's own tokens. Its per-token function holds the logits of 512 rows, as TRL's a tile",
        "head, eager": "bf16 logits, fp32 log-softmax, not compiled (6 bytes an entry if it is);"
        " under tensor parallelism sharded, as torch's `loss_parallel`",
    }
    return table(("", "assumption"), [[name, text] for name, text in lines.items()], left=2)


def _limits() -> str:
    return " and ".join(f"{usable(m) / GB:.1f} GB ({m.name})" for m in MACHINES)


def _kilo(tokens: int) -> str:
    return f"{tokens // KILO}k"


def _gb(size: float, form: str = ".1f") -> str:
    return format(size / GB, form)
