"""A third completion of each pair on its way to the loss: from texts, by every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from data_tokenizer import tiny_tokenizer
from learned_prompts import adapter
from model_families import assert_gradients, gradients, own_sums
from tiny_models import pair_features, tiny_llama
from torch import Tensor
from torch.nn.functional import logsigmoid
from trainers import build, history

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, PointCollator, tokenise_pairs
from fused_prefopt.integrations.transformers import attach, preference_outputs

LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"padding_free": True},
    "shared prompts": {"shared_prompt": True},
    "cut": {"max_length": 9},
}


def triples(count: int = 6) -> list[dict[str, Any]]:
    golds = pair_features(count, seed=5)
    rows = zip(pair_features(count), golds, strict=True)
    return [pair | {"gold_ids": gold["chosen_ids"]} for pair, gold in rows]


def eager(model: Any, rows: list[dict[str, Any]], **options: Any) -> Tensor:
    """TPO's loss by the model's own logits, β = 0.3 and α = 0.7."""
    chosen, rejected = own_sums(model, PairCollator(0, **options)(rows)).chunk(2)
    alone = [{"prompt_ids": row["prompt_ids"], "completion_ids": row["gold_ids"]} for row in rows]
    golds = PointCollator(0, **options)(alone)
    nll = -own_sums(model, golds).sum() / golds["completion_mask"][:, 1:].sum()
    return -logsigmoid(0.3 * (chosen - rejected)).mean() + 0.7 * nll


def loss_of(name: Any = "tpo") -> fp.PreferenceLoss:
    return fp.PreferenceLoss(name, beta=0.3, nll_weight=0.7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_equal_the_models_own_logits(layout):
    model, rows = tiny_llama().double(), triples()
    batch = PairCollator(0, **LAYOUTS[layout])(rows)
    result = preference_outputs(model, loss_of(), batch)
    found = gradients(model, result.loss)
    truth = eager(model, rows, **(LAYOUTS[layout] if layout == "cut" else {}))
    torch.testing.assert_close(result.loss, truth, rtol=1e-6, atol=0)
    assert_gradients(found, gradients(model, truth), 1e-5)


def test_a_trainer_takes_triples_of_texts_and_their_evaluation_is_alike(tmp_path):
    words = ["the cat sat", "cat", "mat the", "sat", "on on", "1 2", "2 the mat", "cat sat"]
    texts = [
        {"prompt": word, "chosen": " on", "rejected": " 1 mat", "gold": f" {other} 2"}
        for word, other in zip(words, reversed(words), strict=True)
    ]
    rows = tokenise_pairs(texts, tiny_tokenizer(), 16, 8)
    assert [len(row["gold_ids"]) for row in rows] == [
        len(text["gold"].split()) + 1 for text in texts
    ]
    options = {"per_device_train_batch_size": 8, "optim": "sgd", "learning_rate": 0.0}
    run = build(
        "transformers",
        tmp_path,
        rows,
        loss=loss_of(),
        given={"eval_dataset": rows[:4]},
        **options,
    )
    run.train()
    assert history(run, "loss") == pytest.approx([eager(run.model, rows).item()], rel=1e-5)
    evaluated = run.evaluate()["eval_loss"]
    assert evaluated == pytest.approx(eager(run.model, rows[:4]).item(), rel=1e-5)


def test_a_sum_with_a_reference_is_that_of_its_terms():
    model, batch, losses = tiny_llama(), PairCollator(0)(triples()), []
    named = [{"name": "tpo", "hyperparameters": {"beta": 0.3, "nll_weight": 0.7}}, "0.5 dpo"]
    for loss_fn in (loss_of(), fp.PreferenceLoss("dpo"), fp.PreferenceLoss(named)):
        attached = attach(model, loss_fn, reference=tiny_llama(7))
        losses.append(model(**batch)["loss"].item())
        attached.detach()
    assert losses[2] == pytest.approx(losses[0] + 0.5 * losses[1], rel=1e-6)
    # Without a loss of theirs the gold completions change nothing.
    pairs = PairCollator(0)(pair_features(6))
    attach(model, fp.PreferenceLoss("dpo"), reference=tiny_llama(7))
    assert model(**pairs)["loss"].item() == losses[1]


def test_what_would_be_wrong_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train_dataset: tpo needs `gold`"):
        build("transformers", tmp_path, pair_features(8), loss=loss_of())
    with pytest.raises(ValueError, match="feature 2: missing column 'gold_ids'"):
        PairCollator(0)([*triples(2), *pair_features(1)])
    import peft

    model = peft.get_peft_model(tiny_llama(), adapter("prompt"))
    attach(model, loss_of())
    with pytest.raises(ValueError, match="gold_ids: got them with an adapter that learns a prompt"):
        model(**PairCollator(0)(triples()))


def test_trls_trainer_refuses_a_loss_of_triples(tmp_path):
    pytest.importorskip("trl")
    with pytest.raises(ValueError, match="tpo needs `gold`"):
        build("dpo", tmp_path, loss="tpo")
