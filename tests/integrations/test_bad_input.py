"""Bad input ends in a message that says what it was and what is needed, and changes nothing."""

from __future__ import annotations

import copy
import logging
import math
import warnings

import pytest
import torch
from data_tokenizer import tiny_tokenizer
from tiny_models import VOCAB, pair_features, point_features, tiny_llama

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, PointCollator, labels_of, preference, tokenise_pairs
from fused_prefopt.data.adapters import ultrafeedback_binarized
from fused_prefopt.integrations.transformers import attach, preference_outputs
from fused_prefopt.reference import add_reference_logps


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_unchanged(module, before):
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def with_token(features, column, token):
    """The features with one token id of the last one changed."""
    changed = copy.deepcopy(features)
    changed[-1][column][-1] = token
    return changed


def renamed(features, before, after):
    return [{(after if name == before else name): row[name] for name in row} for row in features]


# Wrong names


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (
            lambda: PairCollator(0)(renamed(pair_features(2), "chosen_ids", "choosen_ids")),
            r"'chosen_ids' \(did you mean 'choosen_ids'\?\); got",
        ),
        # Nothing is close to it.
        (
            lambda: PairCollator(0)([{"prompt_ids": [1], "chosen_ids": [2], "x": [3]}]),
            "missing column 'rejected_ids'; got 'prompt_ids', 'chosen_ids', 'x'$",
        ),
        (
            lambda: PairCollator(0)(renamed(pair_features(2), "score_rejected", "score_rejectd")),
            r"'score_rejected' \(did you mean 'score_rejectd'",
        ),
        (
            lambda: tokenise_pairs(
                [{"prompt": "a", "choosen": "b", "rejected": "c"}], tiny_tokenizer(), 9, 4
            ),
            r"missing column 'chosen' \(did you mean 'choosen'\?\)",
        ),
        (
            lambda: PointCollator(0)([{"prompt_ids": [1], "completions_ids": [2]}]),
            r"'completion_ids' \(did you mean 'completions_ids' or",
        ),
        (lambda: op(path="recomputed"), r"path: got 'recomputed' \(did you mean 'recompute'\?\)"),
        (lambda: op(engine="torsh"), r"engine: got 'torsh' \(did you mean 'torch'\?\)"),
        # Labels beyond the vocabulary.
        (
            lambda: op(torch.tensor([[0, 12]])),
            r"labels: got a label outside \[0, 5\): 12; is the t",
        ),
    ],
)
def test_wrong_names_are_answered_with_the_closest_one(read, message):
    with pytest.raises(ValueError, match=message):
        read()


def op(labels=None, **options):
    labels = torch.ones(1, 2).long() if labels is None else labels
    return fp.sequence_logps(torch.ones(1, 2, 4), torch.ones(5, 4), labels, **options)


# Another model's tokenizer


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("column", ["prompt_ids", "chosen_ids", "rejected_ids"])
def test_a_token_beyond_the_vocabulary_is_named_by_the_collator(column, padding_free):
    features = with_token(pair_features(3), column, VOCAB + 4)
    collator = PairCollator(0, padding_free=padding_free, vocab_size=VOCAB)
    with pytest.raises(ValueError) as error:
        collator(features)
    for part in (column, "feature 2", "token id 65", f"below the {VOCAB}", "tokenizer"):
        assert part in str(error.value)
    collator(with_token(features, column, VOCAB - 1))
    with pytest.raises(ValueError, match="completion_ids of feature 1: got token id -1, needs ids"):
        PointCollator(0)(with_token(point_features(2), "completion_ids", -1))


@pytest.mark.parametrize("shared_prompt", [False, True])
def test_a_token_beyond_the_vocabulary_is_named_before_the_backbone(shared_prompt, tmp_path):
    model, loss_fn = tiny_llama(), fp.PreferenceLoss("gamma-simpo")
    attach(model, loss_fn)
    before = state_of(loss_fn)
    features = with_token(pair_features(3), "chosen_ids", VOCAB)
    with pytest.raises(ValueError, match=f"input_ids: got token id {VOCAB}, needs .* {VOCAB} of"):
        model(**PairCollator(0, shared_prompt=shared_prompt)(features))
    assert_unchanged(loss_fn, before)
    # It leaves no reference cache.
    with pytest.raises(ValueError, match=f"got token id {VOCAB}, needs ids .* the {VOCAB} of"):
        options = {"cache_dir": tmp_path, "progress": False}
        add_reference_logps(tiny_llama(), features, PairCollator(0), **options)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# Labels all masked, ragged batches


