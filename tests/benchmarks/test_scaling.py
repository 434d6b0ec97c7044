"""From 8B to 405B on paper: what was recorded, what fits, what moves, and the page that says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

pytest.importorskip("triton")
pytest.importorskip("trl", reason="TRL's and Liger's heads are recorded beside ours")
pytest.importorskip("liger_kernel")

from collective_bytes import Collectives  # noqa: E402

from benchmarks import scaling  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.candidates import AUTO, HEAD, HIDDEN, step  # noqa: E402
from benchmarks.counts import count  # noqa: E402
from benchmarks.device import MACHINES  # noqa: E402
from benchmarks.llama_step import (  # noqa: E402
    FULL,
    LLAMAS,
    LORA,
    RECIPES,
    HeadBytes,
    Layout,
    Llama,
    moved,
    step_bytes,
    usable,
)
from benchmarks.recording import in_place_of, record  # noqa: E402
from benchmarks.replay import meta_problem  # noqa: E402
from benchmarks.results import RESULTS, check, load  # noqa: E402
from benchmarks.scaling import (  # noqa: E402
    EAGER,
    KINDS,
    LENGTHS,
    LIGER,
    OURS,
    SCALING,
    SPLITS,
    TRL,
    UNIT,
    Case,
    Heads,
    Line,
    context_row,
    head_row,
    liger_peak,
    shard_name,
)
from benchmarks.scaling_page import BOUND, check_scaling, fewest, write_scaling  # noqa: E402
from benchmarks.shapes import Shape  # noqa: E402
from fused_prefopt import LMHead, sequence_logps  # noqa: E402
from fused_prefopt.ops.vocab_shard import VocabShard, local_part  # noqa: E402

A100, H200 = MACHINES
CONTENTS = load(SCALING)
HEADS = Heads.of(CONTENTS["heads"]["rows"])
KIND = {kind.name: kind for kind in KINDS}


def test_a_line_is_straight_between_and_beyond_what_was_recorded() -> None:
    line = Line((64, 128, 256), (10.0, 20.0, 60.0))
    assert [line(at) for at in (1, 64, 96, 128, 192, 256, 384)] == [10, 10, 15, 20, 40, 60, 100]


# Each model, GPU and what trains, at lengths between the recorded ones.
BETWEEN = [
    (A100, LLAMAS[0], 1, HEAD),
    (H200, LLAMAS[0], 8, HEAD),
    (H200, LLAMAS[1], 2, HIDDEN),
    (A100, LLAMAS[2], 4, HEAD),
]


@pytest.mark.parametrize(("machine", "model", "split", "trains"), BETWEEN)
def test_what_lies_between_two_lengths_is_near_the_line(
    machine: Any, model: Llama, split: int, trains: str
) -> None:
    """The real code again, at lengths that were not recorded and at one that was."""
    lengths = [96, 1536, 24_576, 98_304, LENGTHS[4]]
    for kind in KINDS:
        split = split if kind.sharded else 1
        row = head_row(machine, model, kind, trains, split, lengths)
        line = HEADS.peaks[machine.name, kind.name, trains, shard_name(model, split)]
        for length, peak in zip(lengths, row["peak_bytes"], strict=True):
            allowed = BOUND * max(machine.memory, peak)
            assert line(length) == pytest.approx(peak, abs=allowed), (kind.name, length)
        assert line(lengths[-1]) == row["peak_bytes"][-1]


def test_a_recorded_head_is_what_its_tensors_take() -> None:
    # Eager logits of 2 x 1024 tokens: log-softmax, its gradient and its input's, in fp32.
    rows, model = 2 * 1024, LLAMAS[0]
    eager = HEADS.peaks[A100.name, EAGER, HEAD, shard_name(model, 1)](1024)
    assert eager == pytest.approx(12 * rows * model.vocab, rel=1e-3)
    # TRL's at many tokens: hidden's gradient twice, once in fp32; the head's, likewise; its tile.
    rows, size = 2 * 2**18, model.hidden_size
    trl = HEADS.peaks[A100.name, TRL, HEAD, shard_name(model, 1)](2**18)
    tensors = (2 + 4 + 2) * rows * size + (2 + 4) * model.head
    assert tensors < trl < 1.05 * tensors + 2 * 4096 * 32_768
    # Ours at as many: the gradients, the fp32 sum of hidden's, and the workspace.
    ours = HEADS.peaks[A100.name, OURS, HEAD, shard_name(model, 1)](2**18)
    tensors = (2 + 4) * rows * size + 2 * model.head
    assert tensors < ours <= tensors + A100.memory / 32 + 256 * rows


def test_ligers_bytes_are_those_of_its_compiled_code() -> None:
    """A step that was measured on a CPU, one pair at a time, and the counts of other pages."""
    rows = load(RESULTS / "cpu")["head-bf16"]["rows"]
    (row,) = (row for row in rows if row["candidate"] == LIGER)
    shape = Shape("pair", 2, row["length"], row["hidden_size"], row["vocab"])
    gradients = 2 * shape.hidden_size * (shape.rows + shape.vocab)
    extra = liger_peak(shape, HEAD) - gradients
    assert extra == pytest.approx(row["extra_bytes"], rel=5e-3)
    counted = count(LIGER, shape, 2)
    assert counted is not None and counted.extra == extra
    # A frozen head has no gradient; of few tokens, the head's gradient twice is the most.
    assert liger_peak(shape, HEAD) - liger_peak(shape, HIDDEN) == 2 * shape.vocab * 512
    few = replace(shape, length=17)
    assert liger_peak(few, HEAD) == 4 * few.rows * shape.vocab + 4 * 512 * (few.rows + shape.vocab)


def test_the_results_cover_every_case_and_follow_from_the_recorded_heads() -> None:
    rows = CONTENTS["contexts"]["rows"]
    assert len(rows) == len(MACHINES) * len(LLAMAS) * len(RECIPES) * len(KINDS)
    split = sum(len(SPLITS) if kind.sharded else 1 for kind in KINDS)
    assert len(CONTENTS["heads"]["rows"]) == len(MACHINES) * len(LLAMAS) * 2 * split
    for row in rows[:: len(rows) // 7]:
        machine = next(each for each in MACHINES if each.name == row["gpu"])
        model = next(each for each in LLAMAS if each.name == row["shape"])
        recipe = next(each for each in RECIPES if each.name == row["recipe"])
        assert context_row(Case(HEADS, model, recipe, machine, KIND[row["candidate"]])) == row


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_longest_context_fits_and_the_next_does_not(kind: scaling.HeadKind) -> None:
    case = Case(HEADS, LLAMAS[1], FULL, H200, kind)
    layout = Layout(2, 16, 2)
    longest = case.longest(layout)
    assert case.step(layout, longest).peak <= usable(H200) < case.step(layout, longest + UNIT).peak
    # By the definition, from what is recorded; two ways of ours, of which one holds less.
    peaks = [
        step_bytes(LLAMAS[1], FULL, layout, longest, HeadBytes(round(line(length)), whole)).peak
        for line, length, whole in ways(kind, longest / 16)
    ]
    assert case.step(layout, longest).peak == min(peaks)


def ways(kind: scaling.HeadKind, length: float) -> Iterator[tuple[Line, float, bool]]:
    """Of two tensor parallel ranks."""
    for wanted, split, part, whole in (
        (kind.sharded, 2, length, False),
        (kind.whole, 1, length / 2, True),
    ):
        if wanted:
            key = H200.name, kind.name, HEAD, shard_name(LLAMAS[1], split)
            yield HEADS.peaks[key], part, whole


def test_a_single_pair_is_shared_by_all_gpus() -> None:
    case = Case(HEADS, LLAMAS[0], FULL, A100, KIND[OURS])
    longest, layout = case.best(8)
    others = [Layout(dp, 8 // dp // tp, tp) for dp in (1, 2, 4, 8) for tp in SPLITS if dp * tp <= 8]
    assert longest == max(case.longest(other) for other in others)
    assert layout.dp == 1 and layout.gpus == 8
    assert fewest(context_row(case), longest) == 8
    assert fewest(context_row(case), 2**40) is None


def test_time_is_in_p_of_the_rank() -> None:
    case = Case(HEADS, LLAMAS[0], LORA, H200, KIND[OURS])
    # 2 x 4096 rows of a rank and the whole head, or 2 x 4096 and a half of it.
    unit = 1e3 * 2 * 8192 * LLAMAS[0].head / (0.8 * 989e12)
    assert case.p_ms(Layout(1, 2, 1), 8192) == pytest.approx(unit)
    assert case.p_ms(Layout(1, 2, 2), 8192) == pytest.approx(unit / 2)
    # A frozen head takes some 2 P.
    assert 2 < case.head_ms(Layout(1, 2, 1), 8192) / unit < 2.6


@pytest.fixture(scope="module")
def ranks() -> Iterator[int]:
    """This process is one of four, whose others say nothing and are waited for by nobody."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield 4
    dist.destroy_process_group()


