"""transformers' Trainer: the loss inside `forward`, accumulation, metrics, resuming."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import eager_sums, pair_features, point_features, tiny_llama
from transformers import Trainer, TrainingArguments

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.integrations.transformers import PreferenceTrainer, attach, preference_outputs
from fused_prefopt.reference import add_reference_logps


def arguments(folder, **options):
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["completion_mask"],
        "use_cpu": True,
        "logging_steps": 1,
    }
    return TrainingArguments(output_dir=str(folder), **(settings | options))


def pairs_with_reference(count=8):
    return add_reference_logps(tiny_llama(7), pair_features(count), PairCollator(0), progress=False)


@pytest.mark.parametrize("padding_free", [False, True])
def test_loss_of_a_batch_equals_the_models_own_logits(padding_free):
    model, features = tiny_llama().double(), pairs_with_reference()
    collator = PairCollator(0, padding_free=padding_free)
    result = preference_outputs(model, fp.PreferenceLoss("dpo"), collator(features))
    result.loss.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    policy = torch.cat(
        [
            eager_sums(model, features, f"{side}_ids", "completion")
            for side in ("chosen", "rejected")
        ]
    )
    reference = torch.tensor(
        [feature[f"ref_{side}_logps"] for side in ("chosen", "rejected") for feature in features],
        dtype=torch.float64,
    )
    delta = 0.1 * (policy - reference)
    truth = -torch.nn.functional.logsigmoid(delta[:8] - delta[8:]).mean()
    truth.backward()
    torch.testing.assert_close(result.loss, truth, rtol=1e-6, atol=0)
    for name, value in model.named_parameters():
        torch.testing.assert_close(gradients[name], value.grad, rtol=1e-5, atol=1e-9)


def test_dro_takes_the_prompts_own_log_ratio_from_the_same_pass():
    model, reference = tiny_llama().double(), tiny_llama(7).double()
    features = add_reference_logps(reference, point_features(6), PointCollator(0), progress=False)
    loss_fn = fp.PreferenceLoss("dro", beta=0.5, log_z0=1.0)
    result = preference_outputs(model, loss_fn, PointCollator(0)(features))
    with torch.no_grad():
        sums = {
            (who, part): eager_sums(each, features, "completion_ids", part)
            for who, each in (("policy", model), ("reference", reference))
            for part in ("completion", "prompt")
        }
    ratio, prompt_ratio = (
        sums["policy", part] - sums["reference", part] for part in ("completion", "prompt")
    )
    scores = torch.tensor([feature["reward"] for feature in features], dtype=torch.float64)
    truth = (scores - 0.5 * ratio - 0.5 * (prompt_ratio + 1.0)).square()
    torch.testing.assert_close(result.losses, truth, rtol=1e-5, atol=1e-7)


def test_other_batches_go_the_models_own_way_and_detach_restores_it():
    model = tiny_llama()
    ids = torch.arange(1, 9)[None]
    before = model(input_ids=ids).logits
    attachment = attach(model, fp.PreferenceLoss("simpo"))
    assert torch.equal(model(input_ids=ids).logits, before)
    batch = PairCollator(0)(pair_features(4))
    assert set(model(**batch)) == {"loss"}
    attachment.detach()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model(**batch).logits, tiny_llama()(**inputs).logits)


def test_gradient_accumulation_is_exact(tmp_path):
    features, results = pairs_with_reference(), []
    for accumulation in (1, 2, 4):
        model = tiny_llama()
        trainer = PreferenceTrainer(
            model,
            arguments(
                tmp_path,
                per_device_train_batch_size=8 // accumulation,
                gradient_accumulation_steps=accumulation,
                # One plain step: large, so that rounding the weights does not hide the gradient.
                learning_rate=20.0,
            ),
            train_dataset=features,
            data_collator=PairCollator(0),
            loss_fn=fp.PreferenceLoss("dpo"),
        )
        trainer.train()
        results.append(copy.deepcopy(model.state_dict()))
    start = tiny_llama().state_dict()
    for other in results[1:]:
        for name, value in results[0].items():
            step = (value - start[name]).norm()
            assert step > 0, name
            assert (other[name] - value).norm() <= 2e-5 * step, name


def test_metrics_are_logged_by_trls_names_and_mean_over_the_logged_steps(tmp_path):
    features = pairs_with_reference()
    trainer = PreferenceTrainer(
        tiny_llama(),
        arguments(tmp_path, max_steps=4, logging_steps=2, learning_rate=0.0),
        train_dataset=features,
        eval_dataset=features[:4],
        data_collator=PairCollator(0),
        loss_fn=fp.PreferenceLoss("dpo"),
    )
    trainer.train()
    evaluated = trainer.evaluate()
    model = tiny_llama()
    expected = preference_outputs(model, fp.PreferenceLoss("dpo"), PairCollator(0)(features))
    logged = trainer.state.log_history[0]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"):
        assert logged[name] == pytest.approx(expected.metrics[name].item(), rel=1e-4), name
    assert logged["rewards/accuracies"] == expected.metrics["rewards/accuracies"].item()
    few = preference_outputs(model, fp.PreferenceLoss("dpo"), PairCollator(0)(features[:4]))
    history = [row for row in trainer.state.log_history if "eval_rewards/margins" in row]
    assert history[0]["eval_rewards/margins"] == pytest.approx(
        few.metrics["rewards/margins"].item(), rel=1e-4
    )
    assert evaluated["eval_loss"] == pytest.approx(few.loss.item(), rel=1e-5)


def test_resuming_continues_the_run_with_its_statistics(tmp_path):
    features = pairs_with_reference(16)

    def trainer(folder, **options):
        return PreferenceTrainer(
            tiny_llama(),
            arguments(
                folder, per_device_train_batch_size=4, optim="adamw_torch", max_steps=6, **options
            ),
            train_dataset=features,
            data_collator=PairCollator(0),
            loss_fn=fp.PreferenceLoss("gamma-simpo", sample_size=8, queue_size=12),
        )

    whole = trainer(tmp_path / "run", save_strategy="steps", save_steps=3)
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    last = [row["loss"] for row in whole.state.log_history if "loss" in row][3:]
    again = [row["loss"] for row in resumed.state.log_history if "loss" in row][3:]
    assert last == again and len(last) == 3
    queues = [each.attachment.loss_fn.statistics.margins for each in (whole, resumed)]
    assert torch.equal(*(queue.nan_to_num(7.0) for queue in queues))


def test_statistics_freeze_in_evaluation():
    model = tiny_llama()
    attachment = attach(model, fp.PreferenceLoss("gamma-simpo"))
    batch = PairCollator(0)(pair_features(4))
    model.eval()
    model(**batch)
    assert attachment.loss_fn.statistics.margins.isnan().all()
    model.train()
    model(**batch)
    assert attachment.loss_fn.statistics.margins.isfinite().sum() == 4


def lora(seed=0):
    """A tiny model with an adapter whose terms are not zero."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.2)
    model = peft.get_peft_model(tiny_llama(), config)
    torch.manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    return model


