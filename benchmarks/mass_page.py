"""docs/drop_mass.md and its picture, from the study's results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.mass_study import DROPS, MASSES, PARTS
from benchmarks.results import ROOT, Row
from benchmarks.tables import origin, table

NAME = "drop_mass.md"
PAGE = ROOT.parent / "docs" / NAME
PICTURE = "drop_mass.png"
_PART = 512
_INTRODUCTION = """\
# A backward without improbable parts of the vocabulary

Written by `python -m benchmarks report` from `benchmarks/results/masses`; edit nothing here.

`drop_mass=ε` lets each row's backward leave out parts of {part} vocabulary entries with a
probability of at most ε in all, never the target's, and renormalises the rest. The result is the
exact gradient of the log-prob among the kept entries, a row's gradient still sums to zero, and
`‖Δ d logits‖₁ ≤ 2ε |d loss / d logp|` in every row, whatever the input (tested). A step takes
1P + 3ρP instead of 4P (`recompute`), 1P + 2ρP instead of 3P (`local`), ρ being the share of (row,
part) that is kept. Log-probs are exact. The default is 0: exact gradients.

Measured on rows of a Llama of {hidden_size} hidden units, trained for {steps} steps on the
embedded text with {vocab} tokens: {texts}. *Frequency* means that the vocabulary's rows stand in
the order of their counts in the training text. Large models have sharper distributions than this
one, which should leave smaller shares; that has not been measured."""
_RECOMMENDED = """\
## Which ε

Rounding the gradient of the logits to bf16, which every path does before its matmuls, has an error
of {hidden:.1e} (hidden) and {weight:.1e} (weight) here, the largest over texts and orders. The
largest measured ε whose errors stay below both, for bf16: **{drop}**. There ρ is {least:.2f} to
{most:.2f} on this model, and a `recompute` step in fp32 takes {fastest:.2f} to {slowest:.2f}P,
exact ones {exact_fastest:.2f} to {exact_slowest:.2f}P. fp16 and fp32 round less; for them no
measured ε stays below the rounding and saves work, so leave it at 0. A larger ε trades exactness
for time, within the bound."""
_FILTER = """\
## Beside a filter by tiles

cut-cross-entropy leaves out tiles of 128 rows × 128 entries whose gradients are all below a bound,
before the upstream gradient is known, and does not renormalise. Emulated here on the same rows
(its kernels need CUDA), with the rows as they come and sorted by target. Read errors at equal
shares."""


def load_masses(folder: Path = MASSES) -> dict[str, Any] | None:
    """The study's results, None where there are none."""
    path = folder / "cpu.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_mass_page(page: Path = PAGE, folder: Path = MASSES) -> None:
    """Write page and picture; nothing where nothing was measured."""
    content = load_masses(folder)
    if content is None:
        return
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(mass_text(content), encoding="utf-8")
    draw_masses(content, page.with_name(PICTURE))


def check_mass_page(page: Path = PAGE, folder: Path = MASSES) -> bool:
    """Whether the page shows exactly what the results say and its picture exists; where there are
    no results, whether there is no page."""
    content = load_masses(folder)
    if content is None:
        return not page.exists()
    if not page.is_file() or not page.with_name(PICTURE).is_file():
        return False
    return page.read_text(encoding="utf-8") == mass_text(content)


def mass_text(content: Mapping[str, Any]) -> str:
    """The whole page."""
    texts = ", ".join(
        f"{about['rows']} rows of {name} text ({about['nats']:.2f} nats a token, entropy"
        f" {about['entropy']:.2f})"
        for name, about in content["texts"].items()
    )
    introduction = _INTRODUCTION.format(
        part=_PART,
        hidden_size=content["hidden_size"],
        steps=content["training_steps"],
        vocab=content["vocab"],
        texts=texts,
    )
    parts = [
        introduction,
        "Measured on " + origin(content),
        f"![Shares, errors and times]({PICTURE})",
        _recommended(content["rows"], content["times"]),
        "## Share kept and error",
        f"Parts of {_PART} entries; errors are relative, of the gradients of hidden and weight.",
        _error_table(content["rows"], "drop_mass", [_PART]),
        "Share kept by size of the parts, in the order of frequency, held-out text:",
        _part_table(content["rows"]),
        _FILTER,
        _error_table(content["rows"], "filter", None),
        "## Time",
        "Forward and backward of the op in P, fp32, in one run for each order and text.",
        _time_table(content["times"]),
        "## A training run",
        _curve_text(content["curves"]),
    ]
    return "\n\n".join(parts) + "\n"


def _recommended(rows: Sequence[Row], times: Sequence[Row]) -> str:
    rounding = [row for row in rows if row["method"] == "bf16 rounding"]
    hidden = max(row["hidden_error"] for row in rounding)
    weight = max(row["weight_error"] for row in rounding)
    ours = [row for row in rows if row["method"] == "drop_mass" and row["part"] == _PART]

    def fits(drop: float) -> bool:
        return all(
            row["hidden_error"] <= hidden and row["weight_error"] <= weight
            for row in ours
            if row["bound"] == drop
        )

    drop = max(filter(fits, DROPS), default=0.0)
    kept = [row["kept"] for row in ours if row["bound"] == drop] or [1.0]
    recompute = [row for row in times if row["path"] == "recompute"]
    dropped = [row["in_p"] for row in recompute if row["drop_mass"] == drop]
    exact = [row["in_p"] for row in recompute if row["drop_mass"] == 0.0]
    return _RECOMMENDED.format(
        hidden=hidden,
        weight=weight,
        drop=f"{drop:g}",
        least=min(kept),
        most=max(kept),
        fastest=min(dropped),
        slowest=max(dropped),
        exact_fastest=min(exact),
        exact_slowest=max(exact),
    )


