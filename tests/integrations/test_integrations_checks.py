"""What a trainer is told before it trains, and what it may leave out."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from test_integrations_transformers import arguments, lora, pairs_with_reference
from tiny_models import pair_features, point_features, tiny_llama
from torch import nn
from transformers import Trainer, TrainingArguments

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.integrations.reference_pass import place
from fused_prefopt.integrations.transformers import PreferenceTrainer, attach
from fused_prefopt.reference import add_reference_logps

META = torch.device("meta")


def trainer(folder, loss="dpo", **given):
    settings = {
        "model": tiny_llama(),
        "args": arguments(folder),
        "data_collator": PairCollator(0),
        "loss_fn": fp.PreferenceLoss(loss),
    }
    return PreferenceTrainer(**(settings | given))


def test_a_model_without_values_leaves_the_losses_statistics_alone():
    with META:
        model = tiny_llama()
    loss_fn = fp.PreferenceLoss("gamma-simpo")
    attach(model, loss_fn)
    assert all(value.device.type == "cpu" for value in loss_fn.buffers())
    model.to_empty(device="cpu").load_state_dict(tiny_llama().state_dict())
    model(**PairCollator(0)(pair_features(4)))
    assert loss_fn.statistics.margins.isfinite().sum() == 4


def test_a_loss_follows_the_hidden_states():
    from fused_prefopt.integrations.attachment import _move

    loss_fn = fp.PreferenceLoss("gamma-simpo")
    _move(loss_fn, META)
    assert all(value.is_meta for value in loss_fn.buffers())
    with pytest.raises(ValueError, match="model: got one on mps, needs a device that has float64"):
        _move(loss_fn, torch.device("mps"))


def test_which_references_are_moved_to_an_accelerator():
    def devices(model):
        return {value.device.type for value in model.parameters()}

    class Special(nn.Parameter):
        """As quantised and flattened parameters are."""

    moved, kept = tiny_llama(), [tiny_llama() for _ in range(4)]
    place(moved, META)
    assert devices(moved) == {"meta"}
    place(moved, torch.device("cpu"))
    assert devices(moved) == {"meta"}
    next(kept[0].parameters()).ds_id = 3
    kept[1].hf_device_map = {"": "cpu"}
    kept[2].lm_head.weight = Special(kept[2].lm_head.weight.data)
    kept[3].lm_head.to(META)
    for model in kept:
        before = [value.device for value in model.parameters()]
        place(model, META)
        assert [value.device for value in model.parameters()] == before


def test_a_reference_is_moved_to_its_first_batch(monkeypatch):
    from fused_prefopt.integrations import reference_pass

    seen = []
    monkeypatch.setattr(reference_pass, "place", lambda model, device: seen.append((model, device)))
    model, reference = tiny_llama(), tiny_llama(7)
    attach(model, fp.PreferenceLoss("dpo"), reference=reference)
    assert not seen
    for _ in range(2):
        model(**PairCollator(0)(pair_features(4)))
    assert seen == [(reference, torch.device("cpu"))]
    adapted = lora()
    attach(adapted, fp.PreferenceLoss("dpo"), reference="adapter")
    adapted(**PairCollator(0)(pair_features(4)))
    assert len(seen) == 1


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="args: got n_gpu=2, needs a process for each"):
        trainer(tmp_path, args=args)


def test_a_trainer_that_makes_its_models_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model_init: got a function, needs a model"):
        trainer(tmp_path, model=None, model_init=lambda: tiny_llama())


def test_a_cache_without_a_reference_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got one with reference='precomputed', needs 'adapter'"):
        trainer(tmp_path, train_dataset=pairs_with_reference(), reference_cache=tmp_path / "cache")


def test_the_precision_of_cached_references_is_the_trainings(tmp_path):
    features = pair_features(8)
    for half in (True, False):
        run = trainer(
            tmp_path,
            args=arguments(tmp_path, bf16=half),
            train_dataset=features,
            reference=tiny_llama(7),
            reference_cache=tmp_path / "cache",
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            wanted = add_reference_logps(
                tiny_llama(7), features, PairCollator(0), batch_size=8, progress=False
            )
        assert run.train_dataset == wanted
        run.train()
        # All pairs are in one batch, in another order: what the reference says in every step.
        each = trainer(
            tmp_path,
            args=arguments(tmp_path, bf16=half),
            train_dataset=features,
            reference=tiny_llama(7),
        )
        each.train()
        for name in ("rewards/chosen", "rewards/rejected"):
            rewards = [one.state.log_history[0][name] for one in (run, each)]
            assert rewards[0] == pytest.approx(rewards[1], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("several", [False, True])
def test_a_data_set_that_lacks_what_the_loss_needs_is_named(tmp_path, several):
    scored = pair_features(4)
    bare = [{key: row[key] for key in row if "score" not in key} for row in scored]
    with pytest.raises(ValueError, match=r"^train_dataset: reward-distillation needs `re"):
        trainer(tmp_path, "reward-distillation", train_dataset=bare)
    given = {"train_dataset": pairs_with_reference(4)}
    unscored = [
        {key: row[key] for key in row if "score" not in key} for row in given["train_dataset"]
    ]
    given["eval_dataset"] = (
        {"good": given["train_dataset"], "bare": unscored} if several else unscored
    )
    name = r"eval_dataset\['bare'\]" if several else "eval_dataset"
    with pytest.raises(ValueError, match=rf"^{name}: reward-distillation needs `rewards`"):
        trainer(tmp_path, "reward-distillation", **given)
    # A reference at hand gives what the rows do not have.
    trainer(tmp_path, "reward-distillation", train_dataset=scored, reference=tiny_llama(7))


@pytest.mark.slow
def test_trls_evaluation_sets_are_looked_at_too(tmp_path):
    pytest.importorskip("trl")
    from test_integrations_trl import dataset, options
    from test_integrations_trl import trainer as trl_trainer

    from fused_prefopt.integrations.trl import FusedDPOConfig, FusedDPOTrainer

    scores = {"score_chosen": [2.0] * 8, "score_rejected": [0.5] * 8}
    config = FusedDPOConfig(**options(tmp_path), loss="odpo")
    sets = {"good": dataset(8, **scores), "bare": dataset(4)}
    with pytest.raises(ValueError, match=r"^eval_dataset\['bare'\]: odpo needs `rewards`"):
        trl_trainer(
            FusedDPOTrainer,
            config,
            dataset(8, **scores),
            ref_model=tiny_llama(5),
            eval_dataset=sets,
        )


@pytest.mark.parametrize("kind", ["pairs", "points"])
def test_a_trainer_without_a_collator_and_settings_for_one(tmp_path, kind):
    if kind == "pairs":
        features, loss, collator = pairs_with_reference(8), "dpo", PairCollator(0)
    else:
        rows = point_features(8)
        features = add_reference_logps(tiny_llama(7), rows, PointCollator(0), progress=False)
        loss, collator = "dro", PointCollator(0)
    settings = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "max_steps": 2}
    plain = TrainingArguments(
        output_dir=str(tmp_path), disable_tqdm=True, logging_steps=1, **settings
    )
    explicit = copy.copy(plain)
    explicit.remove_unused_columns, explicit.label_names = False, ["completion_mask"]
    losses = []
    for args, given in ((plain, None), (explicit, collator)):
        run = trainer(tmp_path, loss, args=args, train_dataset=features, data_collator=given)
        assert isinstance(run.data_collator, type(collator))
        run.train()
        losses.append([row["loss"] for row in run.state.log_history if "loss" in row])
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_texts_without_a_collator_are_refused(tmp_path):
    texts = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    with pytest.raises(
        ValueError, match="^train_dataset: got columns prompt, chosen, rejected, ne"
    ):
        trainer(tmp_path, train_dataset=texts, data_collator=None)
    with pytest.raises(ValueError, match="^eval_dataset: got columns prompt, chosen, rejected"):
        trainer(tmp_path, eval_dataset=texts, data_collator=None)


def test_the_fields_of_a_collator_of_ones_own_are_its_affair(tmp_path):
    def collator(features):
        return PairCollator(0)([{**row, **far} for row in features])

    far = {"ref_chosen_logps": -3.0, "ref_rejected_logps": -2.0}
    run = trainer(tmp_path, train_dataset=pair_features(8), data_collator=collator)
    assert run.train().training_loss > 0


def test_attach_to_a_trainer_without_data(tmp_path):
    attachment = attach(Trainer(tiny_llama(), arguments(tmp_path)), fp.PreferenceLoss("dpo"))
    assert attachment.reference is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_a_prediction_leaves_nothing_in_the_next_evaluation(tmp_path, kind):
    if kind == "trl":
        pytest.importorskip("trl")
        from test_integrations_trl import dataset, options
        from test_integrations_trl import trainer as trl_trainer

        from fused_prefopt.integrations.trl import FusedDPOConfig, FusedDPOTrainer

        config = FusedDPOConfig(**options(tmp_path))
        run = trl_trainer(
            FusedDPOTrainer, config, dataset(), ref_model=tiny_llama(5), eval_dataset=dataset(8)
        )
        others = run.train_dataset
    else:
        others = pairs_with_reference(16)
        run = trainer(tmp_path, train_dataset=others, eval_dataset=others[:4])
    margins = []
    for _ in range(2):
        run.evaluate()
        margins.append(run.state.log_history[-1]["eval_rewards/margins"])
        assert not run.predict(others).predictions
    assert margins[0] == margins[1]


@pytest.mark.slow
def test_trls_precomputed_references_are_those_of_the_options(tmp_path):
    pytest.importorskip("trl")
    from test_integrations_trl import dataset, options
    from test_integrations_trl import trainer as trl_trainer
    from trl import DPOConfig, DPOTrainer

    from fused_prefopt.integrations.trl import FusedDPOConfig, FusedDPOTrainer

    given = options(tmp_path, precompute_ref_log_probs=True)
    first = trl_trainer(DPOTrainer, DPOConfig(**given), dataset())
    names = ["ref_chosen_logps", "ref_rejected_logps"]
    # One data set for all: TRL finds by its fingerprint what it has computed.
    data = first.train_dataset.remove_columns(names)
    first._precompute_ref_logps(data, "train", 4)
    for alpha in (None, 0.0, 0.5):
        config = FusedDPOConfig(**given, ld_alpha=alpha)
        run = trl_trainer(FusedDPOTrainer, config, dataset())
        rows = run._precompute_ref_logps(data, "train", 4).select(range(4))
        batch = run.data_collator(list(rows))
        wanted = run.compute_ref_log_probs(run.model, batch)
        for name, values in zip(names, wanted, strict=True):
            torch.testing.assert_close(batch[name], values)


def test_syncing_a_reference_that_a_loss_does_not_have_is_refused(tmp_path):
    pytest.importorskip("trl")
    from test_integrations_trl import dataset, options
    from test_integrations_trl import trainer as trl_trainer

    from fused_prefopt.integrations.trl import FusedDPOConfig, FusedDPOTrainer

    config = FusedDPOConfig(**options(tmp_path, sync_ref_model=True), loss="simpo")
    with pytest.raises(ValueError, match="sync_ref_model: got True with simpo, needs a loss with"):
        trl_trainer(FusedDPOTrainer, config, dataset(4))


@pytest.mark.slow
def test_an_adapter_on_the_head_trains_under_trl_as_under_the_preference_trainer(tmp_path):
    peft = pytest.importorskip("peft")
    pytest.importorskip("trl")
    from test_integrations_trl import dataset, history, options
    from test_integrations_trl import trainer as trl_trainer

    from fused_prefopt.integrations.trl import FusedDPOConfig, FusedDPOTrainer

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    given = options(tmp_path, max_steps=4, learning_rate=1e-2, train_sampling_strategy="sequential")
    theirs = trl_trainer(FusedDPOTrainer, FusedDPOConfig(**given), dataset(), peft_config=config)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_llama(), config)
    model.load_state_dict(theirs.model.state_dict())
    plain = given | {"remove_unused_columns": False}
    ours = trainer(
        tmp_path,
        model=model,
        args=TrainingArguments(**plain),
        data_collator=PairCollator(0),
        train_dataset=list(theirs.train_dataset),
        reference="adapter",
    )
    for run in (theirs, ours):
        run.train()
    for name in ("loss", "rewards/margins", "logps/chosen"):
        assert history(theirs, name) == pytest.approx(history(ours, name), rel=1e-4), name
    trained = dict(theirs.model.named_parameters())
    assert any("lm_head.lora_B" in name and value.any() for name, value in trained.items())


@pytest.mark.slow
def test_ktos_trainer_takes_an_adapter_on_the_head(tmp_path):
    peft = pytest.importorskip("peft")
    pytest.importorskip("trl")
    import test_integrations_points as points

    from fused_prefopt.integrations.trl import FusedKTOConfig, FusedKTOTrainer

    config = peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    given = FusedKTOConfig(**points.options(tmp_path, max_steps=2, learning_rate=1e-2))
    run = points.trainer(FusedKTOTrainer, given, peft_config=config)
    run.train()
    trained = dict(run.model.named_parameters())
    assert any("lm_head.lora_B" in name and value.any() for name, value in trained.items())


@pytest.mark.parametrize("name", ["compute_metrics", "preprocess_logits_for_metrics"])
def test_functions_of_logits_are_refused(tmp_path, name):
    wanted = f"^{name}: got a function of logits, needs None: .*; log_tokens=True logs entropy"
    features = pairs_with_reference()
    with pytest.raises(ValueError, match=wanted):
        trainer(tmp_path, train_dataset=features, **{name: print})
    names = list(inspect.signature(Trainer).parameters)
    by_place = {"model": tiny_llama(), "args": arguments(tmp_path), "optimizers": (None, None)}
    by_place |= {"data_collator": PairCollator(0), "train_dataset": features}
    given = [by_place.get(each) for each in names[: names.index(name)]]
    with pytest.raises(ValueError, match=wanted):
        PreferenceTrainer(*given, print, loss_fn=fp.PreferenceLoss("dpo"))
    plain = Trainer(tiny_llama(), arguments(tmp_path), **{name: print})
    with pytest.raises(ValueError, match=wanted):
        attach(plain, fp.PreferenceLoss("simpo"))
