"""Results as Markdown tables, and the sections of docs/benchmarks.md that are made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.candidates import CANDIDATES, IN_SWEEP
from benchmarks.context_search import CAPACITIES, COMPARED, PRECISION, longest
from benchmarks.counts import WORKSPACE
from benchmarks.cpu_runs import GOAL, PAIRS
from benchmarks.results import Row
from benchmarks.shapes import HEADS

_BACKWARD = {"nothing": "none", "hidden": "hidden", "hidden and head": "hidden, head"}
_TIME = """\
Forward and backward of head and loss alone take {of_trl:.0%} of TRL's time and {of_eager:.0%} of an
eager head's ({dtype}, CPU, **measured**: {p:.1f} P, where P is one bare matmul of hidden states and
head, and 3 P the least)."""
_FASTER = """\
{row[candidate]} in {row[dtype]} ({share:.0%} of our time; its log-probs are {row[logp_error]:.1g}
nats off, ours {own[logp_error]:.1g})"""
_KL = """\
`sequence_kl` beside eager PyTorch: forward and backward of the KL divergence of a policy from its
reference over the whole vocabulary, in P of one of the two heads."""
_TRAINER = """\
Forward, backward and SGD update of a batch of random pairs, half of each sequence its answer, by
each trainer as a user builds it, on a random model of Qwen2.5-0.5B's width and vocabulary with
reference log-probs that are known. `all` trains every parameter, `adapter` LoRA beside a frozen
head. Brackets hold quartiles over interleaved rounds after a first step that is not timed; *of
eager's* is the time in the same round. The peak is what the step takes beyond model and batch, its
gradients among it; on a CPU it is the resident memory of a process of its own. Each step's loss and
gradient norm are compared with the eager trainer's: *distance* is the larger relative one."""
_SWEEP = """\
## Memory over the vocabulary and the length, CPU

Extra peak MiB of a forward and backward in fp32, D 256, half of the tokens labelled, beyond the
inputs and the two gradients."""
_FRAMEWORKS = """\
## Inside other frameworks, CPU

DPO by each framework's own command, in an environment of its own (`make frameworks`;
compatibility.md has its versions): full fine-tuning with a reference, {pairs} pairs a batch,
sequences of at most {length} tokens, V {vocab}, D {hidden_size}, {dtype}. The peak is the resident
memory of the whole process, its libraries among it; the same training with completions of a few
tokens takes what stands beside it."""
_METHODS = """\
## What the loss itself takes

Loss and statistics of {pairs} pairs, forward and backward, as a share of the step of the op
(`local`, {shape} shape, fp32, torch engine, one run), which has {step_pairs} pairs. The goal is
{goal:.2%}."""
_BY_MODEL = f"""\
## The longest context whose head fits

**By the memory model, not measured**: tokens of each sequence of one pair, half of them labelled,
bf16. Weight, hidden states, both gradients (no weight gradient for `stash`, whose head is frozen)
and the extra bytes of the model above; no backbone, whose activations end most contexts first. The
workspace is {WORKSPACE // 2**20} MiB; `local` keeps its probabilities beside it."""
_SEARCHED = f"""\
The same by search with whole steps under the allocator, which may take no more than the capacity:
the longest length that fits, where one that is {PRECISION:.0%} longer does not."""


