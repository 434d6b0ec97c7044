"""From 8B to 405B on 1 to 512 GPUs, on paper: the contexts that fit with each head, and why.

The replay records what a head's real code holds and takes at the shapes of a rank; the memory model
of a step (`llama_step.py`) says what is left for it. What Liger's holds is counted: it is compiled.
Every token is labelled: the most rows that a context can have.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.candidates import CANDIDATES, DEFAULTS, HEAD, HIDDEN, OF_TRL, Candidate
from benchmarks.device import LIBRARY, MACHINES, Machine, play
from benchmarks.llama_step import (
    LLAMAS,
    RECIPES,
    SEQUENCES,
    HeadBytes,
    Layout,
    Llama,
    Recipe,
    StepBytes,
    step_bytes,
    tokens_of,
    usable,
)
from benchmarks.results import RESULTS, Results, Row, load
from benchmarks.shapes import Shape

SCALING = RESULTS / "scaling"
GPUS = tuple(2**power for power in range(10))
# Tensor parallelism stays within a node.
SPLITS = (1, 2, 4, 8)
# Tokens of each of a rank's two sequences that heads are recorded at.
LENGTHS = tuple(2**power for power in range(6, 21))
OURS, TRL, LIGER, EAGER = "ours", "TRL", "Liger", "eager"


@dataclass(frozen=True)
class HeadKind:
    """A head's implementation.

    Attributes:
        name: for people.
        sharded: whether it works on a tensor parallel rank's rows of the head.
        whole: whether it works on the gathered head, for a tensor parallel rank's share of tokens.
    """

    name: str
    sharded: bool
    whole: bool

    def candidate(self, trains: str) -> Candidate:
        """What is recorded of it."""
        if self.name in (OURS, TRL):
            return (DEFAULTS if self.name == OURS else OF_TRL)[trains]
        if self.name == LIGER:
            # Only here: it is the replay's, which needs the peers. Of it only matmuls count.
            from benchmarks.replay import liger_dpo

            found = Candidate(LIGER, liger_dpo)
        else:
            found = CANDIDATES[EAGER]
        frozen = replace(found, name=f"{found.name}: frozen head", trains=HIDDEN)
        return frozen if trains == HIDDEN else found


# TRL's and Liger's functions take a whole head. Eager logits and their log-softmax can stay
# sharded, as torch's `loss_parallel` has them.
KINDS = (
    HeadKind(OURS, sharded=True, whole=True),
    HeadKind(TRL, sharded=False, whole=True),
    HeadKind(LIGER, sharded=False, whole=True),
    HeadKind(EAGER, sharded=True, whole=False),
)


def trains_of(recipe: Recipe) -> str:
    """Which gradients of the head a recipe asks for."""
    return HEAD if recipe.rank is None else HIDDEN


def shard_name(model: Llama, split: int) -> str:
    """The shape that results of a head are filed under."""
    return f"{model.name}, V / {split}"


def record_heads(results: Results, say: Callable[[str], None]) -> None:
    """Record every head at every shape of a rank, on every machine; about two minutes."""
    for machine in MACHINES:
        for model in LLAMAS:
            for kind in KINDS:
                for trains in (HEAD, HIDDEN):
                    for split in SPLITS if kind.sharded else SPLITS[:1]:
                        row = head_row(machine, model, kind, trains, split)
                        results.rows.append(row)
                say(f"{machine.name}, {model.name}: {kind.name} recorded")
    results.save()


def head_row(
    machine: Machine,
    model: Llama,
    kind: HeadKind,
    trains: str,
    split: int,
    lengths: Sequence[int] = LENGTHS,
) -> Row:
    """A row of results: a head's peak and time at each length."""
    # Only here: peers and Triton are needed, and reading results is not to need them.
    from benchmarks.replay import ReplayCase, recorded

    candidate, vocab = kind.candidate(trains), model.vocab // split
    peaks, times = [], []
    for length in lengths:
        shape = Shape(model.name, SEQUENCES, length, model.hidden_size, vocab, labelled=1.0)
        recording = recorded(ReplayCase(candidate, shape), machine)
        # What a compiler would fuse is not held against Liger, as in the replay.
        compiled = kind.name == LIGER
        events = [e for e in recording.events if e.size is not None or not compiled]
        peaks.append(liger_peak(shape, trains) if compiled else recording.peak)
        times.append(round(1e3 * play(machine, events).seconds, 3))
    return {
        "candidate": candidate.name,
        "head": kind.name,
        "shape": shard_name(model, split),
        "gpu": machine.name,
        "trains": trains,
        "hidden_size": model.hidden_size,
        "vocab": vocab,
        "dtype": "bf16",
        "lengths": list(lengths),
        "peak_bytes": peaks,
        "ms": times,
    }


def liger_peak(shape: Shape, trains: str) -> int:
    """Bytes of Liger's DPO on one pair, compiled as it is by default, its gradients among them.

    Inductor's code keeps the bf16 logits for their mean, and makes the fp32 gradient of the entries
    that are gathered, and of both the bf16 gradient: 8 bytes of a logit. Inputs are copied, the
    gradients of a pair are added to those of all.
    """
    logits, hidden = shape.rows * shape.vocab, 2 * shape.rows * shape.hidden_size
    weight = 2 * shape.vocab * shape.hidden_size if trains == HEAD else 0
    return max(8 * logits + hidden + weight, 4 * logits + 2 * (hidden + weight))


