"""TRL's data sets: dead rows are dropped, all are counted, values no loss can take are refused."""

from __future__ import annotations

import logging
import math
import random
import re

import pytest
import torch
from tiny_models import pair_features, point_features, tiny_llama
from trainers import LABELS, OF_TRL, build, dataset, history, pairs, points

from fused_prefopt.integrations.trl.rows import Cut

pytest.importorskip("trl")
Dataset = pytest.importorskip("datasets").Dataset

# A completion ends with one token more than it has words.
FITS = {"prompt": "the cat", "chosen": " sat", "rejected": " on"}
LONG = {"prompt": "the cat", "chosen": " sat on mat 1 2", "rejected": " on"}
EQUAL_WHEN_CUT = {"prompt": "the cat", "chosen": " sat on mat 1", "rejected": " sat on mat 2"}
EQUAL_ANYWAY = {"prompt": "the cat", "chosen": " sat", "rejected": " sat"}
PROMPT_ALONE = {"prompt": "the cat sat on mat", "chosen": " 1", "rejected": " 2"}
PAIRS = [FITS, EQUAL_WHEN_CUT, LONG, EQUAL_ANYWAY, PROMPT_ALONE, FITS | {"prompt": "mat"}]
COMPLETIONS = [
    {"prompt": "the", "completion": " cat", "label": True},
    {"prompt": "", "completion": "", "label": False},
    {"prompt": "the cat", "completion": " sat on mat 1", "label": False},
    {"prompt": "the cat sat on mat", "completion": " 1", "label": True},
    {"prompt": "on", "completion": " 1", "label": True},
    {"prompt": "mat", "completion": " 2", "label": False},
]
BATCH = {"dpo": 2, "kto": 3}
SAID = {
    "dpo": "read 6, kept 3; completions truncated 3, prompts truncated 0, sides equal 2, without a"
    " completion 1; raise max_length (5)",
    "kto": "read 6, kept 4; completions truncated 2, prompts truncated 0, without a completion 2;"
    " raise max_length (5)",
}


def cut(kind, folder, rows, **changes):
    """A trainer that cuts rows to five tokens."""
    data = dataset(rows) if isinstance(rows, list) else rows
    options = {"max_length": 5, "per_device_train_batch_size": BATCH[kind]} | changes
    return build(kind, folder, data, **options)


@pytest.fixture
def told(caplog):
    """Level and text of what this package said of rows, since the last time."""
    caplog.set_level(logging.INFO)

    def found():
        rows = [(each.levelname, each.getMessage()) for each in caplog.records if _is_ours(each)]
        caplog.clear()
        return rows

    return found


def _is_ours(record):
    return record.name.startswith("fused_prefopt") and "data: " in record.getMessage()


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 1, 4, 7, 40])
def test_rows_are_cut_as_trls_collators_cut_them(mode, max_length):
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    draw = random.Random(0)

    def ids(low):
        return [draw.randint(1, 60) for _ in range(draw.randint(low, 6))]

    for _ in range(40):
        row = {"prompt_ids": ids(0), "chosen_ids": ids(1), "rejected_ids": ids(1)}
        row["completion_ids"], row["label"] = row["chosen_ids"], True
        collated = {True: DataCollatorForPreference(0, max_length, mode)([row])}
        if mode == "keep_start":
            collated[False] = DataCollatorForUnpairedPreference(0, max_length)([row])
        for pairwise, batch in collated.items():
            _, sides = Cut(max_length, mode, pairwise)(row)
            for i, (prompt, completion) in enumerate(sides):
                count = len(prompt) + len(completion)
                assert batch["attention_mask"][i].sum() == count
                assert batch["input_ids"][i, :count].tolist() == [*prompt, *completion]
                mask = [0] * len(prompt) + [1] * len(completion)
                assert batch["completion_mask"][i, :count].tolist() == mask


def test_dead_pairs_are_dropped_and_all_are_counted_for_each_data_set(tmp_path, told):
    sets = {"all": dataset(PAIRS), "short": dataset([FITS])}
    run = cut("dpo", tmp_path, PAIRS, given={"eval_dataset": sets})
    assert run.train_dataset["prompt"] == ["the cat", "the cat", "mat"]
    assert run.train_dataset["chosen"] == [" sat</s>", " sat on mat 1 2</s>", " sat</s>"]
    assert len(run.eval_dataset["all"]) == 3 and len(run.eval_dataset["short"]) == 1
    short = (
        "short data: read 1, kept 1; completions truncated 0, prompts truncated 0, sides equal 0,"
        " without a completion 0"
    )
    both = [("WARNING", f"{name} data: {SAID['dpo']}") for name in ("train", "all")]
    assert told() == [*both, ("INFO", short)]
    masks = run.data_collator(list(run.train_dataset))["completion_mask"]
    assert masks.sum(1).tolist() == [2, 3, 2, 2, 2, 2]


