"""docs/scaling.md and its pictures: from 8B to 405B on 1 to 512 GPUs, on paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.device import LIBRARY, MACHINES, WIDE
from benchmarks.results import ROOT, Row
from benchmarks.scaling import EAGER, GPUS, KINDS, LIGER, OURS, SPLITS, TRL, Heads, load_scaling
from benchmarks.scaling_tables import (
    EXAMPLES,
    GB,
    KILO,
    cases_of,
    contexts_table,
    fewest_table,
    head_share,
    moved_in_full,
    moved_table,
    parts_table,
    same_training,
    share_added,
    time_table,
    timed_examples,
)
from benchmarks.step_memory import FULL, LLAMAS, LORA, RESERVE, Layout, Llama, usable
from benchmarks.tables import origin, table

NAME = "scaling.md"
PAGE = ROOT.parent / "docs" / NAME
LONGEST_PICTURE, STEP_PICTURE = "scaling.png", "scaling-step.png"
_INTRODUCTION = """\
# From 8B to 405B, on paper

Written by `python -m benchmarks report` from `benchmarks/results/scaling`; edit nothing here.
**Nothing on this page was measured on a GPU.** What a head holds is recorded from its real code at
the shapes in question, without a GPU; the rest is a memory model, whose terms are compared with
real code where that runs on a CPU (*How it is checked*).

![The longest context over the number of GPUs]({longest})

One pair of Llama-3.1 with every token labelled, shared by all GPUs (context parallel, tensor
parallel, weights sharded by FSDP2); full fine-tuning with AdamW, reference log-probs known."""
_STEP = """\
## Where the head ends the context first

![Bytes at the head and in a layer's backward]({step})

A step holds most either at the head or in the backward of its last layer. The head ends the context
where its bar is the longer one: with eager logits and Liger's fused loss, whose logits (12 bytes an
entry and more) grow with the tokens; a head in tiles leaves it to the layer."""
_FEWEST = """\
## The fewest GPUs

On which one pair of a context fits, of powers of two up to {most}, by head: {heads} ("–": on none).
More pairs at a time are data parallel ranks beside these."""
_BYTES = """\
## A step, part by part

GB of a GPU, full fine-tuning with known reference log-probs. *States* are fp32 weights, gradients
and moments; *layer* is what its backward takes beyond states and checkpoints; *head* what the head
takes beyond its gathered weight and the last norm, its gradients among it; *at most* the peak.
Layouts are data × context × tensor parallel. A second model as the reference adds its bf16 shard;
LoRA leaves bf16 weights and an adapter."""
_OVER_CONTEXTS = """\
## Bytes of a GPU, over the context

GB at the peak of a step, full fine-tuning with known reference log-probs, one pair for each data
parallel rank, by head: {heads}. The model lets a step take {usable}: *slanted* is too much for the
former, **bold** for both. `python -m benchmarks fits 70b 64 --gpu A100-80GB --training lora` shows
every layout of so many GPUs."""
_TIMES = """\
## The head's share of the time

The replay's time of the head's forward and backward on a rank, in P, and as a share of it and the
layers' arithmetic at the replay's rates ({rate:.2f} of the peak, attention at {fused}). The
layers' norms, launches and collectives are left out, so real shares are smaller. Of Liger only its
matmuls count."""
_MOVED = """\
## What our collectives add

MB that a GPU receives in a step. A head whose rows are sharded gathers three fp32 numbers of each
row from the other tensor parallel ranks and adds ∂hidden up in fp32; *gathered* is what fetching
the whole head, and adding its gradient up, takes in its place. Ranks that share sequences add their
sums up: {sequences:.0f} KB a step at most. A loss that keeps a statistic gathers 4 bytes for each
pair of another data parallel rank. References that are known move nothing; a second model gathers
its weights once more, 2 bytes each."""
_ASSUMED = """\
## What is assumed

{assumptions}

