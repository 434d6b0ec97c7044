"""The number of labels goes with its batch, on the host, and not with another batch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate.utils import operations
from tiny_models import point_features, tiny_llama
from torch.distributed.utils import _apply_to_tensors, _to_kwargs
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory
from transformers import Trainer, TrainingArguments

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, PointCollator, labels_of, prompt_labels_of
from fused_prefopt.data.columns import LABEL_COUNTS
from fused_prefopt.data.labels import LabelCounts, count_labels, counts_of, number_of_groups
from fused_prefopt.integrations.trainer_checks import CountedLabels
from fused_prefopt.integrations.trainer_mixins import PreparesExactly
from fused_prefopt.models.batch import collated_rows

PAIRS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [], "chosen_ids": [9, 7], "rejected_ids": [10, 11, 12, 13]},
]
POINTS = [
    {"prompt_ids": [1, 2], "completion_ids": [3, 4, 5]},
    {"prompt_ids": [7], "completion_ids": [8, 9]},
    {"prompt_ids": [], "completion_ids": [6]},
]
COLLATED = [(PairCollator, PAIRS), (PointCollator, POINTS)]


def counted(labels, batch):
    """What the op counts of a batch's labels, when it is not told."""
    options = {}
    if "sequence_ids" in batch:
        labels = labels[0]
        options = {"sequence_ids": batch["sequence_ids"][0], "num_sequences": 9}
    hidden, weight = torch.zeros(*labels.shape, 4), torch.zeros(20, 4)
    return int(fp.sequence_logps(hidden, weight, labels, **options).lengths.sum())


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize(("kind", "features"), COLLATED)
def test_they_are_what_the_op_counts(kind, features, padding_free):
    for rows in (features, features[1:], features[:1]):
        batch = kind(0, padding_free=padding_free)(rows)
        wanted = counted(labels_of(batch), batch), counted(prompt_labels_of(batch), batch)
        assert counts_of(batch) == wanted
        assert counts_of({**batch, LABEL_COUNTS: count_labels(batch)}) == wanted
    # The first token of a sequence without a prompt is predicted by nothing.
    totals = {PairCollator: (7, 4), PointCollator: (5, 1)}
    assert counts_of(kind(0, padding_free=padding_free)(features)) == totals[kind]


def test_padding_on_the_left():
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    completion = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1]])
    ids = torch.arange(8).view(2, 4)
    batch = {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}
    wanted = counted(labels_of(batch), batch), counted(prompt_labels_of(batch), batch)
    assert counts_of(CountedLabels(lambda _: batch)([])) == wanted == (3, 2)


def test_another_collators_batch_is_counted_anew_or_left_alone():
    def halved(features):
        batch = PairCollator(0)(features)
        batch["completion_mask"][2:] = 0
        return batch

    assert counts_of(halved(PAIRS)) == (7, 4)
    batch = CountedLabels(halved)(PAIRS)
    assert counts_of(batch)[0] == counted(labels_of(batch), batch) == 3
    others = {"input_ids": torch.ones(2, 3)}
    assert CountedLabels(lambda _: dict(others))([]).keys() == others.keys()
    shared = PairCollator(0, shared_prompt=True)
    assert LABEL_COUNTS not in CountedLabels(shared)(PAIRS)


def test_mismatched_completions_are_counted_apart():
    batch = PointCollator(0)(POINTS)
    other = PointCollator(0)(POINTS[1:])
    names = ("input_ids", "attention_mask", "completion_mask")
    both = {name: batch[name] for name in names} | {f"KL_{name}": other[name] for name in names}
    found = CountedLabels(lambda _: both)([])
    assert counts_of(found) == counts_of(batch)
    assert found[f"KL_{LABEL_COUNTS}"].of(other) == counts_of(other) != counts_of(batch)