def test_from_the_end_it_is_the_prompt_that_is_cut(tmp_path, told):
    run = cut("dpo", tmp_path, PAIRS, truncation_mode="keep_end")
    assert run.train_dataset["chosen"][1] == " sat on mat 1</s>" and len(run.train_dataset) == 5
    said = (
        "train data: read 6, kept 5; completions truncated 1, prompts truncated 3, sides equal 1,"
        " without a completion 0; raise max_length (5)"
    )
    assert told() == [("WARNING", said)]


def test_dead_completions_are_dropped_and_the_others_are_mismatched_among_themselves(
    tmp_path, told
):
    data = cut("kto", tmp_path, COMPLETIONS).train_dataset
    assert data["prompt"] == ["the", "the cat", "on", "mat"]
    own = data["completion_ids"][:]
    # Batches of three: each has the completion before its own, the first the last one's.
    assert data["KL_completion_ids"][:] == [own[2], own[0], own[1], own[3]]
    assert told() == [("WARNING", f"train data: {SAID['kto']}")]
    # Of pairs without scores both completions are counted.
    data = cut("kto", tmp_path, [*PAIRS[:3], PROMPT_ALONE]).train_dataset
    assert len(data) == 6
    assert told()[0][1].startswith("train data: read 8, kept 6; completions truncated 5,")


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_TRL)
def test_training_on_what_is_left_is_training_without_the_dead_rows(tmp_path, kind):
    every = PAIRS if kind == "dpo" else COMPLETIONS
    left = [every[i] for i in ((0, 2, 5) if kind == "dpo" else (0, 2, 4, 5))]
    options = {"precompute_ref_log_probs": kind == "dpo", "max_steps": 3}
    runs = [cut(kind, tmp_path, rows, **options) for rows in (every, left)]
    if kind == "dpo":
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            values, wanted = (run.train_dataset[name][:] for run in runs)
            assert values == wanted and len(values) == 3
    losses = []
    for run in runs:
        run.train()
        losses.append(history(run, "loss"))
        assert not history(run, "reward_model/mean")
    assert len(losses[0]) == 3 and losses[0] == losses[1]


@pytest.mark.parametrize("kind", OF_TRL)
def test_a_stream_loses_its_dead_rows_and_tells_of_the_first(tmp_path, told, kind):
    rows = (PAIRS if kind == "dpo" else COMPLETIONS) * 2
    run = cut(kind, tmp_path, dataset(rows).to_iterable_dataset())
    left = {"dpo": ["the cat", "the cat", "mat"], "kto": ["the", "the cat", "on", "mat"]}[kind]
    assert [row["prompt"] for row in run.train_dataset] == left * 2
    ((level, message),) = told()
    why = {"dpo": "with two equal sides", "kto": "without a labelled token"}[kind]
    assert level == "WARNING" and why in message and "max_length is 5" in message


def test_an_error_says_why_no_row_is_left(tmp_path):
    dead = [EQUAL_ANYWAY, EQUAL_WHEN_CUT, PROMPT_ALONE]
    with pytest.raises(ValueError, match=r"train data: no row is left, .* sides equal 2, without"):
        cut("dpo", tmp_path, dead)


def test_scores_and_labels_are_checked_by_the_collators(tmp_path):
    run = build("dpo", tmp_path, pairs(3, score_chosen=[2.0] * 3, score_rejected=[1.0] * 3))
    rows = list(run.train_dataset)
    assert run.data_collator(rows)["rewards"].tolist() == [2.0] * 3 + [1.0] * 3
    sides = {"ref_chosen_logps": -2.0, "ref_rejected_logps": -3.0}
    for name in ("score_rejected", *sides):
        with pytest.raises(ValueError, match=f"{name}: got nan in feature 1, wanted a finite"):
            run.data_collator([rows[0] | sides, rows[1] | sides | {name: math.nan}])
    columns = {"label": [True] * 3, "rating": [4.0] * 3, "group": [1] * 3}
    run = build("kto", tmp_path, points(3, **columns), loss="dro")
    rows = list(run.train_dataset)
    assert run.data_collator(rows)["rewards"].tolist() == [4.0] * 3
    for column, value, wanted in (
        ("rating", math.inf, "a finite number"),
        ("group", 0.5, "an integer"),
        ("label", -1, "true or false"),
        ("ref_logps", -math.inf, "a finite number"),
        ("ref_KL_logps", math.nan, "a finite number"),
        ("ref_prompt_logps", math.nan, "a finite number"),
    ):
        row = rows[0] | ({column: -1.0} if column.startswith("ref_") else {})
        message = f"{column}: got {value} in feature 1, wanted {wanted}"
        with pytest.raises(ValueError, match=message):
            run.data_collator([row, row | {column: value}])


def test_labels_made_of_ratings_need_ratings(tmp_path):
    rows = [{"prompt": "the", "completion": " cat", "score": score} for score in (2.0, -1.0, None)]
    run = build("kto", tmp_path, dataset(rows[:2]), loss="dro")
    assert run.train_dataset["label"] == [True, False]
    with pytest.raises(ValueError, match=r"score: got None in row 2 .counted from 0."):
        build("kto", tmp_path, dataset(rows), loss="dro")