@pytest.mark.parametrize("source", ["adapter", "model"])
@pytest.mark.parametrize("padding_free", [False, True])
def test_reference_log_probs_of_a_batch_that_has_none(source, padding_free):
    features = pair_features(4)
    base = tiny_llama() if source == "adapter" else tiny_llama(7)
    given = add_reference_logps(base, features, PairCollator(0), progress=False)
    collator = PairCollator(0, padding_free=padding_free)
    model = lora()
    wanted = preference_outputs(model.eval(), fp.PreferenceLoss("dpo"), collator(given))
    reference = "adapter" if source == "adapter" else tiny_llama(7)
    attachment = attach(model, fp.PreferenceLoss("dpo"), reference=reference)
    result = model(**collator(features))["loss"]
    torch.testing.assert_close(result, wanted.loss, rtol=1e-5, atol=0)
    assert attachment.pop_metrics("eval")["kl/chosen"] != 0
    # The reference is in eval mode: only the policy has the adapter's dropout.
    model.train()
    model(**collator(features))["loss"].backward()
    names = [name for name, value in model.named_parameters() if value.grad is not None]
    assert names and all("lora" in name for name in names)
    metrics = attachment.pop_metrics("train")
    reference_sum = torch.tensor([feature["ref_chosen_logps"] for feature in given]).mean()
    found = metrics["logps/chosen"] - metrics["kl/chosen"]
    assert found == pytest.approx(reference_sum.item(), rel=1e-5)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("source", ["adapter", "model"])
