"""Memory over the context: rows on disk, predictions, claims, the step of Liger's, and the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

for name in ("psutil", "matplotlib", "trl", "liger_kernel", "datasets"):
    pytest.importorskip(name)

from benchmarks.compare import context_claims  # noqa: E402
from benchmarks.context_memory import (  # noqa: E402
    CONTEXTS,
    END,
    GIB,
    MEASURED,
    START,
    ContextMemory,
    context_block,
    context_section,
    context_table,
    has_figure,
    sentences,
)
from benchmarks.device import MACHINES  # noqa: E402
from benchmarks.llama_step import LLAMAS, LORA, HeadBytes, Layout, step_bytes, usable  # noqa: E402
from benchmarks.results import RESULTS, load  # noqa: E402
from benchmarks.scaling import EAGER, LIGER, OURS, SCALING, TRL  # noqa: E402
from benchmarks.trainers import EAGER as EAGER_TRAINER  # noqa: E402
from benchmarks.trainers import IN_CONTEXT, OVER_CONTEXT, Stepper  # noqa: E402
from benchmarks.trainers import LIGER as LIGER_TRAINER  # noqa: E402
from fused_prefopt.cli.console import between  # noqa: E402

CONTENT = load(RESULTS / "cpu")["memory"]
HEADS = load(SCALING)["heads"]["rows"]
SHOWN = ContextMemory.of(CONTENT, HEADS)
SMALL = replace(OVER_CONTEXT[0], layers=1, length=12, dtype="fp32", hidden_size=64, vocab=97)


def test_every_point_is_measured_and_takes_the_eager_step() -> None:
    rows = {(row["candidate"], row["length"]): row for row in CONTENT["rows"]}
    assert rows.keys() == {(name, setup.length) for name in IN_CONTEXT for setup in OVER_CONTEXT}
    for (name, _), row in rows.items():
        assert has_figure(row) and row["extra_bytes"] > row["gradient_bytes"] > 0
        assert (row["distance"] is None) == (name == EAGER_TRAINER)
    assert not CONTENT["commit"].endswith("+changes")


def test_claims_hold() -> None:
    assert [str(claim) for claim in context_claims(CONTENT["rows"]) if not claim.holds] == []
    for length in SHOWN.lengths:
        ours, *others = (SHOWN.measured(head)[length] for head in MEASURED)
        assert ours < min(others)
    ends = {head: SHOWN.longest(head) for head in MEASURED}
    assert ends[EAGER] < ends[LIGER] < ends[TRL] == ends[OURS]


def test_predictions_are_the_memory_models() -> None:
    found = {
        row["head"]: dict(zip(row["lengths"], row["peak_bytes"], strict=True))
        for row in HEADS
        if (row["gpu"], row["trains"], row["shape"])
        == ("A100-80GB", "hidden", "Llama-3.1-8B, V / 1")
    }
    for head in MEASURED:
        for context in CONTEXTS:
            wanted = step_bytes(LLAMAS[0], LORA, Layout(), context, HeadBytes(found[head][context]))
            assert SHOWN.predicted(head, context) == wanted.peak
        longest, room = SHOWN.longest(head), usable(MACHINES[0])
        assert SHOWN.predicted(head, longest) <= room < SHOWN.predicted(head, longest + 1024)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_ligers_trainer_takes_the_eager_step(tmp_path: Path, checkpointed: bool) -> None:
    setup = replace(SMALL, checkpointed=checkpointed)
    eager, liger = (
        Stepper(name, setup, tmp_path).step(check=True) for name in (EAGER_TRAINER, LIGER_TRAINER)
    )
    assert liger.loss == pytest.approx(eager.loss, rel=1e-4)
    assert liger.gradient_norm == pytest.approx(eager.gradient_norm, rel=1e-4)


def test_ligers_trainer_refuses_known_references(tmp_path: Path) -> None:
    stepper = Stepper(LIGER_TRAINER, replace(SMALL, reference=(-3.0, 2.0)), tmp_path)
    with pytest.raises(ValueError, match="reference: got known log-probs"):
        stepper.step()


def test_what_is_said_is_of_the_rows() -> None:
    length = OVER_CONTEXT[-1].length
    measured, predicted = sentences(SHOWN)
    size = SHOWN.measured(OURS)[length] / GIB
    assert measured.startswith(f"At {length:,} tokens") and f"takes {size:.1f} GiB" in measured
    for head in (OURS, LIGER, EAGER):
        assert f"{SHOWN.longest(head) // 1024}k" in predicted
    lines = context_table(SHOWN).splitlines()
    assert len(lines) == 2 + len({*CONTEXTS, *SHOWN.lengths})
    block = context_block(SHOWN, "folder")
    assert "](folder/memory.png)" in block and measured in block and "predicted" in block
    text = between(f"a\n{START}\nold\n{END}\nb", START, END, block)
    assert text == f"a\n{START}\n{block}\n{END}\nb"


def test_who_has_no_figure_is_named_and_the_rest_compared() -> None:
    length = OVER_CONTEXT[-1].length
    rows = [
        row | {"status": "failed: no room", "extra_bytes": None}
        if (row["candidate"], row["length"]) == (EAGER_TRAINER, length)
        else row
        for row in CONTENT["rows"]
    ]
    shown = ContextMemory.of(CONTENT | {"rows": rows}, HEADS)
    page = "\n".join(context_section(shown, "."))
    assert f"{EAGER_TRAINER} at {length:,} tokens (failed: no room)" in page
    assert length not in shown.measured(EAGER) and f"At {length // 2:,} tokens" in page
