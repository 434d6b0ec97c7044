"""Bad input ends in a message that says what it was and what is needed, and changes nothing."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from tiny_models import VOCAB, pair_features, point_features, tiny_llama
from transformers import Trainer

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, PointCollator, labels_of, tokenise_pairs
from fused_prefopt.integrations.transformers import PreferenceTrainer, attach
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


def arguments(folder, **options):
    from test_integrations_transformers import arguments

    return arguments(folder, **options)


def trainer(folder, features, loss="simpo", collator=None, **options):
    return PreferenceTrainer(
        tiny_llama(),
        arguments(folder, **options),
        train_dataset=features,
        data_collator=collator or PairCollator(0),
        loss_fn=fp.PreferenceLoss(loss),
    )


# Missing reference

REMEDIES = (
    r"give reference=<model> or reference='adapter' \(the model without its PEFT adapter\) or"
    " reference_cache=<folder> with one of them or rows with the columns of"
    " `add_reference_logps`$"
)


def test_a_missing_reference_is_named_and_changes_nothing():
    model, batch = tiny_llama(), PairCollator(0)(pair_features(4))
    attachment = attach(model, fp.PreferenceLoss("alpha-dpo"))
    before = state_of(attachment.loss_fn)
    with pytest.raises(ValueError, match=f"^alpha-dpo needs `reference`: .* model; {REMEDIES}"):
        model(**batch)
    assert_unchanged(attachment.loss_fn, before)
    assert attachment.pop_metrics("train") == {}


def test_a_missing_reference_is_an_error_before_training(tmp_path):
    wanted = f"^train_dataset: dpo needs `reference`: .* model; {REMEDIES}"
    with pytest.raises(ValueError, match=wanted):
        trainer(tmp_path, pair_features(8), "dpo", save_strategy="steps", save_steps=1)
    plain = Trainer(
        tiny_llama(),
        arguments(tmp_path),
        train_dataset=pair_features(8),
        data_collator=PairCollator(0),
    )
    with pytest.raises(ValueError, match=wanted):
        attach(plain, fp.PreferenceLoss("dpo"))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_missing_divergence_is_not_to_be_had_from_a_cache(tmp_path):
    with pytest.raises(ValueError, match="^train_dataset: tdpo1 needs `reference`") as caught:
        trainer(tmp_path, pair_features(8), "tdpo1")
    assert str(caught.value).endswith("or reference='adapter' (the model without its PEFT adapter)")


# Wrong names


def test_a_wrong_column_is_answered_with_the_closest_one():
    features = [
        {("choosen_ids" if name == "chosen_ids" else name): value for name, value in row.items()}
        for row in pair_features(2)
    ]
    with pytest.raises(ValueError, match=r"'chosen_ids' \(did you mean 'choosen_ids'\?\); got"):
        PairCollator(0)(features)
    with pytest.raises(ValueError, match=r"missing column 'chosen' \(did you mean 'choosen'\?\)"):
        tokenise_pairs([{"prompt": "a", "choosen": "b", "rejected": "c"}], Tokenizer(), 9, 4)
    with pytest.raises(ValueError, match=r"'completion_ids' \(did you mean 'completions_ids' or"):
        PointCollator(0)([{"prompt_ids": [1], "completions_ids": [2]}])


class Tokenizer:
    """As much of a tokenizer as tokenising needs before it looks at a record."""

    eos_token_id = bos_token_id = 1

    def encode(self, text, add_special_tokens=False):
        return []


def test_a_name_like_none_of_those_known_gets_no_suggestion():
    with pytest.raises(ValueError, match=r"missing column 'rejected_ids'; got 'x', 'chosen_ids'"):
        PairCollator(0)([{"x": 1, "chosen_ids": [2], "prompt_ids": [3]}])


@pytest.mark.parametrize(
    ("name", "closest"),
    [("simpoo", "simpo"), ("alfa-dpo", "alpha-dpo"), ("Gamma_DPPO", "gamma-dpo")],
)
def test_an_unknown_loss_is_answered_with_the_closest_ones(name, closest):
    with pytest.raises(ValueError, match=rf"unknown loss {name!r} \(did you mean .*'{closest}'"):
        fp.PreferenceLoss(name)


@pytest.mark.parametrize(
    ("option", "wrong", "closest"),
    [("path", "recomputed", "recompute"), ("engine", "torsh", "torch")],
)
def test_an_unknown_option_is_answered_with_the_closest_one(option, wrong, closest):
    with pytest.raises(
        ValueError, match=rf"{option}: got '{wrong}' \(did you mean '{closest}'\?\)"
    ):
        fp.sequence_logps(
            torch.ones(1, 2, 4), torch.ones(5, 4), torch.ones(1, 2).long(), **{option: wrong}
        )


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


def test_a_negative_token_is_named_without_any_vocabulary():
    with pytest.raises(ValueError, match="completion_ids of feature 1: got token id -1, needs ids"):
        PointCollator(0)(with_token(point_features(2), "completion_ids", -1))


def test_a_trainer_lets_its_collator_check_before_the_first_step(tmp_path):
    features = with_token(pair_features(8), "rejected_ids", VOCAB)
    built = trainer(tmp_path, features, save_strategy="steps", save_steps=1)
    assert built.data_collator.vocab_size == VOCAB
    with pytest.raises(ValueError, match=f"rejected_ids of .*token id {VOCAB}, .* the {VOCAB} of"):
        built.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    own = PairCollator(0, vocab_size=VOCAB - 1)
    assert trainer(tmp_path, features, collator=own).data_collator is own


def test_trls_collator_checks_too(tmp_path):
    pytest.importorskip("trl")
    from test_integrations_trl import dataset, options, trainer
    from transformers import LlamaConfig

    from fused_prefopt.integrations.trl import FusedDPOConfig, FusedDPOTrainer

    config = LlamaConfig(**tiny_llama().config.to_dict() | {"vocab_size": 5})
    model = type(tiny_llama())(config)
    built = trainer(
        FusedDPOTrainer, FusedDPOConfig(**options(tmp_path, loss="simpo")), dataset(), model
    )
    with pytest.raises(
        ValueError, match=r"input_ids: got token id \d+, needs .* the 5 of the model"
    ):
        built.data_collator(list(built.train_dataset))


@pytest.mark.parametrize("shared_prompt", [False, True])
def test_a_token_beyond_the_vocabulary_is_named_before_the_backbone(shared_prompt):
    model, loss_fn = tiny_llama(), fp.PreferenceLoss("gamma-simpo")
    attach(model, loss_fn)
    before = state_of(loss_fn)
    features = with_token(pair_features(3), "chosen_ids", VOCAB)
    with pytest.raises(ValueError, match=f"input_ids: got token id {VOCAB}, needs .* {VOCAB} of"):
        model(**PairCollator(0, shared_prompt=shared_prompt)(features))
    assert_unchanged(loss_fn, before)


def test_a_token_beyond_the_vocabulary_leaves_no_reference_cache(tmp_path):
    features = with_token(pair_features(3), "prompt_ids", VOCAB + 1)
    with pytest.raises(ValueError, match=f"got token id {VOCAB + 1}, needs ids .* the {VOCAB} of"):
        add_reference_logps(
            tiny_llama(), features, PairCollator(0), cache_dir=tmp_path, progress=False
        )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_op_names_a_label_beyond_the_vocabulary():
    labels = torch.tensor([[0, 3, 12]])
    with pytest.raises(ValueError, match=r"labels: got a label outside \[0, 11\): 12; is the tok"):
        fp.sequence_logps(torch.ones(1, 3, 4), torch.ones(11, 4), labels)


# Labels all masked


def random_batch(nan_row=None):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, 8, generator=generator)
    if nan_row is not None:
        hidden[nan_row, 3, 2] = math.nan
    weight = torch.randn(13, 8, generator=generator)
    labels = torch.randint(0, 13, (4, 6), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize("name", ["simpo", "gamma-simpo", "dpo"])
def test_a_batch_of_masked_labels_warns_and_has_no_gradient(name):
    hidden, weight, labels = random_batch()
    loss_fn = fp.PreferenceLoss(name)
    extras = {"reference": torch.zeros(4)} if "reference" in loss_fn.loss.needs else {}
    with pytest.warns(UserWarning, match="labels: got none but `ignore_index`.* maximum length"):
        loss = loss_fn(hidden, weight, torch.full_like(labels, -100), **extras).loss
    loss.backward()
    assert loss.isfinite() and not hidden.grad.any() and not weight.grad.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels[1:] = -100
        loss_fn(hidden, weight, labels, **extras)


def test_a_completion_without_tokens_is_refused_by_the_collator():
    features = pair_features(2)
    features[1]["rejected_ids"] = []
    with pytest.raises(ValueError, match="rejected_ids: feature 1 is empty, wanted at least 1 tok"):
        PairCollator(0)(features)


# Ragged batches


def test_token_ids_that_are_no_list_are_named():
    features = pair_features(2)
    for wrong, said in (
        ([[1], [2, 3]], "feature 1 is no list of token ids"),
        ([[1, 2], [3, 4]], r"feature 1: got shape \(2, 2\), wanted \(tokens\)"),
        (["a", "b"], "feature 1 is no list of token ids"),
        (None, "feature 1 is no list of token ids"),
        (7, r"feature 1: got shape \(\), wanted \(tokens\)"),
    ):
        features[1]["chosen_ids"] = wrong
        with pytest.raises(ValueError, match=f"chosen_ids(: | of ){said}"):
            PairCollator(0)(features)


def test_a_mask_of_another_shape_is_not_broadcast():
    batch = PairCollator(0)(pair_features(3))
    width = batch["input_ids"].shape[1]
    batch["completion_mask"] = batch["completion_mask"][:1]
    with pytest.raises(
        ValueError, match=rf"completion_mask: got shape \(1, {width}\), wanted \(6,"
    ):
        labels_of(batch)
    with pytest.raises(ValueError, match="completion_mask: got shape"):
        model = tiny_llama()
        attach(model, fp.PreferenceLoss("simpo"))
        model(**batch)


@pytest.mark.parametrize("rows", [3, 5])
def test_an_odd_number_of_sequences_is_no_pairs(rows):
    hidden, weight, labels = random_batch()
    hidden = torch.cat((hidden, hidden))[:rows]
    loss_fn = fp.PreferenceLoss("gamma-simpo")
    before = state_of(loss_fn)
    with pytest.raises(ValueError, match=f"got {rows} sequences, wanted an even number"):
        loss_fn(hidden, weight, torch.cat((labels, labels))[:rows])
    assert_unchanged(loss_fn, before)


def test_a_reference_of_another_batch_is_named():
    hidden, weight, labels = random_batch()
    with pytest.raises(ValueError, match=r"reference: got shape \(6,\), wanted \(4\)"):
        fp.PreferenceLoss("dpo")(hidden, weight, labels, reference=torch.zeros(6))


# NaN from the backbone


@pytest.mark.parametrize("path", ["auto", "local", "recompute", "evaluate", "stash"])
def test_nan_of_the_backbone_is_seen_in_its_sequence_alone(path):
    hidden, weight, labels = random_batch(nan_row=2)
    good, _, _ = random_batch()
    if path in ("evaluate", "stash"):
        weight.requires_grad_(False)
    if path == "evaluate":
        hidden, good = hidden.detach(), good.detach()
    sums = fp.sequence_logps(hidden, weight, labels, path=path).sums
    assert sums.isnan().tolist() == [False, False, True, False]
    rest = torch.tensor([0, 1, 3])
    torch.testing.assert_close(
        sums[rest], fp.sequence_logps(good, weight, labels, path=path).sums[rest], rtol=0, atol=0
    )
    if path != "evaluate":
        sums[rest].sum().backward()
        fp.sequence_logps(good, weight, labels, path=path).sums[rest].sum().backward()
        torch.testing.assert_close(hidden.grad[rest], good.grad[rest], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["simpo", "gamma-simpo", "alpha-dpo"])
def test_nan_of_the_backbone_is_seen_in_loss_and_metrics(name):
    hidden, weight, labels = random_batch(nan_row=2)
    loss_fn = fp.PreferenceLoss(name)
    extras = {"reference": torch.zeros(4)} if "reference" in loss_fn.loss.needs else {}
    result = loss_fn(hidden, weight, labels, **extras)
    assert result.loss.isnan() and result.metrics["nonfinite"] == 1
    good = fp.PreferenceLoss(name)(*random_batch(), **extras)
    assert good.loss.isfinite() and good.metrics["nonfinite"] == 0


def test_nan_of_the_backbone_is_logged_by_a_trainer(tmp_path):
    built = trainer(tmp_path, pair_features(8), max_steps=1)
    with torch.no_grad():
        built.model.model.norm.weight[0] = math.nan
    with pytest.raises(FloatingPointError, match="step 1: got a loss of nan"):
        built.train()
    (row,) = [row for row in built.state.log_history if "loss" in row]
    assert math.isnan(row["loss"]) and row["nonfinite"] == 4 * 2