Left out, and covered by the reserve: CUDA's context, NCCL's buffers, cuBLAS's workspace,
fragmentation, rotary tables, the attention's own buffers between context parallel ranks. Without
sequence parallelism (transformers' own tensor parallel plans) checkpoints and norms are as large on
every tensor parallel rank as they are in all of them together here. Gradients are taken to be alive
all along, as they are under accumulation. Every token is labelled, which is the most: rows of a
prompt cost ours and TRL's head nothing, Liger's and an eager one as much as others."""
_CHECKED = """\
## How it is checked

- Heads: recorded between the recorded lengths, every figure is within {bound:.1%} of the GPU's
  memory, or of itself, of the line that is drawn between them.
- A layer: transformers' own, checkpointed, at full size on tensors without data, within 0.1%.
- A step: FSDP2's own code with transformers' Llama on a CPU, one of eight ranks, live bytes counted
  at every operator: within 3%, with the peak at the head and in a layer.
- Collectives: those of the sharded head and of shared sequences as their code calls them, to the
  byte but for the tens by which ranks see that their labels agree.
- Parameters: the published {parameters}."""
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
    bars = [step_bars(contents, *example) for example in EXAMPLES]
    limits = {machine.name: usable(machine) / GB for machine in MACHINES}
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
    names = ", ".join(kind.name for kind in KINDS)
    limits = " and ".join(f"{usable(m) / GB:.1f} GB ({m.name})" for m in MACHINES)
    fused = " / ".join(f"{machine.fused[WIDE]}" for machine in MACHINES)
    parts = [
        _INTRODUCTION.format(longest=LONGEST_PICTURE),
        "\n".join(f"- {line}" for line in answers(rows, heads)),
        _STEP.format(step=STEP_PICTURE),
        _FEWEST.format(most=GPUS[-1], heads=names.replace(", ", " / ")),
        fewest_table(rows),
        _BYTES,
        parts_table(heads),
        _TIMES.format(rate=LIBRARY, fused=fused),
        time_table(heads),
        _MOVED.format(sequences=max(moved_in_full(*each).sequences for each in EXAMPLES) / 1e3),
        moved_table(),
        _OVER_CONTEXTS.format(heads=names.replace(", ", " / "), usable=limits),
        contexts_table(heads),
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
    ours = "; ".join(each.about for each in found[OURS] if each.ends) or "none"
    shares = [head_share(heads, *example) for example in timed_examples()]
    added = max(share_added(*example) for example in EXAMPLES)
    recipes = "full fine-tuning with a reference known or beside, LoRA"
    return [
        f"**The head ends the context first** in {ended[EAGER]} of {len(found[OURS])} cases with"
        f" eager logits, in {ended[LIGER]} with Liger's fused loss, in {ended[TRL]} with TRL's"
        f" function and in {ended[OURS]} with ours ({ours}). Cases are models, GPUs, their numbers"
        f" and trainings ({recipes}) in which some context fits.",
        f"**The longest context** with eager logits is {middle[EAGER]:.0%} of ours in the median"
        f" case, with Liger's {middle[LIGER]:.0%}. With TRL's it is the same in {alike} of"
        f" {len(found[TRL])}; it is shorter where the whole head's gradient, and its fp32 sum, are"
        f" much: {apart.about}, {apart.longest // KILO}k against {apart.ours // KILO}k tokens.",
        f"**The head's time** is {min(shares):.1%} to {max(shares):.1%} of the layers' and its own"
        " in the examples below: from 8B on, memory is what a head decides.",
        f"**Our collectives** add at most {added:.1%} to the bytes that a step moves anyway.",
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
        found = zip(row["gpus"], row["longest"], row["ended_by"], strict=True)
        for (gpus, longest, ended), ours in zip(
            found, same_training(rows, row, OURS)["longest"], strict=True
        ):
            about = f"{row['shape']} on {gpus} {row['gpu']}, {row['recipe']}"
            if ours:
                yield _Compared(about, ended == "head" or not longest, longest, ours)


def step_bars(
    contents: Mapping[str, Any], model: Llama, layout: Layout, context: int
) -> tuple[str, dict[str, dict[str, float]]]:
    """A title, and GB by what they are of each bar: of a head on an H200, and of a layer."""
    heads, bars = Heads.of(contents["heads"]["rows"]), {}
    for case in cases_of(heads, model, MACHINES[-1]):
        step = case.step(layout, context)
        fixed = {"weights, gradients, optimizer": step.states, "checkpoints": step.checkpoints}
        rest = {"gathered weights, last norm": step.at_head - step.head, "head": step.head}
        bars[case.kind.name] = {name: size / GB for name, size in (fixed | rest).items()}
        bars["a layer"] = {
            name: size / GB for name, size in (fixed | {"layer": step.at_layer}).items()
        }
    bars = {name: bars[name] for name in (*(kind.name for kind in KINDS), "a layer")}
    title = f"{model.name}, {context // KILO}k tokens, {layout.gpus} GPUs ({layout})"
    return title, bars


def _assumptions() -> str:
    lines = {
        "a GPU": f"{RESERVE:.0%} of its memory is left alone, {_limits()} can be taken",
        "weights, full": "fp32 master, fp32 gradient, two fp32 moments: 16 bytes, over all GPUs"
        " (accelerate upcasts what trains)",
        "weights, LoRA": f"bf16; an adapter of rank {LORA.rank} on all seven linear maps, 16 bytes",
        "gathered": "in bf16: the layer that runs and the next; at the head its weight, and the"
        " larger of the buffer that it came in and the next layer (FSDP2's prefetch)",
        "reduced": "in bf16, as accelerate sets it: one unit at a time, the larger of a layer and"
        " the head",
        "units": "a layer; the embedding; last norm and head (accelerate's FSDP2)",
        "activations": "every layer checkpointed, its input in bf16; the layer in its backward as"
        " transformers' LlamaDecoderLayer with flash attention",
        "tensor parallel": f"up to {SPLITS[-1]} ranks, with sequence parallelism: what is outside"
        " the products is sharded over the tokens, inputs of products are gathered",
        "reference": "log-probs known before, or the model without its adapter: nothing; a second"
        " model: bf16, sharded alike",
        "head, ours": "the default workspace of the GPU; its rows of the head for all of a tensor"
        " parallel group's tokens, or the gathered head for its own tokens (`sequence_group`),"
        " whichever holds less",
        "head, TRL": "`ChunkedLogProbFunction`; takes whole heads: gathered, each tensor parallel"
        " rank with its own tokens",
        "head, Liger": "`LigerFusedLinearDPOLoss`, not compiled; gathered, as TRL's. Its newer"
        " per-token function takes logits of 512 rows at a time and would not end a context",
        "head, eager": "logits in bf16, log-softmax in fp32; under tensor parallelism sharded over"
        " the vocabulary, as torch's `loss_parallel`",
    }
    return table(("", "assumption"), [[name, text] for name, text in lines.items()], left=2)


def _limits() -> str:
    return " and ".join(f"{usable(m) / GB:.1f} GB ({m.name})" for m in MACHINES)