def table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table whose first `left` columns stand to the left."""
    # Not tabulate: it pads every cell to its column, so that one long status moves a whole page.
    rule = ["---" if column < left else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def origin(content: Mapping[str, Any]) -> str:
    """One line: machine, versions, commit and date."""
    machine, versions = content["machine"], content["versions"]
    parts = [
        f"{machine['cpu']} ({machine['instructions']}), {machine['threads']} threads",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"commit {content['commit']}",
        content["date"],
    ]
    return "; ".join(parts) + "."


def measured_on(content: Mapping[str, Any]) -> str:
    return "Measured on " + origin(content)


def head_table(rows: Sequence[Row]) -> str:
    """Candidates of one dtype on one shape; who has no figures is named with the reason."""
    header = (
        *("candidate", "gradients", "ms", "P", "P, memory reused", "extra peak MiB"),
        *("log-prob error (nats)", "gradient error"),
    )

    def figures(row: Row) -> list[str]:
        ok = row["memory_status"] == "ok"
        return [
            number(row["ms"], ".0f"),
            spread(row, "in_p", ".2f"),
            number(row["reused_in_p"], ".2f"),
            mib(row["extra_bytes"]) if ok else row["memory_status"],
            number(row["logp_error"], ".1e"),
            _gradient_error(row),
        ]

    known = list(CANDIDATES)
    rows = sorted(rows, key=lambda row: known.index(row["candidate"]))
    return _named(header, rows, lambda row: [row["candidate"], _BACKWARD[row["trains"]]], figures)


def time_sentence(results: Mapping[str, Any]) -> str:
    """What a step of the head takes beside TRL's and the eager one, and who is faster.

    Args:
        results: name → content of a results file of the CPU.
    """
    full, half = (
        {row["candidate"]: row for row in results[name]["rows"] if row["status"] == "ok"}
        for name in ("head-fp32", "head-bf16")
    )
    ours = full["ours: local"]
    text = _TIME.format(
        of_trl=ours["ms"] / full["TRL"]["ms"],
        of_eager=ours["ms"] / full["eager"]["ms"],
        dtype=ours["dtype"],
        p=ours["in_p"],
    )
    faster = [
        _FASTER.format(share=row["ms"] / own["ours: local"]["ms"], own=own["ours: local"], row=row)
        for own in (full, half)
        for row in own.values()
        if row["trains"] == ours["trains"] and row["ms"] < own["ours: local"]["ms"]
    ]
    return f"{text} Faster: {'; '.join(faster)}." if faster else text


def grid_table(rows: Sequence[Row]) -> str:
    """A line for each row, in the order in which they were measured."""
    header = (
        *("candidate", "loss", "shape", "dtype", "gradients", "labelled rows", "forward, P"),
        *("P", "ms", "extra MiB", "log-prob error (nats)", "gradient error", "GFLOP", "GB moved"),
    )

    def about(row: Row) -> list[str]:
        named = [row["candidate"], row["objective"], _shape(row), row["dtype"], row["trains"]]
        return [*named, str(row["labelled_rows"])]

    def figures(row: Row) -> list[str]:
        return [
            number(row["forward_in_p"], ".2f"),
            spread(row, "in_p", ".2f"),
            number(row["ms"], ".1f"),
            row["memory_status"] if row["extra_bytes"] is None else mib(row["extra_bytes"]),
            number(row["logp_error"], ".1e"),
            _gradient_error(row),
            number(row["flops"] and row["flops"] / 1e9, ".0f"),
            number(row["bytes"] and row["bytes"] / 1e9, ".2f"),
        ]

    return _named(header, rows, about, figures, left=5)


def sweep_section(content: Mapping[str, Any]) -> list[str]:
    """The paragraphs about the memory sweep."""
    return [_SWEEP, measured_on(content), sweep_table(content["rows"])]


def sweep_table(rows: Sequence[Row]) -> str:
    """Extra peak MiB of each candidate, a line per shape."""
    by_size: dict[tuple[int, int], dict[str, Row]] = {}
    for row in rows:
        by_size.setdefault((row["vocab"], row["length"]), {}).setdefault(row["candidate"], row)

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        return mib(row["extra_bytes"]) if row["status"] == "ok" else row["status"]

    lines = []
    for (vocab, length), by_name in sorted(by_size.items(), key=lambda entry: entry[0][::-1]):
        any_row = next(iter(by_name.values()))
        cells = [cell(by_name.get(name)) for name in IN_SWEEP]
        size = f"{any_row['sequences']} × {length}"
        lines.append([str(vocab), size, *cells, mib(any_row["gradient_bytes"])])
    return table(("V", "S × T", *IN_SWEEP, "the two gradients"), lines, left=0)


def kl_section(content: Mapping[str, Any]) -> list[str]:
    """The paragraphs about the KL divergence."""
    title = "## The KL divergence from a reference model, CPU"
    return [title, _KL, measured_on(content), kl_table(content["rows"])]


def kl_table(rows: Sequence[Row]) -> str:
    """A line for each candidate."""
    header = (
        *("candidate", "shape", "dtype", "labelled rows", "forward, P", "P", "extra MiB"),
        *("KL error (nats)", "gradient error"),
    )

    def figures(row: Row) -> list[str]:
        return [
            str(row["labelled_rows"]),
            spread(row, "forward_in_p", ".2f"),
            spread(row, "in_p", ".2f"),
            mib(row["extra_bytes"]),
            number(row["kl_error"], ".1e"),
            _gradient_error(row),
        ]

    return _named(
        header, rows, lambda row: [row["candidate"], _shape(row), row["dtype"]], figures, left=3
    )


def trainer_section(content: Mapping[str, Any], machine: str) -> list[str]:
    """The paragraphs about one machine's trainer steps."""
    title = f"## A whole trainer step, {machine}"
    return [title, _TRAINER, measured_on(content), trainer_table(content["rows"])]


def trainer_table(rows: Sequence[Row]) -> str:
    """A line for each trainer and setup, in the order in which they were measured."""
    header = (
        *("trainer", "trains", "model", "batch", "dtype", "ms", "of eager's", "peak MiB"),
        *("gradients MiB", "loss", "gradient norm", "distance"),
    )

    def about(row: Row) -> list[str]:
        named = [row["candidate"], row["trains"], f"{row['layers']} layers"]
        return [*named, f"{row['sequences']} × {row['length']}", row["dtype"]]

    def figures(row: Row) -> list[str]:
        status = row["memory_status"]
        return [
            spread(row, "ms", ".0f"),
            spread(row, "of_eager", ".2f"),
            mib(row["extra_bytes"]) if status in ("ok", "not measured") else status,
            mib(row["gradient_bytes"]),
            number(row["loss"], ".5f"),
            number(row["gradient_norm"], ".4g"),
            number(row["distance"], ".1e"),
        ]

    return _named(header, rows, about, figures, left=5)


