"""Collators: exact layouts, padded and packed, and TRL's own collator as witness."""

from __future__ import annotations

import pytest
import torch

from fused_prefopt.data import PairCollator, PointCollator, labels_of, prompt_labels_of
from fused_prefopt.data.columns import LABEL_COUNTS
from fused_prefopt.data.labels import counts_of

PAD = 99
PAIRS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11, 12, 13]},
]
POINTS = [
    {"prompt_ids": [1, 2], "completion_ids": [3, 4, 5], "reward": 1.0, "group": 4},
    {"prompt_ids": [1, 2], "completion_ids": [6], "reward": 0.25, "group": 4},
    {"prompt_ids": [7], "completion_ids": [8, 9], "reward": -2, "group": 0},
]
SCORES = {"score_chosen": [1, 0.5], "score_rejected": [0.25, -1]}
REFERENCES = {"ref_chosen_logps": [-1.5, -2.0], "ref_rejected_logps": [-3.25, -4.0]}


def pairs_with(**columns):
    return [
        pair | {name: values[i] for name, values in columns.items()} for i, pair in enumerate(PAIRS)
    ]


def assert_tensors(batch, wanted):
    for name, value in wanted.items():
        value = torch.as_tensor(value)
        torch.testing.assert_close(torch.as_tensor(batch[name]), value, rtol=0, atol=0)


# (ids, where the completion begins and the sequence ends) of each row.
PADDED_PAIRS = [
    ([1, 2, 3, 4, 5, PAD], 3, 5),
    ([7, 8, 9, PAD, PAD, PAD], 2, 3),
    ([1, 2, 3, 6, PAD, PAD], 3, 4),
    ([7, 8, 10, 11, 12, 13], 2, 6),
]
PADDED_POINTS = [
    ([1, 2, 3, 4, 5], 2, 5),
    ([1, 2, 6, PAD, PAD], 2, 3),
    ([7, 8, 9, PAD, PAD], 1, 3),
]
KINDS = [(PairCollator, PAIRS, PADDED_PAIRS), (PointCollator, POINTS, PADDED_POINTS)]
kinds = pytest.mark.parametrize(("kind", "features", "rows"), KINDS, ids=["pairs", "points"])


@kinds
def test_padded(kind, features, rows):
    batch = kind(PAD)(features)
    size = range(len(rows[0][0]))
    wanted = {
        "input_ids": [ids for ids, _, _ in rows],
        "attention_mask": [[int(i < end) for i in size] for _, _, end in rows],
        "completion_mask": [[int(start <= i < end) for i in size] for _, start, end in rows],
    }
    extras = {} if kind is PairCollator else {"rewards": [1.0, 0.25, -2.0], "groups": [4, 4, 0]}
    assert list(batch) == [*wanted, LABEL_COUNTS, *extras]
    assert_tensors(batch, wanted | extras)


@kinds
def test_packed_is_padded_without_the_padding(kind, features, rows):
    padded = kind(PAD)(features)
    packed = kind(PAD, padding_free=True)(features)
    real = padded["attention_mask"].bool()
    of_rows, columns = real.nonzero(as_tuple=True)
    for name in ("input_ids", "completion_mask"):
        assert packed[name].tolist() == [padded[name][real].tolist()]
    assert packed["sequence_ids"].tolist() == [of_rows.tolist()]
    assert packed["position_ids"].tolist() == [columns.tolist()]
    names = ["input_ids", "position_ids", "completion_mask", "sequence_ids", "num_sequences"]
    assert list(packed)[:6] == [*names, LABEL_COUNTS]
    # Placing it on a device leaves an int alone.
    assert type(packed["num_sequences"]) is int and packed["num_sequences"] == len(rows)
    for labels in (labels_of, prompt_labels_of):
        assert labels(packed).tolist() == [labels(padded)[real].tolist()]


@pytest.mark.parametrize(
    ("multiple", "cut", "width"),
    [
        (None, {}, 6),
        (8, {}, 8),
        (None, {"max_length": 4}, 4),
        (None, {"max_length": 4, "truncation_mode": "keep_end"}, 4),
    ],
)
def test_pairs_equal_trl(multiple, cut, width):
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    features = pairs_with(**REFERENCES)
    ours = PairCollator(PAD, pad_to_multiple_of=multiple, **cut)(features)
    theirs = trl.DataCollatorForPreference(PAD, pad_to_multiple_of=multiple, **cut)(features)
    assert set(ours) == {*theirs, LABEL_COUNTS}
    assert_tensors(ours, theirs)
    assert ours["input_ids"].shape[1] == width


def test_a_pair_whose_prompts_are_cut_differently_shares_none():
    """[1 2 3 | 4 5] and [1 2 3 | 6 7 8] within four tokens keep [2 3] and [3] of their prompt."""
    pair = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6, 7, 8]}
    cut = {"max_length": 4, "truncation_mode": "keep_end"}
    batch = PairCollator(PAD, shared_prompt=True, **cut)([pair, pair | {"rejected_ids": [6, 7]}])
    wanted = {
        "input_ids": [[2, 3, 4, 5, 3, 6, 7, 8], [2, 3, 4, 5, 6, 7, PAD, PAD]],
        "position_ids": [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 2, 3, 0, 0]],
        "segments": [[1, 1, 1, 1, 2, 2, 2, 2], [0, 0, 1, 1, 2, 2, 3, 3]],
        "completion_mask": [[0, 0, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0]],
        "predictors": [1, 2, 4, 5, 6, 9, 10, 9, 12],
        "targets": [4, 5, 6, 7, 8, 4, 5, 6, 7],
        "target_sequences": [0, 0, 2, 2, 2, 1, 1, 3, 3],
    }
    assert set(batch) == set(wanted)
    assert_tensors(batch, wanted)


