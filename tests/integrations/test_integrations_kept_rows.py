"""TRL's data sets under truncation: dead rows are dropped, all are counted, streams are told of."""

from __future__ import annotations

import logging
import math
import random

import pytest
import torch
from data_tokenizer import tiny_tokenizer
from tiny_models import tiny_llama

pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402
from test_integrations_trl import options  # noqa: E402
from trl.trainer.dpo_trainer import DataCollatorForPreference  # noqa: E402
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference  # noqa: E402

from fused_prefopt.integrations.kept_rows import _Cut  # noqa: E402
from fused_prefopt.integrations.trl import (  # noqa: E402
    FusedDPOConfig,
    FusedDPOTrainer,
    FusedKTOConfig,
    FusedKTOTrainer,
)

# A completion ends with one token more than it has words.
FITS = {"prompt": "the cat", "chosen": " sat", "rejected": " on"}
LONG = {"prompt": "the cat", "chosen": " sat on mat 1 2", "rejected": " on"}
EQUAL_WHEN_CUT = {"prompt": "the cat", "chosen": " sat on mat 1", "rejected": " sat on mat 2"}
EQUAL_ANYWAY = {"prompt": "the cat", "chosen": " sat", "rejected": " sat"}
PROMPT_ALONE = {"prompt": "the cat sat on mat", "chosen": " 1", "rejected": " 2"}
PAIRS = [FITS, EQUAL_WHEN_CUT, LONG, EQUAL_ANYWAY, PROMPT_ALONE, FITS | {"prompt": "mat"}]
SAID = (
    "read 6, kept 3; completions truncated 3, prompts truncated 0, sides equal 2, without a"
    " completion 1; raise max_length (5)"
)


def dpo(folder, data, **changes):
    given = {"max_length": 5, "per_device_train_batch_size": 2} | changes
    more = {name: given.pop(name) for name in ("eval_dataset",) if name in given}
    if not given.get("precompute_ref_log_probs"):
        more["ref_model"] = tiny_llama(5)
    return FusedDPOTrainer(
        tiny_llama(),
        args=FusedDPOConfig(**options(folder, **given)),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
        **more,
    )


def kto(folder, data, **changes):
    given = {"max_length": 5, "per_device_train_batch_size": 3} | changes
    return FusedKTOTrainer(
        tiny_llama(),
        ref_model=tiny_llama(5),
        args=FusedKTOConfig(**options(folder, **given)),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
    )


def told(caplog):
    """Level and text of what this package said of rows."""
    return [(each.levelname, each.getMessage()) for each in caplog.records if _is_ours(each)]


def _is_ours(record):
    return record.name.startswith("fused_prefopt") and "data: " in record.getMessage()


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 1, 4, 7, 40])
def test_rows_are_cut_as_trls_collators_cut_them(mode, max_length):
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
            _, sides = _Cut(max_length, mode, pairwise)(row)
            for i, (prompt, completion) in enumerate(sides):
                count = len(prompt) + len(completion)
                assert batch["attention_mask"][i].sum() == count
                assert batch["input_ids"][i, :count].tolist() == [*prompt, *completion]
                mask = [0] * len(prompt) + [1] * len(completion)
                assert batch["completion_mask"][i, :count].tolist() == mask