def random_batch(nan_row=None):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, 8, generator=generator)
    if nan_row is not None:
        hidden[nan_row, 3, 2] = math.nan
    weight = torch.randn(13, 8, generator=generator)
    labels = torch.randint(0, 13, (4, 6), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def extras_of(loss_fn):
    return {"reference": torch.zeros(4)} if "reference" in loss_fn.loss.needs else {}


@pytest.mark.parametrize("name", ["simpo", "gamma-simpo", "dpo"])
def test_a_batch_of_masked_labels_warns_and_has_no_gradient(name):
    hidden, weight, labels = random_batch()
    loss_fn = fp.PreferenceLoss(name)
    extras = extras_of(loss_fn)
    with pytest.warns(UserWarning, match="labels: got none but `ignore_index`.* maximum length"):
        loss = loss_fn(hidden, weight, torch.full_like(labels, -100), **extras).loss
    loss.backward()
    assert loss.isfinite() and not hidden.grad.any() and not weight.grad.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels[1:] = -100
        loss_fn(hidden, weight, labels, **extras)


@pytest.mark.parametrize(
    ("column", "wrong", "said"),
    [
        ("chosen_ids", [[1], [2, 3]], "(: | of )feature 1 is no list of token ids"),
        ("chosen_ids", [[1, 2], [3, 4]], r"(: | of )feature 1: got shape \(2, 2\), wanted \(tok"),
        ("chosen_ids", ["a", "b"], "(: | of )feature 1 is no list of token ids"),
        ("chosen_ids", None, "(: | of )feature 1 is no list of token ids"),
        ("chosen_ids", 7, r"(: | of )feature 1: got shape \(\), wanted \(tokens\)"),
    ],
)
def test_token_ids_that_are_no_list_are_named(column, wrong, said):
    features = pair_features(2)
    features[1][column] = wrong
    with pytest.raises(ValueError, match=f"{column}{said}"):
        PairCollator(0)(features)


def test_a_mask_of_another_shape_is_not_broadcast():
    batch, model = PairCollator(0)(pair_features(3)), tiny_llama()
    attach(model, fp.PreferenceLoss("simpo"))
    width = batch["input_ids"].shape[1]
    batch["completion_mask"] = batch["completion_mask"][:1]
    for read in (labels_of, lambda batch: model(**batch)):
        with pytest.raises(ValueError, match=rf"completion_mask: got shape \(1, {width}\), want"):
            read(batch)


def test_a_reference_of_another_batch_is_named():
    hidden, weight, labels = random_batch()
    with pytest.raises(ValueError, match=r"reference: got shape \(6,\), wanted \(4\)"):
        fp.PreferenceLoss("dpo")(hidden, weight, labels, reference=torch.zeros(6))


# NaN from the backbone


@pytest.mark.parametrize("path", ["auto", "local", "recompute", "stash"])
def test_nan_of_the_backbone_leaves_the_gradients_of_other_sequences(path):
    hidden, weight, labels = random_batch(nan_row=2)
    good, _, _ = random_batch()
    weight.requires_grad_(path != "stash")
    rest, found = torch.tensor([0, 1, 3]), []
    for each in (hidden, good):
        # Each backward before the next forward, which would take the probabilities that are kept.
        sums = fp.sequence_logps(each, weight, labels, path=path).sums
        sums[rest].sum().backward()
        found.append(sums.isnan().tolist())
    assert found == [[False, False, True, False], [False] * 4]
    torch.testing.assert_close(hidden.grad[rest], good.grad[rest], rtol=1e-5, atol=1e-6)


# Scores in some rows only: none for losses that need none, an error for others

NONE = {"score_chosen": None, "score_rejected": None}
# What a batch of pairs without scores has.
BARE = {"input_ids", "attention_mask", "completion_mask", "label_counts"}
SIDES = ("ref_chosen_logps", "ref_rejected_logps")


def texts(*scores):
    return [
        {"prompt": "cat sat on".split()[i], "chosen": "the cat", "rejected": "on mat", **given}
        for i, given in enumerate(scores)
    ]


@pytest.mark.parametrize("lacking", [{}, NONE, {"score_chosen": 2.0, "score_rejected": None}])
def test_pairs_keep_their_scores_where_all_have_them(lacking, caplog):
    scored = {"score_chosen": 8.5, "score_rejected": 1}
    assert [row["score_rejected"] for row in preference(texts(scored, scored))] == [1, 1]
    with caplog.at_level(logging.WARNING):
        records = preference(texts(scored, lacking, scored))
    assert [set(row) for row in records] == [{"prompt", "chosen", "rejected"}] * 3
    assert caplog.messages == ["preference: dropped all scores, 1 of 3 pairs lack them"]
    caplog.clear()
    assert preference(texts(lacking)) == preference(texts({})) and not caplog.messages
    features = tokenise_pairs(records, tiny_tokenizer(), 16, 8)
    assert PairCollator(0)(features).keys() == BARE
    # Columns of None are no columns.
    features = [each | dict.fromkeys((*SIDES, *NONE)) for each in pair_features(2)]
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


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("kind", ["pairs", "points"])
def test_a_batch_with_a_gap_serves_losses_that_need_no_scores(kind, absent):
    if kind == "pairs":
        features = [each | dict.fromkeys(SIDES, -3.0) for each in pair_features(3)]
        collator, names, fits, misfits = PairCollator(0), set(NONE), "dpo", "odpo"
    else:
        given = {"desirable": True, "reference": -3.0, "prompt_reference": -2.0}
        features = [each | given for each in point_features(3)]
        collator, names, fits, misfits = PointCollator(0), {"reward"}, "kto", "dro"
    *others, last = features
    kept = {name: value for name, value in last.items() if name not in names}
    batch = collator([*others, kept if absent else kept | dict.fromkeys(names)])
    assert "rewards" not in batch and "rewards" in collator(features)
    assert preference_outputs(tiny_llama(), fp.PreferenceLoss(fits), batch).loss.isfinite()
    with pytest.raises(ValueError, match=f"{misfits} needs `rewards`"):
        preference_outputs(tiny_llama(), fp.PreferenceLoss(misfits), batch)