@dataclass(frozen=True)
class Line:
    """A figure over the length, straight between and beyond what was recorded."""

    lengths: tuple[int, ...]
    values: tuple[float, ...]

    def __call__(self, length: float) -> float:
        """Its value; below the first length that of the first."""
        place = min(max(bisect_left(self.lengths, length), 1), len(self.lengths) - 1)
        (left, right), (low, high) = (
            each[place - 1 : place + 1] for each in (self.lengths, self.values)
        )
        return low + (high - low) * max(0.0, (length - left) / (right - left))


# Names of a machine, a head, what trains and a shape.
Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Heads:
    """What was recorded: bytes and milliseconds."""

    peaks: Mapping[Key, Line]
    times: Mapping[Key, Line]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Heads:
        """Of rows of results."""

        def lines(name: str) -> dict[Key, Line]:
            return {
                (row["gpu"], row["head"], row["trains"], row["shape"]): Line(
                    tuple(row["lengths"]), tuple(row[name])
                )
                for row in rows
            }

        return cls(lines("peak_bytes"), lines("ms"))


@dataclass(frozen=True)
class Case:
    """A training on a kind of GPU.

    Attributes:
        heads: what was recorded.
        model, recipe: of the training.
        machine: the GPU.
        kind: of the head.
    """

    heads: Heads
    model: Llama
    recipe: Recipe
    machine: Machine
    kind: HeadKind

    def step(self, layout: Layout, context: int) -> StepBytes:
        """Bytes of a step, in the way of the head that takes the fewest."""
        return self._way(layout, context)[0]

    def head_ms(self, layout: Layout, context: int) -> float:
        """Milliseconds of the head's forward and backward on a rank, in the same way."""
        _, key, length = self._way(layout, context)
        return self.heads.times[key](length)

    def _way(self, layout: Layout, context: int) -> tuple[StepBytes, Key, float]:
        """A step, and what was recorded of its head: the shape, and how long a sequence is."""
        length, found = context / layout.cp, []
        if self.kind.sharded:
            found.append(self._worked(layout, context, length, layout.tp))
        if self.kind.whole and (layout.tp > 1 or not self.kind.sharded):
            found.append(self._worked(layout, context, length / layout.tp, 1, whole=True))
        return min(found, key=lambda each: (each[0].peak, each[0].at_head))

    def _worked(
        self, layout: Layout, context: int, length: float, split: int, whole: bool = False
    ) -> tuple[StepBytes, Key, float]:
        shape, trains = shard_name(self.model, split), trains_of(self.recipe)
        key = self.machine.name, self.kind.name, trains, shape
        head = HeadBytes(round(self.heads.peaks[key](length)), whole)
        return step_bytes(self.model, self.recipe, layout, context, head), key, length

    def p_ms(self, layout: Layout, context: int) -> float:
        """P on a rank: the bare product of its rows with its share of the head."""
        products = 2 * tokens_of(layout, context) * self.model.head / layout.tp
        return 1e3 * products / (LIBRARY * self.machine.peak)

    def longest(self, layout: Layout) -> int:
        """The largest context that fits, in whole units of 1024 tokens; 0 where none does."""
        room, low, high = usable(self.machine), 0, 2**17
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.step(layout, UNIT * middle).peak <= room
            low, high = (middle, high) if fits else (low, middle - 1)
        return UNIT * low

    def best(self, gpus: int) -> tuple[int, Layout]:
        """The largest context on so many GPUs, and its layout: of one pair, which all share.

        Data parallel ranks shard weights as context parallel ones do, but not the tokens.
        """
        layouts = [Layout(1, gpus // tp, tp) for tp in SPLITS if tp <= gpus]
        return max(((self.longest(layout), layout) for layout in layouts), key=lambda x: x[0])


UNIT = 1024


def layouts_of(gpus: int) -> list[Layout]:
    """Every layout of so many GPUs in powers of two."""
    powers = [power for power in GPUS if power <= gpus]
    return [
        Layout(gpus // cp // tp, cp, tp) for tp in SPLITS for cp in powers if gpus % (cp * tp) == 0
    ]


def find_contexts(heads: Heads, results: Results) -> None:
    """Search the largest context of every case; some seconds."""
    for machine in MACHINES:
        for model in LLAMAS:
            for recipe in RECIPES:
                for kind in KINDS:
                    results.rows.append(context_row(Case(heads, model, recipe, machine, kind)))
    results.save()


def context_row(case: Case) -> Row:
    """A row of results: of each number of GPUs the largest context, and what ends it."""
    found = [case.best(gpus) for gpus in GPUS]
    ended = [
        case.step(layout, context + UNIT).ended_by if context else "" for context, layout in found
    ]
    return {
        "candidate": case.kind.name,
        "shape": case.model.name,
        "gpu": case.machine.name,
        "recipe": case.recipe.name,
        "gpus": list(GPUS),
        "longest": [context for context, _ in found],
        "layouts": [str(layout) for _, layout in found],
        "ended_by": ended,
    }


def run_scaling(folder: Path, say: Callable[[str], None]) -> None:
    """Record the heads, then search contexts; about three minutes."""
    heads = Results(folder / "heads.json", "scaling-head")
    record_heads(heads, say)
    find_contexts(Heads.of(heads.rows), Results(folder / "contexts.json", "scaling"))
    say("contexts found")


def load_scaling(folder: Path = SCALING) -> Mapping[str, Any]:
    """Both files' contents by name; empty where they were not made."""
    return load(folder) if folder.is_dir() else {}