def framework_section(content: Mapping[str, Any]) -> list[str]:
    """The paragraphs about trainings by other frameworks' commands."""
    first = content["rows"][0]
    text = _FRAMEWORKS.format(**first)
    return [text, measured_on(content), framework_table(content["rows"])]


def framework_table(rows: Sequence[Row]) -> str:
    """A line for each framework and loss."""
    header = (
        *("framework", "loss", "peak MiB", "with short completions", "what the length adds"),
        "losses",
    )

    def about(row: Row) -> list[str]:
        return [f"{row['framework']} {row['version']}", row["candidate"]]

    def figures(row: Row) -> list[str]:
        sizes = (row["peak_bytes"], row["short_peak_bytes"])
        losses = ", ".join(f"{loss:.4f}" for loss in row["losses"])
        return [*map(mib, (*sizes, sizes[0] - sizes[1])), losses]

    return _named(header, rows, about, figures)


def method_section(content: Mapping[str, Any]) -> list[str]:
    """The paragraphs about what the losses take of a step."""
    first = content["rows"][0]
    about = {"shape": first["shape"], "step_pairs": first["sequences"] // 2}
    text = _METHODS.format(pairs=PAIRS, goal=GOAL, **about)
    return [text, measured_on(content), method_table(content["rows"])]


def method_table(rows: Sequence[Row]) -> str:
    """A line for each loss."""
    header = ("loss", "keeps a statistic", "ms", "of a step of ms", "share", "within the goal")
    lines = [
        [
            row["candidate"],
            "yes" if row["stateful"] else "no",
            spread(row, "ms", ".3f"),
            f"{row['step_ms']:.0f}",
            f"{row['share']:.3%}",
            "yes" if row["share"] <= GOAL else "no",
        ]
        for row in rows
    ]
    return table(header, lines, left=2)


def context_sections(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The paragraphs about the longest contexts: by the memory model, and as searched.

    Args:
        measured: machine → content of its search.
    """
    parts = [_BY_MODEL, longest_table()]
    for machine, content in measured.items():
        parts += [f"### Searched on an {machine}", _SEARCHED, measured_on(content)]
        parts.append(context_table(content["rows"]))
    return parts


def longest_table() -> str:
    """Tokens of a sequence by the model, for each candidate, head and capacity."""
    header = ["candidate", *(f"{head}, {size}" for head in HEADS for size in CAPACITIES)]
    lines = [
        [
            name,
            *(
                f"{longest(name, head, size):,}"
                for head in HEADS.values()
                for size in CAPACITIES.values()
            ),
        ]
        for name in COMPARED
    ]
    return table(header, lines, left=1)


def context_table(rows: Sequence[Row]) -> str:
    """A line for each search."""
    header = ("candidate", "head", "GB", "tokens", "by the model", "ended by", "lengths tried")
    lines = [
        [
            row["candidate"],
            row["shape"],
            f"{row['capacity_bytes'] / 1e9:.0f}",
            _tokens(row),
            "" if row["predicted"] is None else f"{row['predicted']:,}",
            row["ended_by"] if row["status"] == "ok" else "",
            str(row["probes"]),
        ]
        for row in rows
    ]
    return table(header, lines, left=2)


def _tokens(row: Row) -> str:
    if row["status"] == "ok":
        return f"{row['longest']:,}"
    return row["status"] if row["longest"] is None else f"{row['longest']:,} ({row['status']})"


def spread(row: Row, name: str, form: str) -> str:
    """A figure and, in brackets, its quartiles."""
    if row[name] is None:
        return ""
    low, high = row[f"{name}_quartiles"]
    return f"{row[name]:{form}} [{low:{form}}, {high:{form}}]"


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def mib(size: int | None) -> str:
    # Pages come and go: a peak may lie a few of them below what the gradients alone take.
    return "" if size is None else f"{max(size, 0) / 2**20:.0f}"


def _gradient_error(row: Row) -> str:
    """The larger of those that there are."""
    errors = [row[name] for name in ("dhidden_error", "dweight_error") if row[name] is not None]
    return number(max(errors, default=None), ".1e")


def _shape(row: Row) -> str:
    return f"{row['shape']}, {row['sequences']} × {row['length']}"


def _named(
    header: Sequence[str],
    rows: Sequence[Row],
    about: Callable[[Row], list[str]],
    figures: Callable[[Row], list[str]],
    left: int = 2,
) -> str:
    """A line for each row: what it is about, then its figures, or its status in their place."""
    lines = []
    for row in rows:
        named = about(row)
        cells = figures(row) if row["status"] == "ok" else [row["status"]]
        lines.append([*named, *cells, *[""] * (len(header) - len(named) - len(cells))])
    return table(header, lines, left)