def test_a_sharded_heads_collectives_are_those_that_are_counted(ranks: int) -> None:
    """The real code of a step, one rank's rows of the head."""
    model, length = LLAMAS[0], 1025
    shape = Shape("shard", 2, length, model.hidden_size, model.vocab // ranks, labelled=1.0)
    problem = meta_problem(shape)
    shard = VocabShard(dist.group.WORLD.group_name, 0)
    whole = {local_part: lambda head: (head, shard)}
    with Collectives() as collectives, in_place_of(whole):
        record(partial(step, AUTO, problem), shape.labelled_rows, H200)
    rows = shape.labelled_rows
    given = collectives.given
    # And a few numbers by which ranks see that they have the same labels.
    assert 0 < given["allgather"] - 12 * rows <= 64
    assert given["allreduce"] == 4 * rows * model.hidden_size
    # From three others, and as a ring adds: twice three quarters.
    found = moved(model, FULL, Layout(tp=ranks), rows // 2)
    assert found.vocabulary == 3 * 12 * rows + 2 * 3 * given["allreduce"] // 4


def test_shared_sequences_add_what_is_counted(ranks: int) -> None:
    """The real code again: the sums of two sequences over four ranks, and their gradient."""
    shape = Shape("part", 2, 64, 32, 1000, labelled=1.0)
    problem = meta_problem(shape)
    problem.hidden.requires_grad_()
    options: dict[str, Any] = {"shift": False, "num_labels": shape.rows}
    options["sequence_group"] = dist.group.WORLD

    def run() -> None:
        head = LMHead(problem.weight)
        sequence_logps(problem.hidden, head, problem.labels, **options).sums.sum().backward()

    with Collectives() as collectives:
        record(run, shape.rows, H200)
    found = moved(LLAMAS[0], FULL, Layout(cp=ranks), 8)
    assert found.sequences == 2 * 3 * collectives.given["allreduce"] // 4 > 0


def test_the_page_shows_what_the_results_say(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "scaling.md"
    assert check_scaling(page, tmp_path / "nothing")
    assert not check_scaling(page, SCALING)
    write_scaling(page, SCALING)
    assert check_scaling(page, SCALING)
    text = page.read_text(encoding="utf-8")
    # The fewest GPUs for 8k tokens: one number where all heads need as many.
    for machine, model, recipe in product(MACHINES, LLAMAS, (FULL, LORA)):
        rows = [context_row(Case(HEADS, model, recipe, machine, kind)) for kind in KINDS]
        counts = [str(fewest(row, 8192)) for row in rows]
        cell = counts[0] if len(set(counts)) == 1 else " / ".join(counts)
        assert f"| {model.name} | {machine.name} | {recipe.name} | {cell} |" in text
    assert "was measured on a GPU" in text and "405,853,388,800" in text
    page.write_text(text.replace("8B", "9B", 1), encoding="utf-8")
    assert not check_scaling(page, SCALING)


def test_the_command_line_shows_every_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fits", "70b", "16", "--gpu", "A100-80GB", "--training", "lora"]) == 0
    lines = capsys.readouterr().out.splitlines()
    layouts = [line.split("|")[1].strip() for line in lines if " × " in line]
    assert len(set(layouts)) == len(layouts) == 5 + 4 + 3 + 2
    (line,) = (line for line in lines if line.startswith("| 2 × 4 × 2 |"))
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    for context, cell in zip((8192, 524_288), (cells[0], cells[3]), strict=True):
        cases = [Case(HEADS, LLAMAS[1], LORA, A100, kind) for kind in KINDS]
        peaks = [case.step(Layout(2, 4, 2), context).peak for case in cases]
        marks = ["**" if peak > usable(A100) else "" for peak in peaks]
        wanted = (f"{m}{p / 1e9:.0f}{m}" for p, m in zip(peaks, marks, strict=True))
        assert cell == " / ".join(wanted)
    longest = " / ".join(f"{case.longest(Layout(2, 4, 2)) // 1024}k" for case in cases)
    assert cells[-1] == longest


def test_a_table_without_recorded_heads_says_what_makes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        assert main(["fits", "8b", "1", "--results", str(folder)]) == 1
        assert "make it: python -m benchmarks scaling" in capsys.readouterr().out


def test_the_command_records_and_searches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "MACHINES": (H200,),
        "LLAMAS": (LLAMAS[0],),
        "KINDS": (KIND[EAGER],),
        "SPLITS": (1,),
        "GPUS": (8,),
    }.items():
        monkeypatch.setattr(scaling, name, value)
    assert main(["scaling", "--results", str(tmp_path)]) == 0
    assert "contexts found" in capsys.readouterr().out
    contents = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(contents) == {"heads", "contexts"}
    for content in contents.values():
        check(content)
    rows = CONTENTS["heads"]["rows"]
    assert all(row in rows for row in contents["heads"]["rows"])
    (row,) = (row for row in contents["contexts"]["rows"] if row["recipe"] == FULL.name)
    case = Case(HEADS, LLAMAS[0], FULL, H200, replace(KIND[EAGER]))
    assert row["longest"] == [case.longest(Layout(1, 8, 1))]
