"""docs/drop_mass.md and its picture, from the study's results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import log10
from pathlib import Path
from typing import Any

from benchmarks.mass_study import DROPS, MASSES, PARTS, ROUNDED
from benchmarks.results import ROOT, Row
from benchmarks.tables import origin, table
from fused_prefopt.ops.dropped_mass import PART

NAME = "drop_mass.md"
PAGE = ROOT.parent / "docs" / NAME
PICTURE = "drop_mass.png"
_LAST = 20
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

The largest measured ε whose errors, of hidden and of weight, stay below those that rounding the
logits' gradient to the dtype makes by itself, in every text and order; P is of a step in fp32 on
the path `recompute` ({exact_fastest:.2f} to {exact_slowest:.2f}P with exact gradients)."""
_AFTER = """\
Where there is none, leave it at 0. A larger ε trades exactness for time, within the bound. A frozen
head's exact gradient takes 2P on the path `stash`, which `auto` keeps whatever ε is."""
_FILTER = """\
## Beside a filter by tiles

cut-cross-entropy leaves out tiles of 128 rows × 128 entries whose gradients are all below a bound,
before the upstream gradient is known, and does not renormalise. Emulated here on the same rows
(its kernels need CUDA), with the rows as they come and sorted by target; ours chooses for each row
by itself, so no order of the rows matters to it. *Our ρ* is at the filter's error, *our error* at
the filter's share, both by interpolation between measured ε ("–" outside of them). The work is the
same function of the share for both, 1P + 3ρP: **at the same error ours does less work in {faster}
of {of_faster} cases, at the same work it is more exact in {closer} of {of_closer}.** Kept tiles of
128 × 128 and rows gathered for parts of {part} do not run at the same speed; that needs a GPU."""


def load_masses(folder: Path = MASSES) -> dict[str, Any] | None:
    """The study's results, None where there are none."""
    path = folder / "cpu.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_mass_page(page: Path = PAGE, folder: Path = MASSES) -> None:
    """Write page and picture; nothing where nothing was measured."""
    content = load_masses(folder)
    if content is None:
        return
    from benchmarks.pictures import draw_masses

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
        part=PART,
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
        f"Parts of {PART} entries; errors are relative, of the gradients of hidden and weight.",
        _error_table(content["rows"]),
        "Share kept by size of the parts, in the order of frequency, held-out text:",
        _part_table(content["rows"]),
        _filter_text(content["rows"]),
        "## Time",
        "Forward and backward of the op in P, fp32, in one run for each order and text.",
        _time_table(content["times"]),
        "## A training run",
        _curve_text(content["curves"]),
    ]
    return "\n\n".join(parts) + "\n"


def _recommended(rows: Sequence[Row], times: Sequence[Row]) -> str:
    recompute = [row for row in times if row["path"] == "recompute"]
    exact = [row["in_p"] for row in recompute if row["drop_mass"] == 0.0]
    lines = []
    for dtype in ROUNDED:
        hidden, weight = _rounding(rows, dtype)
        drop = _largest_below(rows, hidden, weight)
        kept = [row["kept"] for row in _ours(rows) if row["bound"] == drop]
        dropped = [row["in_p"] for row in recompute if row["drop_mass"] == drop]
        found = (f"**{drop:g}**", _span(kept), _span(dropped)) if drop else ("none", "", "")
        lines.append([dtype, f"{hidden:.1e}", f"{weight:.1e}", *found])
    header = ("dtype", "rounding: hidden", "rounding: weight", "ε", "ρ", "P")
    text = _RECOMMENDED.format(exact_fastest=min(exact), exact_slowest=max(exact))
    return "\n\n".join([text, table(header, lines, left=1), _AFTER])


def _ours(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["method"] == "drop_mass" and row["part"] == PART]


def _rounding(rows: Sequence[Row], dtype: str) -> tuple[float, float]:
    """Errors of hidden and weight that rounding makes, the least over texts and orders."""
    found = [row for row in rows if row["method"] == f"{dtype} rounding"]
    return min(row["hidden_error"] for row in found), min(row["weight_error"] for row in found)


def _largest_below(rows: Sequence[Row], hidden: float, weight: float) -> float:
    """ε, 0 where none fits."""

    def fits(drop: float) -> bool:
        return all(
            row["hidden_error"] <= hidden and row["weight_error"] <= weight
            for row in _ours(rows)
            if row["bound"] == drop
        )

    return max(filter(fits, DROPS), default=0.0)


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _filters(rows: Sequence[Row]) -> list[tuple[Row, float | None, float | None]]:
    """Every filter, with our share at its error and our error at its share."""
    found = []
    for row in rows:
        if not row["method"].startswith("filter") or row["kept"] >= 1:
            continue
        ours = [
            (log10(each["hidden_error"]), each["kept"])
            for each in _ours(rows)
            if (each["order"], each["text"]) == (row["order"], row["text"])
        ]
        share = _between(ours, log10(row["hidden_error"]))
        error = _between([(kept, log) for log, kept in ours], row["kept"])
        found.append((row, share, None if error is None else 10**error))
    return found


def _between(points: Sequence[tuple[float, float]], at: float) -> float | None:
    """Linear interpolation; None outside of the points."""
    points = sorted(points)
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if left <= at <= right:
            return low + (high - low) * (at - left) / max(right - left, 1e-12)
    return None


def _filter_text(rows: Sequence[Row]) -> str:
    found = _filters(rows)
    shares = [share < row["kept"] for row, share, _ in found if share is not None]
    errors = [error < row["hidden_error"] for row, _, error in found if error is not None]
    text = _FILTER.format(
        faster=sum(shares),
        of_faster=len(shares),
        closer=sum(errors),
        of_closer=len(errors),
        part=PART,
    )
    lines = [
        [
            row["method"],
            row["order"],
            row["text"],
            f"{row['bound']:.1e}",
            f"{row['kept']:.3f}",
            "–" if share is None else f"{share:.3f}",
            f"{row['hidden_error']:.1e}",
            "–" if error is None else f"{error:.1e}",
        ]
        for row, share, error in found
    ]
    header = ("filter", "order", "text", "bound", "its ρ", "our ρ", "its error", "our error")
    return text + "\n\n" + table(header, lines, left=3)


def _error_table(rows: Sequence[Row]) -> str:
    lines = [
        [
            row["order"],
            row["text"],
            f"{row['bound']:g}",
            f"{row['kept']:.3f}",
            f"{row['hidden_error']:.1e}",
            f"{row['weight_error']:.1e}",
        ]
        for row in _ours(rows)
    ]
    return table(("order", "text", "ε", "ρ", "hidden error", "weight error"), lines, left=2)


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
    last = exact[-_LAST:]
    spread = (sum((loss - sum(last) / len(last)) ** 2 for loss in last) / len(last)) ** 0.5
    lines = []
    for name, losses in curves.items():
        gaps = [abs(one - other) for one, other in zip(losses, exact, strict=True)]
        if name != "0":
            moves = "yes" if max(gaps) > spread else "no"
            lines.append([name, f"{losses[-1]:.4f}", f"{max(gaps):.1e}", f"{gaps[-1]:.1e}", moves])
    header = ("ε", "last loss", "largest distance from exact", "distance at the end", "moves")
    text = (
        f"The same model trained for {len(exact)} steps from the same start on the same batches:"
        f" exact gradients end at {exact[-1]:.4f} nats a token. A curve *moves* where it is ever"
        f" further from the exact one than {spread:.1e}, the standard deviation of the exact one's"
        f" last {len(last)} losses. *Another path* is how far rounding alone takes it."
    )
    return text + "\n\n" + table(header, lines, left=0)
