"""What trainers and `attach` refuse before they train, each with a message that says why."""

from __future__ import annotations

import inspect

import pytest
import torch
from data_tokenizer import tiny_tokenizer
from tiny_models import VOCAB, pair_features, tiny_llama
from trainers import (
    DATA,
    KINDS,
    OF_TRL,
    arguments,
    build,
    config,
    pairs,
    pairs_with_reference,
    points,
    trl_classes,
)
from transformers import LlamaModel, Trainer

import fused_prefopt as fp
from fused_prefopt.data import PairCollator
from fused_prefopt.integrations.transformers import PreferenceTrainer, attach

REMEDIES = (
    r"give reference=<model> or reference='adapter' \(the model without its PEFT adapter\) or"
    " reference_cache=<folder> with one of them or rows with the columns of"
    " `add_reference_logps`$"
)


def without_scores(rows):
    return [{name: row[name] for name in row if "score" not in name} for row in rows]


def test_a_missing_reference_is_named_and_changes_nothing(tmp_path):
    model, batch = tiny_llama(), PairCollator(0)(pair_features(4))
    attachment = attach(model, fp.PreferenceLoss("alpha-dpo"))
    before = {key: value.clone() for key, value in attachment.loss_fn.state_dict().items()}
    with pytest.raises(ValueError, match=f"^alpha-dpo needs `reference`: .* model; {REMEDIES}"):
        model(**batch)
    for key, value in attachment.loss_fn.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)
    assert attachment.pop_metrics("train") == {}
    for kind in ("transformers", "attached"):
        with pytest.raises(
            ValueError, match=f"^train_dataset: dpo needs `refe.* model; {REMEDIES}"
        ):
            build(kind, tmp_path, pair_features(8))
        assert not list(tmp_path.glob("checkpoint-*"))
    # A divergence is not to be had from a cache.
    with pytest.raises(ValueError, match="^train_dataset: tdpo1 needs `reference`") as caught:
        build("transformers", tmp_path, pair_features(8), loss="tdpo1")
    assert str(caught.value).endswith("or reference='adapter' (the model without its PEFT adapter)")


def test_a_data_set_that_lacks_what_the_loss_needs_is_named(tmp_path):
    scored, known = pair_features(4), pairs_with_reference(4)
    loss = "reward-distillation"
    with pytest.raises(ValueError, match=rf"^train_dataset: {loss} needs `re"):
        build("transformers", tmp_path, without_scores(scored), loss=loss)
    bare = without_scores(known)
    for name, sets in (
        ("eval_dataset", bare),
        (r"eval_dataset\['bare'\]", {"good": known, "bare": bare}),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: {loss} needs `rewards`"):
            build("transformers", tmp_path, known, loss=loss, given={"eval_dataset": sets})
    # A reference at hand gives what the rows do not have.
    build("transformers", tmp_path, scored, loss=loss, reference=tiny_llama(7))


def test_trls_data_sets_too(tmp_path):
    scores = {"score_chosen": [2.0] * 8, "score_rejected": [0.5] * 8}
    with pytest.raises(ValueError, match="odpo needs `rewards`"):
        build("dpo", tmp_path, loss="odpo")
    given = {"eval_dataset": {"good": pairs(8, **scores), "bare": pairs(4)}}
    with pytest.raises(ValueError, match=r"^eval_dataset\['bare'\]: odpo needs `rewards`"):
        build("dpo", tmp_path, pairs(8, **scores), loss="odpo", given=given)
    with pytest.raises(ValueError, match="needs a column 'label'"):
        build("kto", tmp_path, points(reward=[1.0] * 16))
    with pytest.raises(ValueError, match="sync_ref_model: got True with simpo, needs a loss with"):
        build("dpo", tmp_path, loss="simpo", sync_ref_model=True)
    for kind in OF_TRL:
        given = {"args": config(f"trl-{kind}", tmp_path), "train_dataset": DATA[kind]()}
        with pytest.raises(ValueError, match=f"wanted a Fused{kind.upper()}Config"):
            trl_classes(kind)[0](tiny_llama(), processing_class=tiny_tokenizer(), **given)


def test_texts_without_a_collator_are_refused(tmp_path):
    texts = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    wanted = "got columns prompt, chosen, rejected, ne"
    with pytest.raises(ValueError, match=f"^train_dataset: {wanted}"):
        build("transformers", tmp_path, texts)
    with pytest.raises(ValueError, match=f"^eval_dataset: {wanted}"):
        build("transformers", tmp_path, given={"eval_dataset": texts, "train_dataset": None})


MODEL = tiny_llama()


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("dpo", {"reference": "adapter"}, "got 'adapter' with a LlamaForCausalLM, needs a Peft"),
        ("dpo", {"reference": "adaptor"}, "got 'adaptor', needs 'adapter', 'precomputed' or"),
        ("dpo", {"reference": MODEL}, "the model that trains, needs a reference_cache"),
        (
            "dpo",
            {"reference": MODEL, "reference_cache": "cache"},
            "reference_cache: got a model, needs the trainer",
        ),
        (
            fp.PreferenceLoss("tdpo1", ld_alpha=0.5),
            {"reference": tiny_llama(7)},
            "ld_alpha: got 0.5 with tdpo1, needs None",
        ),
    ],
)
def test_references_that_do_not_fit(loss, options, message):
    loss = fp.PreferenceLoss(loss) if isinstance(loss, str) else loss
    with pytest.raises(ValueError, match=message):
        attach(MODEL, loss, **options)


