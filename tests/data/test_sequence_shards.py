"""Shards of batches: put together they are the whole one, its labels shifted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import pair_features, point_features
from torch import Tensor

from fused_prefopt.data import PairCollator, PointCollator, labels_of, prompt_labels_of, shard_of
from fused_prefopt.data.labels import counts_of
from fused_prefopt.data.sequence_shards import ORDERS, token_places

COUNT = 3
TOKENS = ("input_ids", "attention_mask", "completion_mask", "sequence_ids", "position_ids")


def pairs(**options: Any) -> dict[str, Any]:
    rows = pair_features(COUNT)
    for row in rows:
        row |= {"gold_ids": row["chosen_ids"][::-1], "weight": 2.0}
        for side in ("chosen", "rejected", "gold"):
            row[f"{side}_token_weights"] = torch.rand(len(row[f"{side}_ids"])).tolist()
    return PairCollator(0, **options)(rows)


def joined(shards: list[dict[str, Any]], name: str, order: str) -> Tensor:
    """The whole column of a batch's shards."""
    values = torch.cat([shard[name] for shard in shards], 1)
    every = [token_places(values.shape[1], rank, len(shards), order) for rank in range(len(shards))]
    return values[:, torch.cat(every).argsort()]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("ranks", "multiple_of"), [(1, 1), (2, 1), (3, 4), (4, 1)])
def test_shards_put_together_are_the_batch(order, packed, ranks, multiple_of):
    batch = pairs(padding_free=packed)
    shards = [
        shard_of(batch, rank, ranks, order=order, multiple_of=multiple_of) for rank in range(ranks)
    ]
    for prefix in ("", "gold_"):
        part = {name.removeprefix(prefix): batch[name] for name in batch if name.startswith(prefix)}
        ids = part["input_ids"]
        length = ids.shape[1]
        sizes = {shard[f"{prefix}input_ids"].shape for shard in shards}
        assert len(sizes) == 1 and sizes.pop()[1] % multiple_of == 0
        whole = {name: part[name] for name in TOKENS if name in part}
        if not packed:
            whole["position_ids"] = torch.arange(length).expand_as(ids)
        follows = torch.ones_like(ids, dtype=torch.bool)[:, 1:]
        if packed:
            follows = part["sequence_ids"][:, 1:] == part["sequence_ids"][:, :-1]
        shifted = {
            "shift_labels": (labels_of(part), -100),
            "shift_prompt_labels": (prompt_labels_of(part), -100),
            "token_weights": (part["token_weights"], 0),
        }
        for name, (values, fill) in shifted.items():
            moved = values[:, 1:].where(follows, fill)
            whole[name] = torch.nn.functional.pad(moved, (0, 1), value=fill)
        for name, values in whole.items():
            found = joined(shards, prefix + name, order)
            assert torch.equal(found[:, :length], values), name
            behind = found[:, length:]
            if name == "position_ids":
                start = 0 if packed else length
                assert torch.equal(behind[0], start + torch.arange(behind.shape[1]))
            elif name == "sequence_ids":
                assert (behind == part["num_sequences"] - 1).all()
            else:
                assert (behind == (-100 if "labels" in name else 0)).all(), name
        counts = [counts_of({name: shard[prefix + name] for name in part}) for shard in shards]
        assert tuple(map(sum, zip(*counts, strict=True))) == counts_of(part)
        for shard, (completion, _) in zip(shards, counts, strict=True):
            assert completion == (shard[f"{prefix}shift_labels"] >= 0).sum()
    for shard in shards:
        assert torch.equal(shard["weights"], batch["weights"])
        assert shard.get("num_sequences") == batch.get("num_sequences")


def test_each_rank_of_a_balanced_order_has_as_much_attention():
    scores = [(token_places(24, rank, 3, "balanced") + 1).sum() for rank in range(3)]
    assert len(set(map(int, scores))) == 1
    assert token_places(24, 1, 3, "balanced").tolist() == [4, 5, 6, 7, 16, 17, 18, 19]


def test_mismatched_completions_are_cut_too_and_counts_of_another_batch_left_out():
    batch = PointCollator(0)(point_features(COUNT))
    mismatched = {f"KL_{name}": batch[name] for name in TOKENS[:3]}
    shard = shard_of(batch | mismatched, 1, 2)
    assert torch.equal(shard["KL_shift_labels"], shard["shift_labels"])
    del batch["label_counts"]
    assert "label_counts" not in shard_of(batch, 0, 1)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, {"shift_labels": torch.zeros(6, 8)}, "shift_labels: got a batch that is a shard"),
        ({}, {"pixel_values": torch.zeros(6, 3, 2, 2)}, "pixel_values: got a column of more than"),
        ({}, {"token_type_ids": torch.zeros(6, 8)}, "token_type_ids: got a column of more than"),
        ({"shared_prompt": True}, {}, "shared_prompt: got pairs in one row each"),
        ({"padding_free": True}, {"position_ids": None}, "sequence_ids: got 1 rows with"),
        ({}, {"position_ids": torch.zeros(3, 6, 15)}, "position_ids: got shape"),
    ],
)
def test_what_cannot_be_cut_is_an_error(options, change, message):
    rows = pair_features(COUNT)
    batch = PairCollator(0, **options)(rows) | change
    batch = {name: value for name, value in batch.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        shard_of(batch, 0, 2)


def test_padding_in_front_and_numbers_out_of_range_are_errors():
    batch = pairs()
    flipped = batch | {"attention_mask": batch["attention_mask"].flip(1)}
    with pytest.raises(ValueError, match="attention_mask: got padding in front of tokens"):
        shard_of(flipped, 0, 2)
    with pytest.raises(ValueError, match="rank: got 2, wanted one in"):
        shard_of(batch, 2, 2)
    with pytest.raises(ValueError, match="order: got 'ring'"):
        shard_of(batch, 0, 2, order="ring")
    with pytest.raises(ValueError, match="multiple_of: got 0"):
        shard_of(batch, 0, 2, multiple_of=0)
    with pytest.raises(ValueError, match="length: got 10 for 2 ranks in balanced order, wanted a"):
        token_places(10, 0, 2, "balanced")
    with pytest.raises(ValueError, match="rank: got -1"):
        token_places(8, -1, 2)
    assert token_places(0, 1, 2).tolist() == []