@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("name", ["tdpo2", "alpha-dpo"])
def test_a_reference_at_hand_gives_the_divergence_of_the_tokens(name, source, padding_free):
    features = pair_features(4)
    options = {"alpha-dpo": {"implicit_reference": "sequence_kl"}}.get(name, {})
    loss_fn = fp.PreferenceLoss(name, **options)
    model = lora().eval()
    base = tiny_llama() if source == "adapter" else tiny_llama(7)
    sums = {"policy": [], "reference": [], "sequence_kl": []}
    for side in ("chosen", "rejected"):
        for row in features:
            start, ids = len(row["prompt_ids"]) - 1, [*row["prompt_ids"], *row[f"{side}_ids"]]
            rows = [
                each(input_ids=torch.tensor([ids])).logits[0, start:-1].double().log_softmax(-1)
                for each in (model, base)
            ]
            labels = torch.tensor(ids[start + 1 :])[:, None]
            sums["policy"].append(rows[0].gather(1, labels).sum())
            sums["reference"].append(rows[1].gather(1, labels).sum().detach())
            kl = (rows[1].exp() * (rows[1] - rows[0])).sum()
            sums["sequence_kl"].append(kl)
    lengths = [len(row[f"{side}_ids"]) for side in ("chosen", "rejected") for row in features]
    stacked = {key: torch.stack(values) for key, values in sums.items()}
    truth = loss_fn.eval().from_logps(fp.LogpBatch(lengths=torch.tensor(lengths), **stacked))
    truth.loss.backward()
    wanted = {key: value.grad for key, value in model.named_parameters() if "lora" in key}
    model.zero_grad(set_to_none=True)
    attach(model, loss_fn, reference="adapter" if source == "adapter" else base)
    result = model(**PairCollator(0, padding_free=padding_free)(features))["loss"]
    torch.testing.assert_close(result.double(), truth.loss.detach(), rtol=1e-5, atol=0)
    result.backward()
    for key, value in model.named_parameters():
        if "lora" in key:
            assert (value.grad - wanted[key]).norm() <= 1e-4 * wanted[key].norm(), key


def test_a_reference_for_dro_has_the_prompts_too():
    features = point_features(6)
    given = add_reference_logps(tiny_llama(7), features, PointCollator(0), progress=False)
    losses = []
    for rows, reference in ((given, "precomputed"), (features, tiny_llama(7))):
        model = tiny_llama()
        attach(model, fp.PreferenceLoss("dro", log_z0=1.0), reference=reference)
        losses.append(model(**PointCollator(0)(rows))["loss"])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize("source", ["adapter", "the model itself", "another model"])
def test_a_cache_gives_the_data_sets_the_columns_of_the_reference(tmp_path, source):
    losses = []
    for folder in (None, tmp_path / "cache", tmp_path / "cache"):
        model = lora() if source == "adapter" else tiny_llama()
        references = {"adapter": "adapter", "the model itself": model}
        reference = references.get(source, tiny_llama(7))
        if folder is None:
            # Data that has the columns already.
            base = tiny_llama(7) if source == "another model" else tiny_llama()
            features = add_reference_logps(base, pair_features(8), PairCollator(0), progress=False)
            reference = "precomputed"
        else:
            features = pair_features(8)
        trainer = PreferenceTrainer(
            model.eval(),
            arguments(tmp_path, max_steps=2),
            train_dataset=features,
            eval_dataset={"all": features, "few": features[:4]},
            data_collator=PairCollator(0),
            loss_fn=fp.PreferenceLoss("dpo"),
            reference=reference,
            reference_cache=folder,
        )
        assert trainer.attachment.reference is None
        evaluated = trainer.evaluate()
        losses.append((evaluated["eval_all_loss"], evaluated["eval_few_rewards/margins"]))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert losses[1] == losses[2]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_references_that_do_not_fit(tmp_path):
    model, loss_fn = tiny_llama(), fp.PreferenceLoss("dpo")
    with pytest.raises(ValueError, match="got 'adapter' with a LlamaForCausalLM, needs a Peft"):
        attach(model, loss_fn, reference="adapter")
    with pytest.raises(ValueError, match="got 'adaptor', needs 'adapter', 'precomputed' or"):
        attach(model, loss_fn, reference="adaptor")
    with pytest.raises(ValueError, match="the model that trains, needs a reference_cache"):
        attach(model, loss_fn, reference=model)
    with pytest.raises(ValueError, match="reference_cache: got a model, needs the trainer"):
        attach(model, loss_fn, reference=model, reference_cache=tmp_path)
    with pytest.raises(ValueError, match="ld_alpha: got 0.5 with tdpo1, needs None"):
        attach(model, fp.PreferenceLoss("tdpo1", ld_alpha=0.5), reference=tiny_llama(7))
    with pytest.raises(ValueError, match="more of the reference than the log-probs of whole"):
        PreferenceTrainer(
            model,
            arguments(tmp_path),
            train_dataset=pair_features(4),
            data_collator=PairCollator(0),
            loss_fn=fp.PreferenceLoss("dpo", ld_alpha=0.5),
            reference=tiny_llama(7),
            reference_cache=tmp_path,
        )


def plain_trainer(folder, **options):
    """transformers' own class, with a loss attached by one more line."""
    data = pairs_with_reference(8)
    trainer = Trainer(
        tiny_llama(),
        arguments(
            folder, per_device_train_batch_size=4, optim="adamw_torch", max_steps=4, **options
        ),
        train_dataset=data,
        eval_dataset={"all": data, "few": data[:4]},
        data_collator=PairCollator(0),
    )
    kwargs = {"sample_size": 8, "queue_size": 12}
    attach(trainer, fp.PreferenceLoss("gamma-dpo", **kwargs), log_tokens=True)
    return trainer