def test_caches_that_do_not_fit(tmp_path):
    given = {"reference_cache": tmp_path / "cache"}
    with pytest.raises(ValueError, match="got one with reference='precomputed', needs 'adapter'"):
        build("transformers", tmp_path, given=given)
    loss = fp.PreferenceLoss("dpo", ld_alpha=0.5)
    with pytest.raises(ValueError, match="more of the reference than the log-probs of whole"):
        build("transformers", tmp_path, loss=loss, reference=tiny_llama(7), given=given)


def test_trainers_that_make_their_models_split_them_or_drop_columns(tmp_path):
    given = {"loss_fn": fp.PreferenceLoss("dpo"), "model_init": lambda: tiny_llama()}
    with pytest.raises(ValueError, match="model_init: got a function, needs a model"):
        PreferenceTrainer(None, arguments(tmp_path), **given)
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="args: got n_gpu=2, needs a process for each"):
        build("transformers", tmp_path, given={"args": args})
    for wrong in ({"remove_unused_columns": True}, {"label_names": ["labels"]}):
        with pytest.raises(ValueError, match="args: wanted remove_unused_columns=False and"):
            attach(Trainer(tiny_llama(), arguments(tmp_path, **wrong)), fp.PreferenceLoss("dpo"))
    with pytest.raises(ValueError, match="got False and .'labels'.$"):
        build("transformers", tmp_path, label_names=["labels"])


@pytest.mark.parametrize("kind", KINDS)
def test_functions_of_logits_are_refused_by_name_and_by_place(tmp_path, kind):
    wanted = "^{}: got a function of logits, needs None: .*; log_tokens=True logs"
    name = "compute_metrics"
    with pytest.raises(ValueError, match=wanted.format(name)):
        build(kind, tmp_path, given={name: print})
    of_trl, other = kind in OF_TRL, "preprocess_logits_for_metrics"
    with pytest.raises(TypeError if of_trl else ValueError, match=other):
        build(kind, tmp_path, given={other: print})
    if of_trl:
        make, data = trl_classes(kind)[0], DATA[kind]()
        args = config(kind, tmp_path)
        with pytest.raises(ValueError, match=wanted.format(name)):
            make(tiny_llama(), None, args, None, data, None, tiny_tokenizer(), print)
    elif kind == "transformers":
        names = list(inspect.signature(Trainer).parameters)
        by_place = {"model": tiny_llama(), "args": arguments(tmp_path)}
        by_place |= {"data_collator": PairCollator(0), "train_dataset": pairs_with_reference()}
        by_place |= {"optimizers": (None, None)}
        for each in (name, other):
            given = [by_place.get(place) for place in names[: names.index(each)]]
            with pytest.raises(ValueError, match=wanted.format(each)):
                PreferenceTrainer(*given, print, loss_fn=fp.PreferenceLoss("dpo"))


# Another model's tokenizer


def test_a_trainer_lets_its_collator_check_before_the_first_step(tmp_path):
    features = pair_features(8)
    features[-1]["rejected_ids"][-1] = VOCAB
    options = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 8}
    run = build("transformers", tmp_path, features, loss="simpo", **options)
    assert run.data_collator.vocab_size == VOCAB
    with pytest.raises(ValueError, match=f"rejected_ids of .*token id {VOCAB}, .* the {VOCAB} of"):
        run.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    own = PairCollator(0, vocab_size=VOCAB - 1)
    run = build("transformers", tmp_path, features, loss="simpo", given={"data_collator": own})
    assert run.data_collator is own


def test_trls_collator_checks_too(tmp_path):
    model = tiny_llama()
    model = type(model)(type(model.config)(**model.config.to_dict() | {"vocab_size": 5}))
    run = build("dpo", tmp_path, model=model, loss="simpo")
    with pytest.raises(ValueError, match=r"input_ids: got token id \d+, needs .* the 5 of the mod"):
        run.data_collator(list(run.train_dataset))


# Checkpoints without a language model's head


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    """A causal model loaded from the checkpoint of one without a head, and its folder."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("headless")
    settings = tiny_llama(pad_token_id=0).config
    settings.architectures = None
    LlamaModel(settings).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder), folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_head_is_refused(tmp_path, headless, kind):
    model, folder = headless
    wanted = rf"^{{}}: got a checkpoint \({folder}\) of a LlamaModel, which has no head of a"
    with pytest.raises(ValueError, match=wanted.format("model")):
        build(kind, tmp_path, model=model, reference=tiny_llama())
    name = "ref_model" if kind in OF_TRL else "reference"
    with pytest.raises(ValueError, match=wanted.format(name)):
        build(kind, tmp_path, reference=model)


def test_trl_given_a_folders_name_refuses_it_and_takes_a_causal_one(
    tmp_path, headless, monkeypatch
):
    with pytest.raises(ValueError, match=" of a LlamaModel, which has no language model's head; n"):
        build("dpo", tmp_path, model=str(headless[1]))
    folder = str(tmp_path / "causal")
    tiny_llama().save_pretrained(folder)
    for kind in OF_TRL:
        run = build(kind, tmp_path, model=folder)
        assert torch.equal(run.model.lm_head.weight, tiny_llama().lm_head.weight)
    # It is looked up as TRL loads it.
    seen, shared = [], trl_classes("dpo")[0].__bases__[0].__module__
    monkeypatch.setattr(
        f"{shared}.require_causal_checkpoint", lambda name, **given: seen.append((name, given))
    )
    loading = {"revision": "main", "dtype": "float32", "device_map": None}
    build("dpo", tmp_path, model=folder, model_init_kwargs=loading, trust_remote_code=True)
    assert seen == [(folder, {"revision": "main", "trust_remote_code": True})]
