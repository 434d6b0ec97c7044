"""Batches without a row for each sequence, in a trainer whose data stream."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_llama
from trainers import build, dataset, history, in_order, pairs_with_reference

from fused_prefopt.data import PairCollator
from fused_prefopt.integrations.layouts import keep_batches_whole, number_of_tokens

pytest.importorskip("datasets")

LAYOUTS = ({}, {"padding_free": True}, {"shared_prompt": True})


def test_tokens_are_those_that_the_backbone_meets():
    rows = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
        {"prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [9, 10]},
    ]
    counts = [int(number_of_tokens(PairCollator(0, **layout)(rows))) for layout in LAYOUTS]
    assert counts == [14, 14, 10]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_streams_batches_are_those_of_its_rows(tmp_path, layout):
    """accelerate would cut a stream's batches by rows that are no sequences."""
    rows, logs = pairs_with_reference(8), []
    for data in (rows, dataset(rows).to_iterable_dataset()):
        given = {"data_collator": PairCollator(0, **layout)}
        model = tiny_llama().double()
        run = build("transformers", tmp_path, data, model=model, given=given, max_steps=2)
        # Of several processes one would get the chosen halves of pairs, another the rejected ones.
        assert run.accelerator.dispatch_batches is False
        if data is rows:
            in_order(run)
        run.train()
        logs.append(history(run, "loss") + history(run, "grad_norm"))
    assert len(logs[0]) == 4 and torch.tensor(logs[0]).isfinite().all()
    assert logs[1] == pytest.approx(logs[0], rel=1e-9)


def test_such_a_cut_is_refused_where_it_is_asked_for(tmp_path):
    given = {"data_collator": PairCollator(0, shared_prompt=True)}
    options = {"accelerator_config": {"dispatch_batches": True}}
    with pytest.raises(ValueError, match="^accelerator_config: got dispatch_batches=True, which"):
        build("transformers", tmp_path, given=given, **options)
    run = build("transformers", tmp_path, **options)
    run.accelerator = SimpleNamespace(num_processes=2, dispatch_batches=True)
    # Completions that stand alone may go where they will.
    keep_batches_whole(run, pairwise=False)
    with pytest.raises(
        ValueError, match="deals out rows, with pairs, whose two rows may go to two"
    ):
        keep_batches_whole(run, pairwise=True)
