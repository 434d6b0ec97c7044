"""Data with scores in some rows only: no scores for losses that need none, an error for others."""

from __future__ import annotations

import logging

import pytest
import torch
from data_tokenizer import tiny_tokenizer
from tiny_models import pair_features, point_features, tiny_llama

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, PointCollator, preference, tokenise_pairs
from fused_prefopt.data.adapters import ultrafeedback_binarized
from fused_prefopt.integrations.transformers import preference_outputs

NONE = {"score_chosen": None, "score_rejected": None}
# What a batch of pairs without scores has.
BARE = {"input_ids", "attention_mask", "completion_mask", "label_counts"}
SIDES = ("ref_chosen_logps", "ref_rejected_logps")


def rows(*scores):
    words = "the cat sat on mat 1 2".split()
    return [
        {"prompt": words[i], "chosen": "the cat", "rejected": "on mat", **given}
        for i, given in enumerate(scores)
    ]


@pytest.mark.parametrize("lacking", [{}, NONE, {"score_chosen": 2.0, "score_rejected": None}])
def test_pairs_keep_their_scores_where_all_have_them(lacking, caplog):
    scored = {"score_chosen": 8.5, "score_rejected": 1}
    assert [row["score_rejected"] for row in preference(rows(scored, scored))] == [1, 1]
    with caplog.at_level(logging.WARNING):
        records = preference(rows(scored, lacking, scored))
    assert [set(row) for row in records] == [{"prompt", "chosen", "rejected"}] * 3
    assert caplog.messages == ["preference: dropped all scores, 1 of 3 pairs lack them"]
    caplog.clear()
    assert preference(rows(lacking)) == preference(rows({})) and not caplog.messages
    features = tokenise_pairs(records, tiny_tokenizer(), 16, 8)
    assert PairCollator(0)(features).keys() == BARE


def test_an_adapter_of_chats_does_so_too():
    def chat(answer):
        return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]

    chats = [
        {"chosen": chat("yes"), "rejected": chat("no"), "score_chosen": 3.0, "score_rejected": low}
        for low in (1.0, None)
    ]
    assert [len(record) for record in ultrafeedback_binarized(chats)] == [3, 3]
    assert len(ultrafeedback_binarized(chats[:1])[0]) == 5


def with_gap(features, *names, absent):
    """The features, the last without these columns, or with None in them."""
    *others, last = features
    kept = {name: value for name, value in last.items() if name not in names}
    return [*others, kept if absent else kept | dict.fromkeys(names)]


PAIRS = [each | dict.fromkeys(SIDES, -3.0) for each in pair_features(3)]
POINTS = [
    each | {"desirable": True, "reference": -3.0, "prompt_reference": -2.0}
    for each in point_features(3)
]


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize(
    ("collator", "features", "names", "fits", "misfits"),
    [
        (PairCollator(0), PAIRS, tuple(NONE), "dpo", "odpo"),
        (PointCollator(0), POINTS, ("reward",), "kto", "dro"),
    ],
    ids=["pairs", "points"],
)
def test_a_batch_with_a_gap_serves_losses_that_need_no_scores(
    collator, features, names, fits, misfits, absent
):
    batch = collator(with_gap(features, *names, absent=absent))
    assert "rewards" not in batch and "rewards" in collator(features)
    assert preference_outputs(tiny_llama(), fp.PreferenceLoss(fits), batch).loss.isfinite()
    with pytest.raises(ValueError, match=f"{misfits} needs `rewards`"):
        preference_outputs(tiny_llama(), fp.PreferenceLoss(misfits), batch)


def test_columns_of_none_are_no_columns():
    features = [each | dict.fromkeys((*SIDES, *NONE)) for each in pair_features(2)]
    assert PairCollator(0)(features).keys() == BARE


def test_a_column_that_no_row_has_is_a_wrong_name():
    features = [
        {("score_rejectd" if name == "score_rejected" else name): each[name] for name in each}
        for each in pair_features(2)
    ]
    with pytest.raises(ValueError, match=r"'score_rejected' \(did you mean 'score_rejectd'"):
        PairCollator(0)(features)


@pytest.mark.parametrize("loss", ["dpo", "odpo"])
def test_trls_trainer_takes_such_pairs(tmp_path, loss):
    pytest.importorskip("trl")
    from test_integrations_trl import dataset, options, trainer

    from fused_prefopt.integrations.trl import FusedDPOConfig, FusedDPOTrainer

    scores = {"score_chosen": [3.0, 2.0, None, 4.0], "score_rejected": [1.0, None, None, 2.0]}
    config = FusedDPOConfig(**options(tmp_path, max_steps=1), loss=loss)
    run = trainer(FusedDPOTrainer, config, dataset(4, **scores), ref_model=tiny_llama())
    assert "rewards" not in run.data_collator(list(run.train_dataset))
    if loss == "odpo":
        with pytest.raises(ValueError, match="odpo needs `rewards`"):
            run.train()
    else:
        assert torch.tensor(run.train().training_loss).isfinite()


@pytest.mark.parametrize("loss", ["kto", "dro"])
def test_trls_trainer_takes_such_completions(tmp_path, loss):
    pytest.importorskip("trl")
    from test_integrations_points import rows as completions
    from test_integrations_points import trainer
    from test_integrations_trl import options

    from fused_prefopt.integrations.trl import FusedKTOConfig, FusedKTOTrainer

    columns = {"label": [True, False] * 2, "reward": [1.0, None, 0.5, 2.0]}
    config = FusedKTOConfig(**options(tmp_path, max_steps=1), loss=loss)
    run = trainer(FusedKTOTrainer, config, completions(4, **columns), ref_model=tiny_llama())
    assert "rewards" not in run.data_collator(list(run.train_dataset))
    if loss == "dro":
        with pytest.raises(ValueError, match="dro needs `rewards`"):
            run.train()
    else:
        assert torch.tensor(run.train().training_loss).isfinite()