def test_a_loss_attached_to_a_plain_trainer_is_logged_evaluated_and_resumed(tmp_path):
    whole = plain_trainer(tmp_path / "run", save_strategy="steps", save_steps=2)
    assert isinstance(whole, Trainer) and type(whole).__name__ == "PreferenceTrainer"
    whole.train()
    rows = [row for row in whole.state.log_history if "loss" in row]
    assert len(rows) == 4 and all("rewards/margins" in row for row in rows)
    predicted = whole.predict(whole.eval_dataset["all"])
    assert "test_rewards/margins" in predicted.metrics
    found = whole.evaluate()
    few = [row for row in whole.state.log_history if "eval_few_loss" in row][-1]
    assert found["eval_few_logps/chosen"] == few["eval_few_logps/chosen"]
    # What `predict` saw has no part in it.
    truth = preference_outputs(
        whole.model, whole.attachment.loss_fn, PairCollator(0)(whole.eval_dataset["few"])
    )
    assert few["eval_few_logps/chosen"] == pytest.approx(truth.metrics["logps/chosen"].item())
    assert not any(name.startswith("rewards/") for name in few)
    resumed = plain_trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    names = ("loss", "margin/mean", "entropy")
    for name in names:
        curves = [
            [row[name] for row in run.state.log_history if "loss" in row]
            for run in (whole, resumed)
        ]
        assert curves[0][2:] == curves[1][2:] and len(curves[0]) == 4, name


def test_the_best_checkpoint_can_be_chosen_by_a_metric(tmp_path):
    data = pairs_with_reference(8)
    trainer = PreferenceTrainer(
        tiny_llama(),
        arguments(
            tmp_path,
            max_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="best",
            metric_for_best_model="eval_rewards/margins",
            greater_is_better=True,
        ),
        train_dataset=data,
        eval_dataset=data,
        data_collator=PairCollator(0),
        loss_fn=fp.PreferenceLoss("dpo"),
    )
    trainer.train()
    margins = [
        row["eval_rewards/margins"]
        for row in trainer.state.log_history
        if "eval_rewards/margins" in row
    ]
    assert trainer.state.best_metric == max(margins) and len(margins) == 2


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("kind", ["pairs", "points"])
def test_metrics_of_tokens_are_those_of_the_logits(kind, padding_free):
    model = tiny_llama()
    if kind == "pairs":
        features, loss_fn = pair_features(4), fp.PreferenceLoss("simpo")
        collator, columns = PairCollator(0, padding_free=padding_free), ("chosen", "rejected")
        rows = [(row["prompt_ids"], row[f"{side}_ids"]) for side in columns for row in features]
        desirable = [True] * 4 + [False] * 4
    else:
        desirable = [True, False, False, True, False]
        features = [
            {**row, "desirable": wanted, "reference": -3.0}
            for row, wanted in zip(point_features(5), desirable, strict=True)
        ]
        collator, loss_fn = PointCollator(0, padding_free=padding_free), fp.PreferenceLoss("kto")
        rows = [(row["prompt_ids"], row["completion_ids"]) for row in features]
    attachment = attach(model, loss_fn, log_tokens=True)
    model(**collator(features))
    found = attachment.pop_metrics("train")
    entropies, means, hits = [], {True: [], False: []}, []
    with torch.no_grad():
        for (prompt, completion), wanted in zip(rows, desirable, strict=True):
            ids = torch.tensor([prompt + completion])
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
            entropies += torch.distributions.Categorical(logits=logits).entropy().tolist()
            means[wanted] += logits.mean(-1).tolist()
            if wanted:
                hits += (logits.argmax(-1) == torch.tensor(completion)).tolist()
    truth = {
        "entropy": entropies,
        "logits/chosen": means[True],
        "logits/rejected": means[False],
    }
    if kind == "pairs":
        truth["mean_token_accuracy"] = hits
    for name, values in truth.items():
        assert found[name] == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-6), name
    assert ("mean_token_accuracy" in found) == (kind == "pairs")


def test_wrong_training_arguments_are_refused(tmp_path):
    for wrong in ({"remove_unused_columns": True}, {"label_names": ["labels"]}):
        with pytest.raises(ValueError, match="args: wanted remove_unused_columns=False and"):
            attach(Trainer(tiny_llama(), arguments(tmp_path, **wrong)), fp.PreferenceLoss("dpo"))
    with pytest.raises(ValueError, match="got False and .'labels'.$"):
        PreferenceTrainer(
            tiny_llama(),
            arguments(tmp_path, label_names=["labels"]),
            loss_fn=fp.PreferenceLoss("dpo"),
        )
