"""What `train` reads and says of it: adapters, ratings, labels, truncation, refused rows."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from command_line_jobs import log_of, pairs, sentences, write_lines

from fused_prefopt.command_line.records import as_judged, as_pairs, as_points, held_out_records
from fused_prefopt.command_line.settings import Settings

pytest.importorskip("datasets")
pytest_plugins = ["command_line_fixtures"]
SCORES = {"score_chosen": 3.0, "score_rejected": 1.0}


def completions(count: int = 8, **columns: Sequence) -> list[dict]:
    """Rows of single completions, each with its value of every column."""
    texts = sentences(2 * count, seed=3)
    rows = [{"prompt": p, "completion": c} for p, c in zip(texts[::2], texts[1::2], strict=True)]
    return [
        row | {name: values[i] for name, values in columns.items()} for i, row in enumerate(rows)
    ]


def test_it_says_once_what_rows_were_read_as_and_what_truncation_did(job, material, capsys):
    held_out = str(material / "held_out.jsonl")
    assert job("train", held_out=held_out, eval_strategy="steps", eval_steps=2) == 0
    said = capsys.readouterr().out.splitlines()
    for line in (
        f"{material / 'pairs.jsonl'}: read as preference pairs (adapter preference)",
        f"{held_out}: read as preference pairs (adapter preference)",
        "training pairs: read 16, kept 16; completions truncated 0, prompts truncated 0, sides"
        " equal 0, without a completion 0",
        "held-out pairs: read 6, kept 6; completions truncated 0, prompts truncated 0, sides equal"
        " 0, without a completion 0",
    ):
        assert said.count(line) == 1, line


def test_truncated_pairs_are_counted_and_those_left_equal_are_not_trained_on(job, tmp_path, capsys):
    rows = [
        {"prompt": "the", "chosen": f"cat {'on ' * i}1", "rejected": f"cat {'on ' * i}2"}
        for i in range(5)
    ]
    file = write_lines(tmp_path / "long.jsonl", rows)
    assert job("train", dataset=file, max_length=5, per_device_train_batch_size=3) == 0
    assert (
        "training pairs: read 5, kept 3; completions truncated 3, prompts truncated 0, sides equal"
        " 2, without a completion 0; raise max_length (5), which cuts 60% of the rows\n"
    ) in capsys.readouterr().out
    other = str(tmp_path / "shorter")
    assert job("train", dataset=file, max_length=2, max_prompt_length=1, output_dir=other) == 2
    problem = capsys.readouterr().err.splitlines()[-1]
    assert "dataset: records: no row is left, needs at least one; training pairs: read 5" in problem
    assert "sides equal 5" in problem and "raise max_length (2)" in problem


def test_splits_of_one_data_set_are_named_once(material, monkeypatch, capsys):
    from fused_prefopt.command_line import records

    monkeypatch.setattr(records, "_rows", lambda name, split, limit: pairs(2))
    settings = Settings(model="unused", dataset="someone/pairs", held_out="test")
    assert len(records.training_records(settings, 0, points=False)) == 2
    assert len(held_out_records(settings, 0)) == 2
    said = capsys.readouterr().out
    assert said == "someone/pairs: read as preference pairs (adapter preference)\n"


@pytest.mark.parametrize("name", ["reward", "score", "rating"])
def test_ratings_under_any_name_reach_dro(job, tmp_path, capsys, name):
    values = [0.5 * i for i in range(8)]
    file = write_lines(tmp_path / "rated.jsonl", completions(**{name: values}))
    assert job("train", dataset=file, loss="dro", per_device_train_batch_size=8) == 0
    assert log_of(tmp_path / "run")[0]["reward_model/mean"] == pytest.approx(1.75)
    said = capsys.readouterr().out
    assert f"{file}: read as rated completions (adapter completions)\n" in said
    assert "training completions: read 8, kept 8; completions truncated 0, prompts tr" in said


def test_a_loss_that_needs_ratings_says_how_many_rows_are_without(job, tmp_path, capsys):
    file = write_lines(tmp_path / "rated.jsonl", completions(score=[1.0, None] * 4))
    assert job("train", dataset=file, loss="dro") == 2
    problem = capsys.readouterr().err.splitlines()[-1]
    assert "dataset: got no reward, needs it for dro; 4 of 8 rows are without: add it" in problem


def test_labelled_completions_train_kto_without_a_word_of_an_adapter(job, tmp_path, capsys):
    file = write_lines(tmp_path / "kto.jsonl", completions(label=[1, 0, 0, 1] * 2))
    assert job("train", dataset=file, loss="kto", per_device_train_batch_size=8) == 0
    assert (
        f"{file}: read as labelled completions (adapter completions)\n" in capsys.readouterr().out
    )
    row = log_of(tmp_path / "run")[0]
    assert "rewards/chosen" in row and "reward_model/mean" not in row


@pytest.mark.parametrize(
    ("labels", "row", "value"),
    [(["bad", "good"], 0, "'bad'"), (["false", "true"], 0, "'false'"), ([1, -1], 1, "-1")],
)
def test_labels_that_are_none_are_refused_with_their_row(job, tmp_path, capsys, labels, row, value):
    file = write_lines(tmp_path / "kto.jsonl", completions(label=labels * 4))
    assert job("train", dataset=file, loss="kto") == 2
    problem = capsys.readouterr().err.splitlines()[-1]
    assert f"dataset: label: got {value} in row {row} (counted from 0), wanted true or" in problem
    assert "map what is desirable to true" in problem


def test_scores_that_are_none_are_refused_with_their_row(job, tmp_path, capsys):
    rows = pairs(4, **SCORES | {"score_chosen": "8.5"})
    rows[2]["score_chosen"] = "high"
    assert job("train", dataset=write_lines(tmp_path / "pairs.jsonl", rows)) == 2
    problem = capsys.readouterr().err.splitlines()[-1]
    assert "dataset: score_chosen: got 'high' in row 2 (counted from 0), wanted a finite" in problem


def test_kto_logs_no_scores_that_no_pair_brought(job, material, tmp_path, capsys):
    assert job("train", loss="kto") == 0
    assert "reward_model/mean" not in log_of(tmp_path / "run")[0]
    assert "no scores" not in capsys.readouterr().out
    scored = write_lines(tmp_path / "scored.jsonl", pairs(8, **SCORES))
    folder = tmp_path / "scored"
    assert job("train", loss="kto", dataset=scored, output_dir=str(folder)) == 0
    values = {row["reward_model/mean"] for row in log_of(folder)}
    assert values and all(1 <= value <= 3 for value in values)


def test_dro_rates_pairs_without_scores_and_says_so(job, tmp_path, capsys):
    assert job("train", loss="dro", per_device_train_batch_size=32) == 0
    said = "training data: 16 of 16 pairs have no scores: chosen is rated 1, rejected 0\n"
    assert said in capsys.readouterr().out
    assert log_of(tmp_path / "run")[0]["reward_model/mean"] == pytest.approx(0.5)


def test_only_scores_of_the_data_are_kept_of_judged_pairs(capsys):
    scored, plain = pairs(2)
    judged = as_judged([scored | SCORES, plain])
    assert [row.get("reward") for row in judged] == [3.0, 1.0, None, None]
    assert [row["desirable"] for row in judged] == [True, False] * 2
    assert [row["reward"] for row in as_points([scored | SCORES, plain])] == [3.0, 1.0, 1.0, 0.0]
    assert capsys.readouterr().out.startswith("1 of 2 pairs have no scores: ")
    as_points([scored | SCORES])
    assert not capsys.readouterr().out


def test_completions_that_make_no_pairs_are_an_error_with_a_remedy(job, tmp_path, capsys):
    labelled = completions(label=[True, False] * 4)
    file = write_lines(tmp_path / "kto.jsonl", labelled)
    assert job("train", dataset=file, loss="dpo") == 2
    problem = capsys.readouterr().err.splitlines()[-1]
    assert "dataset: rows: got single completions, not all with reward and group" in problem
    assert "needs pairs" in problem and "a loss such as kto" in problem
    assert job("train", loss="kto", dataset=file, held_out=file) == 2
    assert "held_out: rows: got single completions" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(ValueError, match="not all with group, needs pairs"):
        as_judged([row | {"reward": 1.0} for row in completions()])
    with pytest.raises(ValueError, match="got no prompt with two completions of different reward"):
        as_pairs([row | {"reward": 1.0, "group": 0} for row in completions()])
    with pytest.raises(ValueError, match="label: got some rows without, needs one in each"):
        as_judged([row | more for row in completions(1) for more in ({"desirable": True}, {})])


def test_the_adapter_of_the_configuration_decides(job, tmp_path, capsys):
    rows = [
        row | {"completion": row["chosen"], "label": index % 2}
        for index, row in enumerate(pairs(8))
    ]
    file = write_lines(tmp_path / "both.jsonl", rows)
    assert job("train", dataset=file, loss="dpo") == 2
    problem = capsys.readouterr().err.splitlines()[-1]
    assert "dataset: columns: got 'prompt', 'chosen', 'rejected', 'completion', 'label'" in problem
    assert "which fit pairs and completions" in problem and "adapter: NAME" in problem
    assert job("train", dataset=file, loss="dpo", adapter="preference") == 0
    assert f"{file}: read by adapter preference\n" in capsys.readouterr().out
    other = str(tmp_path / "kto")
    assert job("train", dataset=file, loss="kto", adapter="completions", output_dir=other) == 0
    assert "training completions: read 8, kept 8" in capsys.readouterr().out


def test_dialogues_and_raw_chats_train_without_an_adapter(job, tmp_path, capsys):
    dialogues = [
        {
            side: f"\n\nHuman: {row['prompt']}\n\nAssistant: {row[side]}"
            for side in ("chosen", "rejected")
        }
        for row in pairs(8)
    ]
    file = write_lines(tmp_path / "hh.jsonl", dialogues)
    assert job("train", dataset=file) == 0
    assert f"{file}: read as pairs of dialogues in HH-RLHF's form" in capsys.readouterr().out
    rows = [
        {"prompt": row["prompt"], "prompt_id": str(index), "messages": [], **SCORES}
        | {
            side: [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row[side]},
            ]
            for side in ("chosen", "rejected")
        }
        for index, row in enumerate(pairs(8))
    ]
    file = write_lines(tmp_path / "raw.jsonl", rows)
    assert job("train", dataset=file, loss="odpo", output_dir=str(tmp_path / "odpo")) == 0
    said = capsys.readouterr().out
    assert f"{file}: read as pairs of whole chats (adapter ultrafeedback_binarized)\n" in said