def spoiled(kind, column, value):
    """Sixteen rows, the sixth with `value` in `column`; a text in all of them."""
    numbers = [-1.0] * 16
    if kind == "dpo":
        other = column.replace("chosen", "rejected")
        return pairs(**{other: numbers, column: [*numbers[:5], value, *numbers[6:]]})
    columns = {"label": LABELS, "group": [0] * 16}
    good = LABELS if column == "label" else numbers
    if isinstance(value, str):
        good = [value] * 16
    elif column == "label":
        good = [int(each) for each in good]
    return points(**columns | {column: [*good[:5], value, *good[6:]]})


BAD = [
    ("dpo", "score_chosen", math.nan),
    ("kto", "reward", math.inf),
    ("kto", "label", -1),
    ("dpo", "ref_chosen_logps", -math.inf),
    ("kto", "score", "good"),
    ("kto", "ref_logps", math.nan),
    ("kto", "label", 2),
    ("kto", "label", "false"),
]


def wanted_of(column, value, where):
    wanted = "true or false, or 1 or 0; map" if column == "label" else "a finite number; repair"
    return "^" + re.escape(f"{column}: got {value!r} in {where}, wanted {wanted}")


@pytest.mark.parametrize(("kind", "column", "value"), BAD)
def test_a_value_that_no_loss_can_take_is_refused_with_its_row(tmp_path, kind, column, value):
    bad = spoiled(kind, column, value)
    row = f"row {0 if isinstance(value, str) else 5} (counted from 0)"
    with pytest.raises(ValueError, match=wanted_of(column, value, f"{row} of train_dataset")):
        build(kind, tmp_path, bad)
    wanted = wanted_of(column, value, f"{row} of eval_dataset['hard']")
    with pytest.raises(ValueError, match=wanted):
        build(kind, tmp_path, given={"eval_dataset": {"hard": bad}})


@pytest.mark.parametrize(("kind", "column", "value"), BAD[:3])
def test_in_a_stream_it_is_refused_when_it_comes(tmp_path, kind, column, value):
    stream = spoiled(kind, column, value).to_iterable_dataset()
    run = build(kind, tmp_path, stream, per_device_train_batch_size=8)
    with pytest.raises(ValueError, match=wanted_of(column, value, "feature 5")):
        run.train()


@pytest.mark.parametrize("kind", OF_TRL)
def test_a_reference_that_gives_nan_is_refused_before_training(tmp_path, kind):
    reference = tiny_llama(5)
    torch.nn.init.constant_(reference.model.norm.weight, math.nan)
    with pytest.raises(ValueError, match=r"^ref_\w+: got nan in row 0 .*of train_dataset"):
        build(kind, tmp_path, reference=reference, precompute_ref_log_probs=True)


@pytest.mark.parametrize("kind", OF_TRL)
def test_references_computed_ahead_are_kept_by_the_cut(tmp_path, kind):
    """Rows of token ids on a disk are the same whatever a collator leaves of them."""
    features = pair_features(4) if kind == "dpo" else point_features(4)
    dataset([row | {"label": True} for row in features]).save_to_disk(tmp_path / "rows")
    loss = "dpo" if kind == "dpo" else "apo-zero-unpaired"
    for cut in ({}, {"max_length": 9}, {"max_length": 7}):
        for mode in ("keep_start", "keep_end") if kind == "dpo" else (None,):
            options = cut | ({"truncation_mode": mode} if mode else {})
            data = Dataset.load_from_disk(tmp_path / "rows")
            ahead, plain = (
                build(kind, tmp_path, data, loss=loss, reference=tiny_llama(5), **options | given)
                for given in ({"precompute_ref_log_probs": True}, {})
            )
            batch = plain.data_collator(list(plain.train_dataset))
            wanted = plain.compute_ref_log_probs(plain.ref_model, batch)
            names = ("ref_chosen_logps", "ref_rejected_logps") if mode else ("ref_logps",)
            for name, value in zip(names, wanted, strict=False):
                assert ahead.train_dataset[name][:] == pytest.approx(value.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        (
            "dpo",
            point_features,
            "completion_ids, wanted prompt_ids, chosen_ids, rejected_ids; .*KTO",
        ),
        (
            "kto",
            pair_features,
            "chosen_ids, rejected_ids, wanted prompt_ids, completion_ids; .*DPO",
        ),
    ],
)
def test_token_ids_of_the_other_trainer_are_refused(tmp_path, kind, rows, message):
    named = "train_dataset: got token ids in prompt_ids, "
    with pytest.raises(ValueError, match=named + message):
        build(kind, tmp_path, dataset(rows(4)))
    with pytest.raises(ValueError, match=r"eval_dataset\['held out'\]: got token ids in"):
        build(kind, tmp_path, given={"eval_dataset": {"held out": dataset(rows(4))}})
