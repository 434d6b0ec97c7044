"""Lists on the command line: read by their columns, trained on whole, judged by best and worst."""

from __future__ import annotations

import json
import math

import pytest
from command_line_jobs import sentences, write_lines

pytest.importorskip("safetensors")
pytest.importorskip("datasets")


def lists(count: int, seed: int = 0) -> list[dict]:
    """Lists of 3, 2, 4, 3, … texts, rated 0, 1, …; the first list has a copy of its first text."""
    rows = []
    for index in range(count):
        size = (3, 2, 4)[index % 3]
        prompt, *texts = sentences(size + 1, 100 * seed + index)
        texts = [f"{text} {number % 2 + 1}" + " cat" * number for number, text in enumerate(texts)]
        rows.append({"prompt": prompt, "completions": texts, "scores": list(range(size))})
    rows[0]["completions"][1] = rows[0]["completions"][0]
    return rows


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    return {
        "dataset": write_lines(tmp_path / "lists.jsonl", lists(8)),
        "held_out": write_lines(tmp_path / "held_out.jsonl", lists(3, seed=1)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["precomputed", "model"])
def test_a_loss_on_pairs_trains_on_lists(logged, files, tmp_path, capsys, reference):
    more = {"eval_strategy": "steps", "eval_steps": 1, "layout": "packed"}
    rows = logged(loss="dpo", reference=reference, **files | more)
    said = capsys.readouterr().out
    assert "read as lists of rated completions (adapter lists)" in said
    assert "training lists: read 8 of 23 completions, kept 8 of 22; without two different" in said
    # At the start the policy is its reference.
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    # 3, 1 and 6 pairs, but for the first list's copy.
    seen = [row["eval_lists/pairs"] for row in history if "eval_lists/pairs" in row]
    assert seen == pytest.approx([8 / 3] * 2)
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["pairs"] == 3 and found["trained"]["kl"] > 0 == found["reference"]["kl"]


def test_every_kind_of_loss_has_its_rows(loaded, files, capsys):
    task = loaded(loss="dro", **files)
    # DRO takes the copy, too.
    assert [len(row["rewards"]) for row in task.train] == [3, 2, 4, 3, 2, 4, 3, 2]
    assert "training completions: read 23, kept 23" in capsys.readouterr().out
    batch = task.collator("packed")(task.train[:2])
    assert batch["groups"].tolist() == [0, 0, 0, 1, 1]
    task = loaded(loss="kto", **files)
    assert [row["desirable"] for row in task.train] == [True, False] * 8
    # Its evaluation is on lists, too, the first without its copy.
    task = loaded(loss="simpo", **files)
    assert [len(row["rewards"]) for row in task.evaluated] == [2, 2, 4]
    assert len(task.held_out) == 3 and "chosen_ids" in task.held_out[0]


def test_what_lists_cannot_do_is_refused(refused, files, tmp_path):
    said = refused(loss="simpo", layout="shared_prompt", **files)
    assert said == "layout: got shared_prompt with lists, which takes pairs alone"
    rows = [row | {"scores": row["scores"][1:]} for row in lists(2)]
    said = refused(loss="simpo", dataset=write_lines(tmp_path / "bad.jsonl", rows))
    assert said.startswith("dataset: scores: got 2 in row 0 (counted from 0), wanted one for each")
    said = refused(loss="dpo + 0.1 aot", **files)
    assert said.startswith("loss: got dpo + 0.1 aot, which sorts the pairs, with lists")


@pytest.mark.slow
def test_the_reference_command_fills_the_cache(job, files, capsys):
    assert job("reference", loss="dpo", **files) == 0
    said = capsys.readouterr().out
    assert "train: 8 lists, completions of -" in said and "held out: 3 pairs, chosen of -" in said
