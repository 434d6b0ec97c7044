"""Rows of lists in the trainers on TRL: tokenised as pairs are, cut, whole, and trained on."""

from __future__ import annotations

import pytest
import torch
from data_tokenizer import chat
from list_truth import dpo_of_lists, dro_of_lists
from tiny_images import FAMILIES, image_trainer
from tiny_models import tiny_llama
from trainers import build, dataset, first_batch, in_order, lora, pairs

from fused_prefopt.data import points_of_lists

pytest.importorskip("trl")
pytestmark = pytest.mark.slow
TEXTS = [
    {"prompt": "the cat", "completions": [" sat", " on mat", " the mat"], "scores": [1, 2, 3.5]},
    {"prompt": "cat", "completions": [" sat on", " the cat"], "scores": [1.0, 0]},
    {"prompt": "on 1", "completions": [" 1", " 2", " 1 2", " cat"], "scores": [1.0, 0, 3, 2]},
    {"prompt": "sat the", "completions": [" 1 1", " 2", " 1"], "scores": [0, 1.0, 2]},
]


def ids_of(run) -> list[dict]:
    """The trainer's rows as its collator cuts them."""
    longest = run.args.max_length
    return [
        row
        | {
            "completions_ids": [
                ids[: longest - len(row["prompt_ids"])] for ids in row["completions_ids"]
            ]
        }
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
    assert [row["rewards"] for row in run.train_dataset] == [row["scores"] for row in TEXTS]
    assert_step(run, dpo_of_lists(eager, tiny_llama(5), ids_of(run)), eager)


def rows_of_points() -> list[dict]:
    """The completions as rows of their own, those of one prompt not together."""
    lists = [{**row, "rewards": row["scores"]} for row in TEXTS]
    points = points_of_lists(lists)
    return points[::2] + points[1::2]


@pytest.mark.parametrize("kind", ["lists", "points"])
def test_a_kto_trainer_makes_lists_for_a_loss_on_pairs(tmp_path, kind):
    data = dataset(TEXTS if kind == "lists" else rows_of_points())
    run = build("kto", tmp_path, data, loss="dpo", reference=tiny_llama(5))
    assert len(run.train_dataset) == len(TEXTS)
    assert first_batch(in_order(run))["groups"].unique().tolist() == [0, 1, 2, 3]
    eager = tiny_llama()
    assert_step(run, dpo_of_lists(eager, tiny_llama(5), ids_of(run)), eager)


@pytest.mark.parametrize("precomputed", [False, True])
def test_dros_groups_are_whole_lists(tmp_path, precomputed):
    # Of one score alone DRO learns, too.
    data = dataset([*TEXTS[:3], TEXTS[3] | {"scores": [2.0] * 3}])
    options = {"loss_kwargs": {"beta": 0.5, "log_z0": 2.0}}
    options |= {"precompute_ref_log_probs": precomputed}
    run = build("kto", tmp_path, data, loss="dro", reference=tiny_llama(5), **options)
    eager = tiny_llama()
    truth = dro_of_lists(eager, tiny_llama(5), ids_of(run), beta=0.5, log_z0=2.0)
    assert_step(run, truth, eager)


def test_the_policy_without_its_adapter_is_the_reference(tmp_path):
    policy, eager = lora(3, lora_dropout=0.0), lora(3, lora_dropout=0.0)
    run = build("dpo", tmp_path, dataset(TEXTS), model=policy)
    assert_step(run, dpo_of_lists(eager, lora(3, lora_dropout=0.0), ids_of(run)), eager)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_chats_are_tokenised_as_trl_does_pairs(tmp_path, kind):
    turns = {
        "prompt": chat(user="the cat"),
        "sides": [chat(assistant="sat on"), chat(assistant="1")],
    }
    texts = {"prompt": "the cat", "sides": [" sat on", " 1"]}
    for rows in (turns, texts):
        chosen, rejected = rows["sides"]
        pair = {"prompt": rows["prompt"], "chosen": chosen, "rejected": rejected}
        listed = {"prompt": rows["prompt"], "completions": [rejected, chosen], "scores": [0, 1]}
        run = build("dpo", tmp_path, dataset([pair] * 2), loss="simpo")
        own = build(kind, tmp_path, dataset([listed] * 2), loss="simpo")
        (ids, _), (found, _) = run.train_dataset, own.train_dataset
        assert found["prompt_ids"] == ids["prompt_ids"]
        assert found["completions_ids"] == [ids["rejected_ids"], ids["chosen_ids"]]


def test_lists_of_two_train_as_pairs_do(tmp_path):
    """Weights, metrics of pairs, tokens and evaluation are the same, step by step."""
    scores = {"score_chosen": [2.0, 3.0] * 8, "score_rejected": [1.0, 0.5] * 8}
    rows = pairs(**scores, weight=[0.5, 2.0, 1.0, 0.0] * 4)
    listed = [
        {
            "prompt": row["prompt"],
            "completions": [row["rejected"], row["chosen"]],
            "ratings": [row["score_rejected"], row["score_chosen"]],
            "weight": row["weight"],
        }
        for row in rows
    ]
    logs = []
    for data in (rows, dataset(listed)):
        options = {"max_steps": 3, "log_tokens": True, "loss": "odpo", "optim": "sgd"}
        given = {"eval_dataset": data.select(range(6))}
        model = tiny_llama().double()
        run = in_order(build("dpo", tmp_path, data, model=model, given=given, **options))
        run.train()
        run.evaluate()
        logs.append(run.state.log_history)
    of_lists = [{name: row[name] for name in row if "lists/" not in name} for row in logs[1]]
    timed = ("runtime", "per_second")
    for one, other in zip(logs[0], of_lists, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            if not name.endswith(timed):
                assert other[name] == pytest.approx(one[name], rel=1e-6, abs=1e-9), name
    assert [row["lists/pairs"] for row in logs[1] if "lists/pairs" in row] == [1.0] * 3


def test_what_teaches_nothing_is_dropped_and_counted(tmp_path, caplog):
    data = [
        {"prompt": "the cat", "completions": [" 1", " 1", " 2"], "scores": [0, 1, 2]},
        {"prompt": "the cat", "completions": [" 1", " 2"], "scores": [1.0, 1.0]},
        {"prompt": "the cat sat on mat", "completions": [" 1", " 2"], "scores": [1.0, 2.0]},
    ]
    run = build("dpo", tmp_path, dataset(data), loss="simpo", max_length=5)
    assert [row["rewards"] for row in run.train_dataset] == [[0, 2]]
    (message,) = [each for each in caplog.messages if each.startswith("train data")]
    assert "read 3 of 7 completions, kept 1 of 2; without two different scores 2" in message


@pytest.mark.parametrize(
    ("kind", "loss", "change", "options", "message"),
    [
        ("dpo", "simpo", {}, {"shared_prompt": True}, "shared_prompt: got True with rows of lists"),
        ("dpo", "simpo", {}, {"ld_alpha": 0.5}, "ld_alpha: got 0.5 with rows of lists"),
        ("dpo", "simpo", {"scores": [1.0]}, {}, "rewards: got 1 in row 0 .* each of its 3"),
        ("dpo", "simpo", {"scores": None}, {}, "rewards: got None in row 0"),
        ("dpo", "simpo", {"prompt": None, "promt": "a"}, {}, "missing column 'prompt' .*'promt'"),
        ("dpo", "simpo", {"image": "x"}, {}, "images: got some, with rows of lists"),
        ("kto", "kto", {}, {}, "train_dataset: got rows of lists, which have ratings and no label"),
        (
            "dpo",
            "simpo",
            {"completions_token_weights": [[1.0]]},
            {},
            "completions_token_weights: got some with texts in row 0",
        ),
    ],
    ids=str,
)
def test_what_lists_cannot_do_is_refused(tmp_path, kind, loss, change, options, message):
    with pytest.raises(ValueError, match=message):
        row = {name: value for name, value in (TEXTS[0] | change).items() if value is not None}
        build(kind, tmp_path, dataset([row]), loss=loss, **options)


def test_rows_that_cannot_become_lists_are_refused(tmp_path):
    with pytest.raises(ValueError, match="train_dataset: got a stream in a trainer on lists, want"):
        build("dpo", tmp_path, dataset(TEXTS).to_iterable_dataset(), loss="simpo")
    bare = [{name: row[name] for name in row if name != "group"} for row in rows_of_points()]
    with pytest.raises(ValueError, match="missing column 'group'"):
        build("kto", tmp_path, dataset(bare), loss="simpo")
    given = {"eval_dataset": dataset(TEXTS)}
    with pytest.raises(ValueError, match="train_dataset: got rows of single completions, beside"):
        build("kto", tmp_path, dataset(rows_of_points()), loss="dro", given=given)
    with pytest.raises(ValueError, match="'simpo' is pairwise, wanted one on points: of rows with"):
        image_trainer("kto", tmp_path, FAMILIES[0], loss="simpo")
    run = build("dpo", tmp_path, pairs(), loss="simpo")
    with pytest.raises(ValueError, match="eval_dataset: got rows of lists, for a trainer that was"):
        run.evaluate(dataset(TEXTS))