def _error_table(rows: Sequence[Row], method: str, parts: Sequence[int] | None) -> str:
    lines = [
        [
            row["method"],
            row["order"],
            row["text"],
            f"{row['bound']:.1e}",
            f"{row['kept']:.3f}",
            f"{row['hidden_error']:.1e}",
            f"{row['weight_error']:.1e}",
        ]
        for row in rows
        if row["method"].startswith(method) and (parts is None or row["part"] in parts)
    ]
    header = ("method", "order", "text", "ε or bound", "ρ", "hidden error", "weight error")
    return table(header, lines, left=3)


def _part_table(rows: Sequence[Row]) -> str:
    found = {
        (row["part"], row["bound"]): row["kept"]
        for row in rows
        if (row["method"], row["order"], row["text"]) == ("drop_mass", "frequency", "held-out")
    }
    lines = [[str(part), *(f"{found[part, drop]:.3f}" for drop in DROPS)] for part in PARTS]
    return table(("entries", *(f"ε = {drop:g}" for drop in DROPS)), lines, left=0)


def _time_table(times: Sequence[Row]) -> str:
    drops = (0.0, *DROPS)
    found: dict[tuple[str, str, str], dict[float, float]] = {}
    for row in times:
        key = (row["path"], row["order"], row["text"])
        found.setdefault(key, {})[row["drop_mass"]] = row["in_p"]
    lines = [[*key, *(f"{values[drop]:.2f}" for drop in drops)] for key, values in found.items()]
    header = ("path", "order", "text", "exact", *(f"ε = {drop:g}" for drop in DROPS))
    return table(header, lines, left=3)


def _curve_text(curves: Mapping[str, Sequence[float]]) -> str:
    exact = curves["0"]
    lines = []
    for drop, losses in curves.items():
        gaps = [abs(one - other) for one, other in zip(losses, exact, strict=True)]
        if drop != "0":
            lines.append([drop, f"{losses[-1]:.4f}", f"{max(gaps):.1e}", f"{gaps[-1]:.1e}"])
    header = ("ε", "last loss", "largest distance from exact", "distance at the end")
    text = (
        f"The same model trained for {len(exact)} steps from the same start on the same batches:"
        f" exact gradients end at {exact[-1]:.4f} nats a token."
    )
    return text + "\n\n" + table(header, lines, left=0)


def draw_masses(content: Mapping[str, Any], path: Path) -> None:
    """Error over share kept, and time over ε."""
    from benchmarks.pictures import STYLE, pyplot, save

    with pyplot.rc_context(STYLE):
        figure, (errors, times) = pyplot.subplots(1, 2, figsize=(9.5, 3.8))
        _draw_panels(content, errors, times)
        save(figure, path)


def _draw_panels(content: Mapping[str, Any], errors: Any, times: Any) -> None:
    from benchmarks.pictures import FAINT, OURS

    colours = {"held-out": OURS, "seen": "#d1782f"}
    for text, colour in colours.items():
        rows = [
            row for row in content["rows"] if row["order"] == "frequency" and row["text"] == text
        ]
        ours = [r for r in rows if r["method"] == "drop_mass" and r["part"] == _PART]
        filters = [r for r in rows if r["method"] == "filter, rows by target"]
        for found, line, marker, name in (
            (ours, "-", "o", f"drop_mass, {text} text"),
            (filters, ":", "^", f"filter by tiles, {text} text"),
        ):
            shares = [row["kept"] for row in found]
            errors.plot(
                shares,
                [row["hidden_error"] for row in found],
                line,
                marker=marker,
                color=colour,
                label=name,
                markersize=4,
            )
        for order, line in (("frequency", "-"), ("tokenizer", "--")):
            chosen = [
                row
                for row in content["times"]
                if (row["path"], row["order"], row["text"]) == ("recompute", order, text)
            ]
            drops = [row["drop_mass"] or DROPS[0] / 4 for row in chosen]
            label = f"{text} text, {order} order"
            in_p = [row["in_p"] for row in chosen]
            times.plot(drops, in_p, line, marker="o", color=colour, label=label, markersize=4)
    errors.set_yscale("log")
    errors.set_title("Error at equal work")
    errors.set_xlabel("share of (row, part) or tiles kept")
    errors.set_ylabel("relative error of d hidden")
    times.set_xscale("log")
    times.set_title("Time of a step (recompute)")
    times.set_xlabel("ε (leftmost: exact)")
    times.set_ylabel("P")
    times.set_ylim(bottom=0)
    for panel in (errors, times):
        panel.grid(color=FAINT)
        panel.legend(frameon=False, fontsize=7)