def passes():
    """Name → what a batch goes through as it is, on its way to the model's forward."""
    device = torch.device("cpu")
    return {
        "accelerate": lambda batch: operations.send_to_device(batch, device, non_blocking=True),
        "pinned": lambda batch: {**batch, LABEL_COUNTS: pin_memory(batch[LABEL_COUNTS])},
        "a loop": lambda batch: {name: value.to(device) for name, value in batch.items()},
        "DDP": lambda batch: _to_kwargs((), batch, device, False)[1][0],
        "FSDP": lambda batch: _apply_to_tensors(lambda value: value, batch),
        "a worker": lambda batch: pickle.loads(pickle.dumps(batch)),
        "copies": lambda batch: copy.deepcopy(copy.copy(batch)),
        "a loader": lambda batch: next(iter(DataLoader([batch], collate_fn=lambda rows: rows[0]))),
    }


@pytest.mark.parametrize("way", passes())
def test_they_go_where_the_batch_goes(way):
    batch = PairCollator(0)(PAIRS)
    moved = passes()[way](batch)
    assert type(moved[LABEL_COUNTS]) is LabelCounts and counts_of(moved) == (7, 4)


def cuts():
    """Name → what makes another batch of batches."""

    def dispatched(batch):
        joined = operations.concatenate([batch, batch])
        structure = operations.get_data_structure(joined)
        operations.initialize_tensors(structure)
        joined = operations.broadcast(joined)
        return operations.slice_tensors(joined, slice(0, 4))

    return {
        "dispatched": dispatched,
        "joined": lambda batch: operations.concatenate([batch, batch]),
        "one alone": lambda batch: operations.concatenate([batch]),
        "sliced": lambda batch: operations.slice_tensors(batch, slice(2, 4)),
        # What gathers and broadcasts do in several processes.
        "gathered": lambda batch: operations.recursively_apply(
            torch.clone, batch, error_on_other_type=True
        ),
        "padded": operations.pad_across_processes,
    }


@pytest.mark.parametrize("way", cuts())
def test_they_do_not_go_with_another_batch(way):
    batch = PairCollator(0)(PAIRS)
    made = cuts()[way](batch)
    assert type(made[LABEL_COUNTS]) is LabelCounts and counts_of(made) == (None, None)
    assert operations.find_batch_size(batch) == 4


def test_a_batch_of_another_shape_has_none():
    batch = PairCollator(0)(PAIRS)
    half = {name: value[:2] if torch.is_tensor(value) else value for name, value in batch.items()}
    assert counts_of(half) == (None, None)
    assert counts_of({**batch, LABEL_COUNTS: 7}) == (None, None)
    del batch[LABEL_COUNTS]
    assert counts_of(batch) == (None, None)


def test_a_trainer_keeps_them(tmp_path):
    class Exact(PreparesExactly, Trainer):
        pass

    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = Exact(torch.nn.Linear(1, 1), args)
    batch = trainer._prepare_inputs(PairCollator(0)(PAIRS))
    assert counts_of(batch) == (7, 4)


def test_a_wrong_number_is_told():
    model, batch = tiny_llama(), PairCollator(0)(PAIRS)
    assert collated_rows(model, batch, prompt=False).layout["num_labels"] == 7
    batch["completion_mask"][0] = 0
    loss_fn = fp.PreferenceLoss("simpo")
    rows = collated_rows(model, batch, prompt=False)
    with pytest.raises(ValueError, match="num_labels: got 7, which is not the number"):
        loss_fn(rows.hidden, model.lm_head.weight, rows.labels, **rows.layout)


def test_groups_are_counted_with_the_labels_and_otherwise_of_the_batch():
    batch = PointCollator(0)(point_features(7))
    assert batch[LABEL_COUNTS].groups == 4
    assert number_of_groups(pickle.loads(pickle.dumps(batch))) == 4
    # As what accelerate's `dispatch_batches` leaves of them.
    cut = {"groups": batch["groups"][:3], LABEL_COUNTS: type(batch[LABEL_COUNTS])({})}
    assert number_of_groups(cut) == 2
