"""A third completion of each pair on its way to the loss: from texts, by every layout."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data_tokenizer import chat, tiny_tokenizer
from learned_prompts import adapter
from model_families import assert_gradients, gradients, own_sums
from tiny_models import pair_features, tiny_llama
from torch import Tensor
from torch.nn.functional import logsigmoid
from trainers import SETTINGS, TRLS_DEFAULTS_OFF, build, dataset, history, in_order, pairs

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, PointCollator, tokenise_pairs
from fused_prefopt.integrations.transformers import attach, preference_outputs

LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"padding_free": True},
    "shared prompts": {"shared_prompt": True},
    "cut": {"max_length": 9},
}

# Options that TRL's own trainer does not have.
LAYOUTS_OF_OURS = ("padding_free", "shared_prompt")


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


def test_tokens_of_gold_completions_have_weights():
    model, rows = tiny_llama().double(), triples()
    # As often as it weighs, a token counts in the mean, and not at all where it weighs 0.
    shorter = [row | {"gold_ids": row["gold_ids"][:-1] or row["gold_ids"]} for row in rows]
    weighted = [
        row
        | {"gold_token_weights": [3.0] * len(less["gold_ids"]) + [0.0] * (len(row["gold_ids"]) > 1)}
        for row, less in zip(rows, shorter, strict=True)
    ]
    for layout in LAYOUTS.values():
        losses = [
            preference_outputs(model, loss_of(), PairCollator(0, **layout)(each)).loss
            for each in (weighted, shorter)
        ]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


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


def texts(count: int = 8, **more: Any) -> list[dict[str, Any]]:
    """Pairs with TRL's name of the gold completion, which is longer than some and shorter."""
    rows = [dict(row) for row in pairs(count)]
    golds = [row["chosen"] + " the" for row in pairs(2 * count)][count:]
    return [row | {"reference": gold} | more for row, gold in zip(rows, golds, strict=True)]


def chats() -> list[dict[str, Any]]:
    sides = ("chosen", "rejected", "reference")
    return [
        {"prompt": chat(user=row["prompt"])} | {name: chat(assistant=row[name]) for name in sides}
        for row in texts()
    ]


def whole() -> list[dict[str, Any]]:
    """Without a prompt of their own: all three begin with it."""
    sides = ("chosen", "rejected", "reference")
    return [{name: row["prompt"] + row[name] for name in sides} for row in chats()]


def trls_own(folder: Any, data: Any, model: Any, **options: Any) -> Any:
    trl = pytest.importorskip("trl.experimental.tpo")
    args = trl.TPOConfig(str(folder), **SETTINGS | TRLS_DEFAULTS_OFF | options)
    given = {"train_dataset": data, "eval_dataset": data, "processing_class": tiny_tokenizer()}
    return trl.TPOTrainer(model, args, **given)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "loss_type", "options"),
    [
        (texts, "sigmoid", {}),
        (texts, "tpo-l", {"max_length": 7, "padding_free": True}),
        (texts, "hinge", {"max_length": 7, "truncation_mode": "keep_end"}),
        (chats, "ipo", {"shared_prompt": True}),
        (whole, "sigmoid", {"stream": True}),
    ],
    ids=["texts", "packed", "cut", "chats", "stream"],
)
def test_trls_trainer_on_pairs_trains_as_its_own_of_triples(tmp_path, make, loss_type, options):
    pytest.importorskip("trl")
    data, options = dataset(make()), {"max_steps": 3, "optim": "sgd"} | options
    if options.pop("stream", False):
        data = data.to_iterable_dataset()
    losses = {
        "sigmoid": ("tpo", {}),
        "tpo-l": ("tpo-l", {"gamma": 0.4}),
        "hinge": ("tpo", {"link": "hinge"}),
        "ipo": ("tpo", {"link": "squared"}),
    }
    name, own = losses[loss_type]
    theirs = {each: options[each] for each in options if each not in LAYOUTS_OF_OURS}
    theirs |= {"beta": 0.3, "tpo_alpha": 0.7, "tpo_l_gamma": 0.4, "loss_type": loss_type}
    kwargs = {"beta": 0.3, "nll_weight": 0.7, **own}
    given = {"eval_dataset": data}
    runs = [
        in_order(trls_own(tmp_path, data, tiny_llama().double(), **theirs)),
        in_order(
            build(
                "dpo",
                tmp_path,
                data,
                model=tiny_llama(attention="sdpa").double(),
                loss=name,
                loss_kwargs=kwargs,
                given=given,
                **options,
            )
        ),
    ]
    for run in runs:
        run.train()
        run.evaluate()
    # Of "ipo" ours are not times β, which is in its target.
    scale = 0.3 if loss_type == "ipo" else 1.0
    for metric in ("loss", "eval_loss", "grad_norm", "rewards/margins"):
        factor = scale if metric == "rewards/margins" else 1.0
        own = [factor * value for value in history(runs[1], metric)]
        assert own == pytest.approx(history(runs[0], metric), rel=1e-5), metric
    if "shared_prompt" not in options:
        assert history(runs[1], "num_tokens") == history(runs[0], "num_tokens")
    weights = dict(runs[0].model.named_parameters())
    for each, value in runs[1].model.named_parameters():
        torch.testing.assert_close(value, weights[each], rtol=1e-6, atol=1e-8, msg=each)


def test_what_trls_trainer_cannot_make_triples_of_is_refused(tmp_path):
    pytest.importorskip("trl")
    lacking = [{**row, "reference": None} if i == 3 else row for i, row in enumerate(texts())]
    for data, message in (
        (None, "train_dataset: tpo needs `gold`"),
        (dataset(lacking), "reference: got None in row 3 .* wanted a completion; drop"),
        (dataset(texts(gold_token_weights=[1.0])), "gold_token_weights: got some with texts"),
        (dataset([whole()[0] | {"reference": chat(user="a")}]), "wanted it to begin with .*'role'"),
    ):
        with pytest.raises(ValueError, match=message):
            build("dpo", tmp_path, data, loss="tpo")


@pytest.mark.parametrize(
    ("pair", "gold", "wanted"),
    [
        (([1, 2], [7], [8]), ([1], [9], [9]), ([1], [2, 7], [2, 8], [9])),
        (([1], [5], [6]), ([1, 2], [9], [9]), ([1], [5], [6], [2, 9])),
    ],
)
def test_all_three_begin_where_the_first_of_them_does(pair, gold, wanted):
    pytest.importorskip("trl")
    from fused_prefopt.integrations.trl.gold import with_gold_ids

    def tokenise(rows: Any, _: Any) -> Any:
        # As where a completion's first token takes in the last one of the prompt.
        def ids(row: dict[str, Any]) -> dict[str, Any]:
            names = ("prompt_ids", "chosen_ids", "rejected_ids")
            return dict(zip(names, gold if row["chosen"] == "g" else pair, strict=True))

        return rows.map(ids)

    rows = dataset([{"prompt": "p", "chosen": "c", "rejected": "r", "gold": "g"}] * 3)
    for row in with_gold_ids(rows, "train", SimpleNamespace(max_length=2), tokenise):
        names = ("prompt_ids", "chosen_ids", "rejected_ids", "gold_ids")
        assert [row[name] for name in names] == list(wanted)
        assert (row["chosen"], row["rejected"]) == ("c", "r")
