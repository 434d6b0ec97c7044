"""Rows of lists in the trainers on TRL: tokenised as pairs are, cut, whole, and trained on."""

from __future__ import annotations

import pytest
import torch
from data_tokenizer import chat, tiny_tokenizer
from list_truth import dpo_of_lists, dro_of_lists
from tiny_models import list_features, tiny_llama
from trainers import TEXT, build, dataset, first_batch, history, in_order, lora

pytest.importorskip("trl")
TEXTS = [
    {"prompt": "the cat", "completions": [" sat", " on mat", " the mat"], "scores": [1, 2, 3.5]},
    {"prompt": "cat", "completions": [" sat on", " the cat"], "scores": [1.0, 0]},
    {"prompt": "mat on 1", "completions": [" 1", " 2", " 1 2", " cat"], "scores": [1.0, 0, 3, 2]},
    {"prompt": "sat the", "completions": [" 1 1", " 2", " 1"], "scores": [0, 1.0, 2]},
]


def ids_of(run) -> list[dict]:
    """The trainer's rows as its collator cuts them."""
    longest = run.args.max_length
    return [
        row | {"completions_ids": [ids[: longest - len(row["prompt_ids"])] for ids in row["completions_ids"]]}
        for row in run.train_dataset
    ]


def assert_step(run, truth, model) -> None:
    """The first step's loss and the gradient of every weight are those of the truth."""
    batch = run._prepare_inputs(first_batch(in_order(run)))
    run.model.train()
    found = run.compute_loss(run.model, batch)
    found.backward()
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-6)
    truth.backward()
    right = dict(model.named_parameters())
    for name, value in run.model.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(
                value.grad.double(), right[name].grad.double(), rtol=1e-3, atol=1e-6, msg=name
            )


OPTIONS = [
    {},
    {"padding_free": True},
    {"precompute_ref_log_probs": True},
    {"max_length": 4, "precompute_ref_log_probs": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_lists_of_texts_have_the_loss_and_gradient_of_their_pairs(tmp_path, kind, options):
    data = dataset([row | {"weight": (0.5, 2.0)[i % 2]} for i, row in enumerate(TEXTS)])
    reference = tiny_llama(5)
    run = build(kind, tmp_path, data, loss="dpo", reference=reference, **options)
    eager = tiny_llama()
    truth = dpo_of_lists(eager, tiny_llama(5), ids_of(run))
    if options.get("max_length") is None:
        assert [row["rewards"] for row in run.train_dataset] == [row["scores"] for row in TEXTS]
    assert_step(run, truth, eager)
