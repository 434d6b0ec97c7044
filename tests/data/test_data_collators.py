"""Collators: exact layouts, padded and packed, and TRL's own collator as witness."""

import pytest
import torch

from fused_prefopt.data import PairCollator, PointCollator, labels_of, prompt_labels_of
from fused_prefopt.data.labels import LABEL_COUNTS, counts_of

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


def scored(**columns):
    return [
        pair | {name: values[i] for name, values in columns.items()} for i, pair in enumerate(PAIRS)
    ]


def assert_tensors(batch, wanted):
    for name, value in wanted.items():
        torch.testing.assert_close(batch[name], torch.tensor(value), rtol=0, atol=0)


def test_pairs_padded():
    batch = PairCollator(PAD)(PAIRS)
    assert list(batch) == ["input_ids", "attention_mask", "completion_mask", LABEL_COUNTS]
    assert_tensors(
        batch,
        {
            "input_ids": [
                [1, 2, 3, 4, 5, PAD],
                [7, 8, 9, PAD, PAD, PAD],
                [1, 2, 3, 6, PAD, PAD],
                [7, 8, 10, 11, 12, 13],
            ],
            "attention_mask": [
                [1, 1, 1, 1, 1, 0],
                [1, 1, 1, 0, 0, 0],
                [1, 1, 1, 1, 0, 0],
                [1, 1, 1, 1, 1, 1],
            ],
            "completion_mask": [
                [0, 0, 0, 1, 1, 0],
                [0, 0, 1, 0, 0, 0],
                [0, 0, 0, 1, 0, 0],
                [0, 0, 1, 1, 1, 1],
            ],
        },
    )


def test_pairs_packed():
    batch = PairCollator(PAD, padding_free=True)(PAIRS)
    assert sorted(batch) == [
        *("completion_mask", "input_ids", LABEL_COUNTS),
        *("num_sequences", "position_ids", "sequence_ids"),
    ]
    assert type(batch["num_sequences"]) is int and batch["num_sequences"] == 4
    assert_tensors(
        batch,
        {
            "input_ids": [[1, 2, 3, 4, 5, 7, 8, 9, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13]],
            "position_ids": [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5]],
            "completion_mask": [[0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 1, 1, 1]],
            "sequence_ids": [[0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3]],
        },
    )


def test_packed_is_padded_without_the_padding():
    for collator, features in ((PairCollator, PAIRS), (PointCollator, POINTS)):
        padded = collator(PAD)(features)
        packed = collator(PAD, padding_free=True)(features)
        real = padded["attention_mask"].bool()
        rows, columns = real.nonzero(as_tuple=True)
        for name in ("input_ids", "completion_mask"):
            assert packed[name].tolist() == [padded[name][real].tolist()]
        assert packed["sequence_ids"].tolist() == [rows.tolist()]
        assert packed["position_ids"].tolist() == [columns.tolist()]
        for labels in (labels_of, prompt_labels_of):
            assert labels(packed).tolist() == [labels(padded)[real].tolist()]


@pytest.mark.parametrize("multiple", [None, 8])
def test_pairs_equal_trl(multiple):
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    features = scored(ref_chosen_logps=[-1.5, -2.0], ref_rejected_logps=[-3.25, -4.0])
    ours = PairCollator(PAD, pad_to_multiple_of=multiple)(features)
    theirs = trl.DataCollatorForPreference(PAD, pad_to_multiple_of=multiple)(features)
    assert set(ours) == {*theirs, LABEL_COUNTS}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)
    assert ours["input_ids"].shape[1] == (multiple or 6)


@pytest.mark.parametrize("padding_free", [False, True])
def test_pair_columns(padding_free):
    features = scored(
        score_chosen=[1, 0.5],
        score_rejected=[0.25, -1],
        ref_chosen_logps=[-1.5, -2.0],
        ref_rejected_logps=[-3.25, -4.0],
        corruption=["shuffle", "repeat"],
    )
    batch = PairCollator(PAD, padding_free)(features)
    assert_tensors(
        batch,
        {
            "rewards": [1.0, 0.5, 0.25, -1.0],
            "ref_chosen_logps": [-1.5, -2.0],
            "ref_rejected_logps": [-3.25, -4.0],
        },
    )
    assert "labels" not in batch and "corruption" not in batch