def test_dead_pairs_are_dropped_and_all_are_counted_for_each_data_set(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        sets = {"all": Dataset.from_list(PAIRS), "short": Dataset.from_list([FITS])}
        run = dpo(tmp_path, Dataset.from_list(PAIRS), eval_dataset=sets)
    assert run.train_dataset["prompt"] == ["the cat", "the cat", "mat"]
    assert run.train_dataset["chosen"] == [" sat</s>", " sat on mat 1 2</s>", " sat</s>"]
    assert len(run.eval_dataset["all"]) == 3 and len(run.eval_dataset["short"]) == 1
    assert told(caplog) == [
        ("WARNING", f"train data: {SAID}"),
        ("WARNING", f"all data: {SAID}"),
        (
            "INFO",
            "short data: read 1, kept 1; completions truncated 0, prompts truncated 0, sides equal"
            " 0, without a completion 0",
        ),
    ]
    masks = run.data_collator(list(run.train_dataset))["completion_mask"]
    assert masks.sum(1).tolist() == [2, 3, 2, 2, 2, 2]


def test_from_the_end_it_is_the_prompt_that_is_cut(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run = dpo(tmp_path, Dataset.from_list(PAIRS), truncation_mode="keep_end")
    assert run.train_dataset["chosen"][1] == " sat on mat 1</s>" and len(run.train_dataset) == 5
    assert told(caplog) == [
        (
            "WARNING",
            "train data: read 6, kept 5; completions truncated 1, prompts truncated 3, sides equal"
            " 1, without a completion 0; raise max_length (5)",
        )
    ]


@pytest.mark.slow
def test_references_computed_before_training_are_of_the_rows_that_are_left(tmp_path):
    left = [FITS, LONG, FITS | {"prompt": "mat"}]
    runs = [
        dpo(tmp_path, Dataset.from_list(rows), precompute_ref_log_probs=True, max_steps=2)
        for rows in (PAIRS, left)
    ]
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        values, wanted = (torch.tensor(run.train_dataset[name]) for run in runs)
        assert values.shape == (3,)
        torch.testing.assert_close(values, wanted, rtol=0, atol=0)
    assert math.isfinite(runs[0].train().training_loss)


COMPLETIONS = [
    {"prompt": "the", "completion": " cat", "label": True},
    {"prompt": "", "completion": "", "label": False},
    {"prompt": "the cat", "completion": " sat on mat 1", "label": False},
    {"prompt": "the cat sat on mat", "completion": " 1", "label": True},
    {"prompt": "on", "completion": " 1", "label": True},
    {"prompt": "mat", "completion": " 2", "label": False},
]


def test_dead_completions_are_dropped_and_the_others_are_mismatched_among_themselves(
    tmp_path, caplog
):
    with caplog.at_level(logging.INFO):
        data = kto(tmp_path, Dataset.from_list(COMPLETIONS)).train_dataset
    assert data["prompt"] == ["the", "the cat", "on", "mat"]
    own = data["completion_ids"][:]
    # Batches of three: each has the completion before its own, the first the last one's.
    assert data["KL_completion_ids"][:] == [own[2], own[0], own[1], own[3]]
    assert told(caplog) == [
        (
            "WARNING",
            "train data: read 6, kept 4; completions truncated 2, prompts truncated 0, without a"
            " completion 2; raise max_length (5)",
        )
    ]


@pytest.mark.slow
def test_training_on_what_is_left_is_training_without_the_dead_rows(tmp_path):
    alive = [COMPLETIONS[i] for i in (0, 2, 4, 5)]
    runs = [kto(tmp_path, Dataset.from_list(rows), max_steps=3) for rows in (COMPLETIONS, alive)]
    losses = []
    for run in runs:
        run.train()
        losses.append([row["loss"] for row in run.state.log_history if "loss" in row])
    assert len(losses[0]) == 3 and losses[0] == losses[1]
    assert not [row for row in runs[0].state.log_history if "reward_model/mean" in row]


def test_of_pairs_without_scores_both_completions_are_counted(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        data = kto(tmp_path, Dataset.from_list([*PAIRS[:3], PROMPT_ALONE])).train_dataset
    assert len(data) == 6
    assert told(caplog)[0][1].startswith("train data: read 8, kept 6; completions truncated 5,")


def test_a_stream_loses_its_dead_rows_and_tells_of_the_first(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        stream = Dataset.from_list(PAIRS * 2).to_iterable_dataset()
        run = dpo(tmp_path, stream)
        rows = list(run.train_dataset)
        assert [row["prompt"] for row in rows] == ["the cat", "the cat", "mat"] * 2
    ((level, message),) = told(caplog)
    assert level == "WARNING" and "two equal sides" in message and "max_length is 5" in message
    caplog.clear()
    with caplog.at_level(logging.INFO):
        stream = Dataset.from_list(COMPLETIONS).to_iterable_dataset()
        rows = list(kto(tmp_path, stream).train_dataset)
    assert [row["prompt"] for row in rows] == ["the", "the cat", "on", "mat"]
    assert "without a labelled token" in told(caplog)[0][1]


def test_an_error_says_why_no_row_is_left(tmp_path):
    dead = [EQUAL_ANYWAY, EQUAL_WHEN_CUT, PROMPT_ALONE]
    with pytest.raises(ValueError, match=r"train data: no row is left, .* sides equal 2, without"):
        dpo(tmp_path, Dataset.from_list(dead))


def test_scores_and_labels_of_trls_rows_are_checked_by_the_collators(tmp_path):
    scored = [FITS | {"score_chosen": 2.0, "score_rejected": 1.0}] * 3
    run = dpo(tmp_path, Dataset.from_list(scored))
    rows = list(run.train_dataset)
    assert run.data_collator(rows)["rewards"].tolist() == [2.0] * 3 + [1.0] * 3
    sides = {"ref_chosen_logps": -2.0, "ref_rejected_logps": -3.0}
    for name in ("score_rejected", *sides):
        with pytest.raises(ValueError, match=f"{name}: got nan in feature 1, wanted a finite"):
            run.data_collator([rows[0] | sides, rows[1] | sides | {name: math.nan}])
    rated = Dataset.from_list([COMPLETIONS[0] | {"rating": 4.0, "group": 1}] * 3)
    run = kto(tmp_path, rated, loss="dro")
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
        with pytest.raises(
            ValueError, match=f"{column}: got {value} in feature 1, wanted {wanted}"
        ):
            row = rows[0] | ({column: -1.0} if column.startswith("ref_") else {})
            run.data_collator([row, row | {column: value}])


def test_labels_made_of_ratings_need_ratings(tmp_path):
    rows = [{"prompt": "the", "completion": " cat", "score": score} for score in (2.0, -1.0, None)]
    run = kto(tmp_path, Dataset.from_list(rows[:2]), loss="dro")
    assert run.train_dataset["label"] == [True, False]
    with pytest.raises(ValueError, match=r"score: got None in row 2 .counted from 0."):
        kto(tmp_path, Dataset.from_list(rows), loss="dro")
