"""The memory of a DPO step over its context: what is shown is what was measured and predicted."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from benchmarks.context_memory import (  # noqa: E402
    CONTEXTS,
    MACHINE,
    MEASURED,
    MODEL,
    RECIPE,
    ContextMemory,
    context_block,
    context_section,
    context_table,
    has_figure,
    sentences,
)
from benchmarks.llama_step import Layout, step_bytes, usable  # noqa: E402
from benchmarks.results import RESULTS, load  # noqa: E402
from benchmarks.scaling import EAGER, LIGER, OURS, SCALING, TRL  # noqa: E402


@pytest.fixture(scope="module")
def shown() -> ContextMemory:
    content = json.loads((RESULTS / "cpu" / "memory.json").read_text(encoding="utf-8"))
    return ContextMemory.of(content, load(RESULTS / SCALING.name)["heads"]["rows"])


def test_every_trainer_has_a_figure_at_every_context(shown):
    rows = shown.content["rows"]
    places = {(row["candidate"], row["length"]) for row in rows}
    assert places == {(name, length) for name in MEASURED.values() for length in shown.lengths}
    assert len(shown.lengths) >= 4 and all(map(has_figure, rows))
    # Of bf16's rounding: each step was compared with the eager one.
    distances = [row["distance"] for row in rows if row["distance"] is not None]
    assert len(distances) == 3 * len(shown.lengths) and max(distances) < 0.02


@pytest.mark.parametrize("head", MEASURED)
def test_what_is_predicted_is_the_memory_models(shown, head):
    case = shown.cases[head]
    for context in CONTEXTS:
        parts = case.step(Layout(), context)
        assert shown.predicted(head, context) == parts.peak
    # Beyond its longest context a step does not fit.
    end = shown.longest(head)
    assert shown.predicted(head, end) <= usable(MACHINE)
    assert shown.predicted(head, end + 1024) > usable(MACHINE)
    assert (case.model, case.recipe) == (MODEL, RECIPE) and step_bytes


def test_what_is_said_holds(shown):
    longest = {head: shown.longest(head) for head in MEASURED}
    assert longest[EAGER] < longest[LIGER] < longest[TRL] == longest[OURS]
    for length in shown.lengths:
        ours = shown.measured(OURS)[length]
        assert all(ours < shown.measured(head)[length] for head in MEASURED if head != OURS)
    measured, predicted = sentences(shown)
    assert "(**measured**, CPU)" in measured and "(**predicted**, not measured)" in predicted


def test_a_step_that_is_not_right_has_no_figure(shown):
    bad = [dict(row) for row in shown.content["rows"]]
    bad[1]["status"] = "failed: another loss"
    found = ContextMemory({**shown.content, "rows": bad}, shown.cases)
    assert bad[1]["length"] not in found.measured(OURS)
    section = "\n".join(context_section(found, "x"))
    assert "Without a figure: ours: FusedDPOTrainer at 512 tokens (failed: another loss)" in section
    assert context_table(found) != context_table(shown)
    assert "memory.png" in context_block(found, "x")