def test_points_padded():
    batch = PointCollator(PAD)(POINTS)
    layout = ["input_ids", "attention_mask", "completion_mask", LABEL_COUNTS]
    assert list(batch) == [*layout, "rewards", "groups"]
    assert_tensors(
        batch,
        {
            "input_ids": [[1, 2, 3, 4, 5], [1, 2, 6, PAD, PAD], [7, 8, 9, PAD, PAD]],
            "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]],
            "completion_mask": [[0, 0, 1, 1, 1], [0, 0, 1, 0, 0], [0, 1, 1, 0, 0]],
            "rewards": [1.0, 0.25, -2.0],
            "groups": [4, 4, 0],
        },
    )


def test_point_columns():
    extras = {"desirable": True, "reference": -5.5, "prompt_reference": -7.25, "sequence_kl": 0.5}
    batch = PointCollator(PAD, padding_free=True)([point | extras for point in POINTS[:2]])
    assert_tensors(batch, {name: [value, value] for name, value in extras.items()})
    assert batch["num_sequences"] == 2


def test_features_may_hold_tensors():
    features = [{k: torch.tensor(v) for k, v in pair.items()} for pair in PAIRS]
    ours, plain = PairCollator(PAD)(features), PairCollator(PAD)(PAIRS)
    assert counts_of(ours) == counts_of(plain) == (8, 6)
    del ours[LABEL_COUNTS], plain[LABEL_COUNTS]
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_labels_of_completion_and_prompt():
    batch = PairCollator(PAD)(PAIRS)
    ids = batch["input_ids"].clone()
    assert labels_of(batch).tolist() == [
        [-100, -100, -100, 4, 5, -100],
        [-100, -100, 9, -100, -100, -100],
        [-100, -100, -100, 6, -100, -100],
        [-100, -100, 10, 11, 12, 13],
    ]
    assert prompt_labels_of(batch, ignore_index=-1).tolist() == [
        [1, 2, 3, -1, -1, -1],
        [7, 8, -1, -1, -1, -1],
        [1, 2, 3, -1, -1, -1],
        [7, 8, -1, -1, -1, -1],
    ]
    assert torch.equal(batch["input_ids"], ids)


@pytest.mark.parametrize("padding_free", [False, True])
def test_batches_survive_accelerate(padding_free):
    accelerate = pytest.importorskip("accelerate")
    collator = PairCollator(PAD, padding_free)
    loader = torch.utils.data.DataLoader(PAIRS, batch_size=2, collate_fn=collator)
    (batch,) = accelerate.Accelerator(cpu=True).prepare(loader)
    wanted = collator(PAIRS)
    assert set(batch) == set(wanted)
    for name, value in wanted.items():
        assert type(batch[name]) is type(value)
        assert torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(value))


def test_errors_name_the_column():
    collate = PairCollator(PAD)
    with pytest.raises(ValueError, match="features: got an empty list"):
        collate([])
    with pytest.raises(ValueError, match="missing column 'rejected_ids'; got 'prompt_ids', 'chos"):
        collate([{"prompt_ids": [1], "chosen_ids": [2]}])
    with pytest.raises(ValueError, match="missing column 'score_rejected'"):
        collate(scored(score_chosen=[1.0, 2.0]))
    with pytest.raises(ValueError, match="missing column 'ref_chosen_logps'"):
        collate([PAIRS[0], PAIRS[1] | {"ref_chosen_logps": -1.0}])
    with pytest.raises(ValueError, match="rejected_ids: feature 1 is empty, wanted at least 1"):
        collate([PAIRS[0], PAIRS[1] | {"rejected_ids": []}])
    with pytest.raises(ValueError, match="missing column 'completion_ids'"):
        PointCollator(PAD)(PAIRS)
    with pytest.raises(ValueError, match="missing column 'group'"):
        PointCollator(PAD)([POINTS[0], {"prompt_ids": [1], "completion_ids": [2], "reward": 1.0}])
    with pytest.raises(ValueError, match="group: got None in feature 1, needs a value in each or"):
        PointCollator(PAD)([POINTS[0], POINTS[1] | {"group": None}])
    with pytest.raises(ValueError, match="ref_rejected_logps: got None in feature 0, needs"):
        collate(scored(ref_chosen_logps=[-1.0, -2.0], ref_rejected_logps=[None, -3.0]))
    with pytest.raises(ValueError, match="pad_token_id: got None"):
        PairCollator(None)
    with pytest.raises(ValueError, match="pad_to_multiple_of: got a number with padding_free"):
        PairCollator(PAD, padding_free=True, pad_to_multiple_of=8)
