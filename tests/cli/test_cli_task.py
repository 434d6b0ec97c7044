"""What a configuration makes of its data: features for every loss, what truncation did."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from command_line_jobs import RATED, pairs, sentences, write_lines
from data_tokenizer import tiny_tokenizer

from fused_prefopt.cli import data_files
from fused_prefopt.cli.config import Settings
from fused_prefopt.cli.console import UserError
from fused_prefopt.cli.models import texts_of
from fused_prefopt.cli.needs import check_fields
from fused_prefopt.cli.task import (
    _features,
    as_judged,
    as_pairs,
    as_points,
    held_out_records,
    load_loss,
    training_records,
)
from fused_prefopt.data import completions as as_completions
from fused_prefopt.data import tokenise_pairs
from fused_prefopt.losses import available_losses

pytest.importorskip("datasets")
SCORES = {"score_chosen": 3.0, "score_rejected": 1.0}


def completions(count: int = 8, **columns: Sequence) -> list[dict]:
    """Rows of single completions, each with its value of every column."""
    texts = sentences(2 * count, seed=3)
    rows = [{"prompt": p, "completion": c} for p, c in zip(texts[::2], texts[1::2], strict=True)]
    return [
        row | {name: values[i] for name, values in columns.items()} for i, row in enumerate(rows)
    ]


def test_splits_of_one_data_set_are_named_once(monkeypatch, capsys):
    monkeypatch.setattr(data_files, "_rows", lambda name, split, limit: pairs(2))
    settings = Settings(model="unused", dataset="someone/pairs", held_out="test")
    assert len(training_records(settings, 0, points=False)) == 2
    assert len(held_out_records(settings, 0)) == 2
    said = capsys.readouterr().out
    assert said == "someone/pairs: read as preference pairs (adapter preference)\n"


@pytest.mark.parametrize(
    ("loss", "name", "values", "kind"),
    [
        ("dro", "score", [0.5 * i for i in range(8)], "rated"),
        ("kto", "label", [1, 0, 0, True] * 2, "labelled"),
    ],
)
def test_judgements_are_read_without_an_adapter(loaded, tmp_path, capsys, loss, name, values, kind):
    file = write_lines(tmp_path / "judged.jsonl", completions(**{name: values}))
    column = {"rated": "reward", "labelled": "desirable"}[kind]
    assert [row[column] for row in loaded(dataset=file, loss=loss).train] == values
    said = capsys.readouterr().out
    assert f"{file}: read as {kind} completions (adapter completions)\n" in said
    assert "training completions: read 8, kept 8; completions truncated 0, prompts tr" in said


@pytest.mark.parametrize(
    ("loss", "rows", "message"),
    [
        ("dro", completions(score=[1.0, None] * 4), "got no reward, needs it for dro; 4 of 8 rows"),
        (
            "kto",
            completions(label=["bad", "good"] * 4),
            "label: got 'bad' in row 0 (counted from 0), wanted true or false, or 1 or 0; map what"
            " is desirable to true",
        ),
        (
            "dpo",
            [row | SCORES | {"score_chosen": score} for score in ("8", "x") for row in pairs(1)],
            "score_chosen: got 'x' in row 1 (counted from 0), wanted a finite",
        ),
        (
            "dpo",
            completions(label=[True, False] * 4),
            "rows: got single completions, not all with reward and group, needs pairs, which",
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused(refused, tmp_path, loss, rows, message):
    said = refused(dataset=write_lines(tmp_path / "rows.jsonl", rows), loss=loss)
    assert said.startswith(f"dataset: {message}")


def test_completions_that_make_no_pairs_are_an_error_with_a_remedy(refused, tmp_path):
    file = write_lines(tmp_path / "kto.jsonl", completions(label=[True, False] * 4))
    said = refused(loss="kto", dataset=file, held_out=file)
    assert said.startswith("held_out: rows: got single completions") and "such as kto" in said
    with pytest.raises(ValueError, match="not all with group, needs pairs"):
        as_judged([row | {"reward": 1.0} for row in completions()])
    with pytest.raises(ValueError, match="got no prompt with two completions of different reward"):
        as_pairs([row | {"reward": 1.0, "group": 0} for row in completions()])
    with pytest.raises(ValueError, match="label: got some rows without, needs one in each"):
        as_judged([row | more for row in completions(1) for more in ({"desirable": True}, {})])


def test_only_scores_of_the_data_are_kept_of_judged_pairs(capsys):
    scored, plain = pairs(2)
    judged = as_judged([scored | SCORES, plain])
    assert [row.get("reward") for row in judged] == [3.0, 1.0, None, None]
    assert [row["desirable"] for row in judged] == [True, False] * 2
    assert [row["reward"] for row in as_points([scored | SCORES, plain])] == [3.0, 1.0, 1.0, 0.0]
    assert capsys.readouterr().out.startswith("1 of 2 pairs have no scores: ")
    as_points([scored | SCORES])
    assert not capsys.readouterr().out


def test_best_and_worst_of_rated_completions_are_a_pair():
    (pair,) = as_pairs(RATED)
    assert (pair["chosen"], pair["rejected"]) == ("cat cat", "mat 1")
    judged = as_judged(RATED)
    assert [(row["completion"], row["desirable"]) for row in judged] == [
        ("cat cat", True),
        ("mat 1", False),
    ]
    assert as_points(RATED) is RATED and as_pairs(pairs(2)) == pairs(2)
    assert [point["completion"] for point in as_points(pairs(1))] == [
        pairs(1)[0][side] for side in ("chosen", "rejected")
    ]


def test_rows_of_completions_keep_their_judgement_under_either_name():
    rows = [
        {"prompt": "a", "completion": "b", "label": True, "extra": 1},
        {"prompt": "a", "completion": "c", "desirable": False, "reward": 2.0, "group": 1},
    ]
    found = as_completions(rows)
    assert found == [{"prompt": "a", "completion": "b", "desirable": True}, rows[1]]
    assert as_judged(found) == found
    with pytest.raises(ValueError, match="'completion'"):
        as_completions([{"prompt": "a"}])


def test_the_adapter_of_the_configuration_decides(loaded, refused, tmp_path, capsys):
    rows = [
        row | {"completion": row["chosen"], "label": index % 2}
        for index, row in enumerate(pairs(8))
    ]
    file = write_lines(tmp_path / "both.jsonl", rows)
    said = refused(dataset=file, loss="dpo")
    assert "dataset: columns: got 'prompt', 'chosen', 'rejected', 'completion', 'label'" in said
    assert "which fit pairs and completions" in said and "adapter: NAME" in said
    loaded(dataset=file, loss="dpo", adapter="preference")
    assert f"{file}: read by adapter preference; columns not read: 'com" in capsys.readouterr().out
    points = loaded(dataset=file, loss="kto", adapter="completions").train
    assert "training completions: read 8, kept 8" in capsys.readouterr().out
    assert [point["desirable"] for point in points] == [False, True] * 4


def test_files_are_read_to_the_limit_by_the_adapter_that_is_named(material, tmp_path):
    file = write_lines(tmp_path / "rated.jsonl", RATED)
    settings = Settings(model="unused", dataset=file, adapter="completions", limit=2)
    assert training_records(settings, 0, points=True) == RATED[:2]
    held_out = str(material / "held_out.jsonl")
    settings = Settings(model="unused", held_out=held_out, held_out_limit=3)
    assert held_out_records(settings, 0) == pairs(6, seed=1)[:3]
    assert held_out_records(Settings(model="unused"), 0) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"\nx', "cannot read .*: JSON parse error"),
        ("", "got no usable row in"),
    ],
)
def test_files_without_pairs_are_told_apart(material, tmp_path, content, message):
    file = tmp_path / "odd.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        training_records(Settings(model="unused", dataset=str(file)), 0, points=False)


@pytest.mark.parametrize("name", available_losses())
@pytest.mark.parametrize("records", [pairs(2, score_chosen=1.0, score_rejected=0.0), RATED])
def test_pairs_and_rated_completions_become_what_every_loss_needs(name, records):
    settings = Settings(model="unused", loss=name, max_length=32)
    loss_fn = load_loss(settings)
    features = _features(settings, loss_fn, tiny_tokenizer(), records)
    if "gold" in loss_fn.loss.needs:
        with pytest.raises(UserError, match=f"{name} needs `gold`, .* does not compute"):
            check_fields(loss_fn, features)
        return
    check_fields(loss_fn, features)
    if loss_fn.loss.pairwise:
        assert features[0].keys() >= {"chosen_ids", "rejected_ids", "score_chosen"}
    elif "desirable" in loss_fn.loss.needs:
        assert [feature["desirable"] for feature in features[:2]] == [True, False]
    else:
        assert [feature["reward"] for feature in features[:2]] in ([1, 0], [0.5, 0.25])


def test_a_sum_is_a_text_or_a_list_and_needs_what_its_terms_need():
    terms = ["dpo", {"name": "odpo", "weight": 0.5, "hyperparameters": {"alpha": 2.0}}]
    for loss in ("dpo + 0.5 odpo", terms):
        loss_fn = load_loss(Settings(model="unused", loss=loss, loss_kwargs={"beta": 0.3}))
        assert loss_fn.name == "dpo + 0.5 odpo"
        assert loss_fn.hyperparameters["odpo"]["beta"] == 0.3
        features = tokenise_pairs(pairs(1), tiny_tokenizer(), 32, 16)
        with pytest.raises(UserError, match=r"needs it for dpo \+ 0.5 odpo"):
            check_fields(loss_fn, features)
    assert loss_fn.hyperparameters["odpo"]["alpha"] == 2.0
    with pytest.raises(UserError, match="loss: unknown loss 'sftt' .did you mean 'sft'"):
        load_loss(Settings(model="unused", loss="dpo + sftt"))


def test_a_margin_more_brings_its_needs():
    kwargs = {"beta": 0.5, "margin": {"name": "adaptive", "statistics": "batch"}}
    loss_fn = load_loss(Settings(model="unused", loss="simpo + sft", loss_kwargs=kwargs))
    assert loss_fn.loss.needs == {"reference"} and loss_fn.loss.terms[0].loss.margin.scale == 0.5
    kwargs["margin"] = {"name": "adaptive", "tau": 1.0}
    with pytest.raises(UserError, match="loss: margin of simpo: adaptive: got 'tau', wanted gamma"):
        load_loss(Settings(model="unused", loss="simpo", loss_kwargs=kwargs))


def test_truncated_pairs_are_counted_and_those_left_equal_are_not_trained_on(
    loaded, refused, tmp_path, capsys
):
    rows = [
        {"prompt": "the", "chosen": f"cat {'on ' * i}1", "rejected": f"cat {'on ' * i}2"}
        for i in range(5)
    ]
    file = write_lines(tmp_path / "long.jsonl", rows)
    assert len(loaded(dataset=file, max_length=5).train) == 3
    assert (
        "training pairs: read 5, kept 3; completions truncated 3, prompts truncated 0, sides equal"
        " 2, without a completion 0; raise max_length (5), which cuts 60% of the rows\n"
    ) in capsys.readouterr().out
    said = refused(dataset=file, max_length=2, max_prompt_length=1)
    assert "dataset: records: no row is left, needs at least one; training pairs: read 5" in said
    assert "sides equal 5" in said and "raise max_length (2)" in said


def test_texts_are_every_string_and_message():
    chat = {"prompt": [{"role": "user", "content": "x"}], "completion": "y"}
    assert list(texts_of([*pairs(1), chat])) == [*pairs(1)[0].values(), "x", "y"]