@pytest.mark.parametrize("padding_free", [False, True])
def test_pair_columns(padding_free):
    features = pairs_with(**SCORES, **REFERENCES, corruption=["shuffle", "repeat"])
    batch = PairCollator(PAD, padding_free)(features)
    assert_tensors(batch, REFERENCES | {"rewards": [1.0, 0.5, 0.25, -1.0]})
    assert "labels" not in batch and "corruption" not in batch


def test_point_columns():
    extras = {"desirable": True, "reference": -5.5, "prompt_reference": -7.25, "sequence_kl": 0.5}
    batch = PointCollator(PAD, padding_free=True)([point | extras for point in POINTS[:2]])
    assert_tensors(batch, {name: [value, value] for name, value in extras.items()})


def test_features_may_hold_tensors():
    features = [{k: torch.tensor(v) for k, v in pair.items()} for pair in PAIRS]
    ours, plain = PairCollator(PAD)(features), PairCollator(PAD)(PAIRS)
    assert counts_of(ours) == counts_of(plain) == (8, 6)
    del ours[LABEL_COUNTS], plain[LABEL_COUNTS]
    assert_tensors(ours, plain)


@kinds
def test_labels_of_completion_and_prompt(kind, features, rows):
    batch = kind(PAD)(features)
    ids = batch["input_ids"].clone()
    for row, (tokens, start, end) in enumerate(rows):
        hidden = [-100] * len(tokens)
        assert labels_of(batch)[row].tolist() == [
            *(*hidden[:start], *tokens[start:end], *hidden[end:])
        ]
        found = prompt_labels_of(batch, ignore_index=-1)[row].tolist()
        assert found == [*tokens[:start], *[-1] * (len(tokens) - start)]
    assert torch.equal(batch["input_ids"], ids)


@pytest.mark.parametrize("padding_free", [False, True])
def test_batches_survive_accelerate(padding_free):
    accelerate = pytest.importorskip("accelerate")
    collator = PairCollator(PAD, padding_free)
    loader = torch.utils.data.DataLoader(PAIRS, batch_size=2, collate_fn=collator)
    (batch,) = accelerate.Accelerator(cpu=True).prepare(loader)
    wanted = collator(PAIRS)
    assert {name: type(batch[name]) for name in batch} == {n: type(wanted[n]) for n in wanted}
    del wanted[LABEL_COUNTS]
    assert_tensors(batch, wanted)


@pytest.mark.parametrize(
    ("kind", "features", "said"),
    [
        (PairCollator, [], "features: got an empty list"),
        (
            PairCollator,
            [{"prompt_ids": [1], "chosen_ids": [2]}],
            "missing column 'rejected_ids'; got 'prompt_ids', 'chos",
        ),
        (
            PairCollator,
            pairs_with(score_chosen=SCORES["score_chosen"]),
            "missing column 'score_rejected'",
        ),
        (
            PairCollator,
            [PAIRS[0], PAIRS[1] | {"ref_chosen_logps": -1.0}],
            "missing column 'ref_chosen_logps'",
        ),
        (
            PairCollator,
            [PAIRS[0], PAIRS[1] | {"rejected_ids": []}],
            "rejected_ids: feature 1 is empty, wanted at least 1",
        ),
        (
            PairCollator,
            pairs_with(**REFERENCES | {"ref_rejected_logps": [None, -3.0]}),
            "ref_rejected_logps: got None in feature 0, needs",
        ),
        (PointCollator, PAIRS, "missing column 'completion_ids'"),
        (
            PointCollator,
            [POINTS[0], {"prompt_ids": [1], "completion_ids": [2], "reward": 1.0}],
            "missing column 'group'",
        ),
        (
            PointCollator,
            [POINTS[0], POINTS[1] | {"group": None}],
            "group: got None in feature 1, needs a value in each or",
        ),
    ],
)
def test_errors_name_the_column(kind, features, said):
    with pytest.raises(ValueError, match=said):
        kind(PAD)(features)


def test_layouts_of_no_use_are_refused():
    with pytest.raises(ValueError, match="truncation_mode: got 'keep_stat'.*wanted one of 'keep_s"):
        PairCollator(PAD, max_length=4, truncation_mode="keep_stat")
    for length, mode in ((3, "keep_start"), (1, "keep_end")):
        said = rf"chosen_ids: feature 0 has no token to predict within max_length \({length}\)"
        with pytest.raises(ValueError, match=said):
            PairCollator(PAD, max_length=length, truncation_mode=mode)(PAIRS)
    with pytest.raises(ValueError, match="pad_token_id: got None"):
        PairCollator(None)
    with pytest.raises(ValueError, match="pad_to_multiple_of: got a number with padding_free"):
        PairCollator(PAD, padding_free=True, pad_to_multiple_of=8)
