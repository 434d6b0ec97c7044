"""Images in TRL's trainers: loss, gradients and logs beside TRL's own, references, cut rows."""

from __future__ import annotations

import logging

import pytest
import torch
from data_tokenizer import CHAT_TEMPLATE, chat
from model_families import assert_gradients, gradients, own_loss, own_sums
from tiny_images import (
    FAMILIES,
    PLACES,
    image,
    image_pairs,
    image_points,
    image_trainer,
    processor,
    vision_model,
)
from torch.nn.functional import logsigmoid
from trainers import assert_same_logs, build, dataset, first_batch, history, in_order

from fused_prefopt import PreferenceLoss

pytest.importorskip("trl")
peft = pytest.importorskip("peft")

LORA = {"r": 2, "target_modules": "all-linear", "exclude_modules": "lm_head"}


def double(name, seed=0):
    return vision_model(name, seed).double()


def reference_of(kind, name):
    """What a trainer is given for its reference."""
    if kind == "adapter":
        return {"peft_config": peft.LoraConfig(init_lora_weights=False, **LORA)}
    return {"ref_model": double(name, 5)}


def beside(tmp_path, name, kind="dpo", make=dict, **options):
    """TRL's own trainer and ours; `make` gives each what is its own, `options` are of ours."""
    runs = []
    for each in (f"trl-{kind}", kind):
        torch.manual_seed(1)
        own = options if each == kind else {}
        runs.append(image_trainer(each, tmp_path, name, **{"model": double(name)} | make() | own))
    return runs


@pytest.mark.parametrize("reference", ["model", "adapter", "precomputed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_trls(tmp_path, name, reference):
    """Of every parameter that trains, those of the vision tower and its projector among them."""
    ahead = {"precompute_ref_log_probs": True} if reference == "precomputed" else {}
    found = []
    for run in beside(tmp_path, name, make=lambda: reference_of(reference, name), **ahead):
        run.model.train()
        loss = run.compute_loss(run.model, first_batch(in_order(run)))
        found.append((loss.detach().double(), gradients(run.model, loss)))
    (truth, wanted), (loss, got) = found
    # TRL's log-probs are fp32.
    torch.testing.assert_close(loss, truth, rtol=1e-6, atol=1e-7)
    assert any("vis" in each for each in got) and any("language_model" in each for each in got)
    assert_gradients(got, wanted, 1e-5)


@pytest.mark.parametrize("name", ["qwen2-vl", "gemma3"])
def test_a_loss_without_a_reference_keeps_no_model(tmp_path, name):
    run = in_order(image_trainer("dpo", tmp_path, name, model=double(name), loss="simpo"))
    assert run.ref_model is None and not run.precompute_ref_logps
    batch, untrained = first_batch(run), double(name)
    truth = own_loss(untrained, {each: batch[each] for each in batch})
    wanted = gradients(untrained, truth)
    loss = run.compute_loss(run.model, batch)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-9)
    assert_gradients(gradients(run.model, loss), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True])
def test_the_curves_are_trls(tmp_path, ahead):
    def make():
        return {
            "ref_model": double("qwen2.5-vl", 5),
            "eval_dataset": image_pairs("qwen2.5-vl", 3),
            "max_steps": 4,
        }

    own = {"log_tokens": True, "precompute_ref_log_probs": ahead}
    runs = beside(tmp_path, "qwen2.5-vl", make=make, **own)
    for run in runs:
        run.train()
        run.evaluate()
    names = assert_same_logs(*runs, tolerance=1e-5)
    assert {"entropy", "logits/chosen", "eval_loss", "eval_mean_token_accuracy"} < names


def test_transformers_own_trainer_with_a_collator_of_images(tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    name, rows = "gemma3", list(image_pairs("gemma3", 4))
    collator = DataCollatorForVisionPreference(processor(name))
    loss_fn, reference = PreferenceLoss("dpo"), double(name, 5)
    batch = collator([dict(row) for row in rows])
    truth = own_loss(double(name), batch, loss_fn, reference=own_sums(reference, batch).detach())
    given = {"data_collator": collator}
    run = build(
        "attached", tmp_path, rows, model=double(name), reference=reference, given=given, loss="dpo"
    )
    assert in_order(run).train().training_loss == pytest.approx(truth.item(), rel=1e-6)


def conversations(**columns):
    """Pairs of messages about one image each, the same rows, in the columns that some have."""
    rows = [
        {
            "image": image(index),
            "prompt": chat(user="the cat"),
            "chosen": chat(assistant="sat on mat"),
            "rejected": chat(assistant="on the"),
        }
        | {name: values[index] for name, values in columns.items()}
        for index in range(4)
    ]
    return dataset(rows)


def test_messages_and_scores(tmp_path):
    """The collator of TRL's makes texts of messages; a score reaches the loss."""
    maker = processor("llava")
    part = "{% for part in message['content'] %}"
    part += "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}"
    maker.chat_template = CHAT_TEMPLATE.replace("{{ message['content'] }}", part)
    given = {"processing_class": maker, "ref_model": double("llava", 5), "loss": "odpo"}
    scores = {"score_chosen": [3.0, 2.0, 4.0, 9.0], "score_rejected": [1.0, 1.5, 0.5, 0.5]}
    data = conversations(**scores)
    run = image_trainer("dpo", tmp_path, "llava", data, model=double("llava"), **given)
    batch = first_batch(in_order(run))
    assert batch["rewards"].tolist() == [value for each in scores.values() for value in each]
    policy, reference = (own_sums(double("llava", seed), batch) for seed in (0, 5))
    margin = 0.1 * torch.stack((policy - reference).chunk(2)).diff(dim=0)[0].neg()
    gap = torch.tensor(scores["score_chosen"]) - torch.tensor(scores["score_rejected"])
    truth = -logsigmoid(margin - gap.log()).mean().item()
    loss = run.compute_loss(run.model, batch).item()
    assert loss == pytest.approx(truth, rel=1e-6)
    with pytest.raises(ValueError, match="train_dataset: odpo needs `rewards`"):
        image_trainer("dpo", tmp_path, "llava", conversations(), **given)
    scores["score_chosen"][2] = float("nan")
    with pytest.raises(ValueError, match=r"score_chosen: got nan in row 2 .* of train_dataset"):
        image_trainer("dpo", tmp_path, "llava", conversations(**scores), **given)


def test_weights_of_tokens_are_refused_beside_images(tmp_path):
    rows = image_pairs("llava").add_column("chosen_token_weights", [None, None, [1.0], None] * 2)
    with pytest.raises(ValueError, match="chosen_token_weights: got some with texts in feature 2"):
        first_batch(in_order(image_trainer("dpo", tmp_path, "llava", rows, loss="simpo")))


def test_rows_without_an_image_among_others(tmp_path):
    name = "qwen2-vl"
    data = image_pairs(name, 4)
    texts = [{**row, "images": [], "prompt": "the cat"} for row in data]
    mixed = dataset([*data, *texts])
    run = in_order(image_trainer("dpo", tmp_path, name, mixed, model=double(name), loss="simpo"))
    batches = list(run.get_train_dataloader())
    assert ["pixel_values" in batch for batch in batches] == [True, False]
    for batch in batches:
        truth = own_loss(double(name), batch).item()
        assert run.compute_loss(run.model, batch).item() == pytest.approx(truth, rel=1e-9)


def test_rows_of_joint_batches_are_not_dealt_out(tmp_path):
    """Images have other rows than the sequences, which would get some that are not theirs."""
    options = {"loss": "simpo", "accelerator_config": {"dispatch_batches": True}}
    with pytest.raises(ValueError, match="got dispatch_batches=True, .*, with images, which"):
        image_trainer("dpo", tmp_path, "llava", **options)
    stream = image_pairs("llava").to_iterable_dataset()
    run = image_trainer("dpo", tmp_path, "llava", stream, loss="simpo", max_steps=1)
    assert run.accelerator.dispatch_batches is False
    assert torch.tensor(run.train().training_loss).isfinite()


def columns_of(run):
    data = run.train_dataset
    return [torch.tensor(data[f"ref_{side}_logps"][:]) for side in ("chosen", "rejected")]


def test_references_computed_ahead_are_kept_by_what_they_depend_on(tmp_path, monkeypatch):
    name, passes = "gemma3", []
    from datasets import Dataset

    from fused_prefopt.integrations.trl import FusedDPOTrainer

    # TRL's cache is beside the data set's files.
    image_pairs(name).save_to_disk(str(tmp_path / "data"))
    data = Dataset.load_from_disk(str(tmp_path / "data"))

    def run(**options):
        passes.clear()
        own = {"ref_model": double(name, 5), "precompute_ref_log_probs": True}
        return image_trainer("dpo", tmp_path, name, data, model=double(name), **own | options)

    compute = FusedDPOTrainer.compute_ref_log_probs

    def counted(*arguments):
        passes.append(1)
        return compute(*arguments)

    monkeypatch.setattr(FusedDPOTrainer, "compute_ref_log_probs", counted)
    first = run()
    batch = first.data_collator(list(first.train_dataset))
    truth = own_sums(double(name, 5), batch).chunk(2)
    assert len(passes) == 2
    torch.testing.assert_close(columns_of(first), [each.float() for each in truth])
    for column, side in zip(columns_of(first), ("chosen", "rejected"), strict=True):
        assert torch.equal(batch[f"ref_{side}_logps"], column)
    again = run()
    assert not passes
    assert all(map(torch.equal, columns_of(again), columns_of(first)))
    larger = processor(name)
    larger.image_processor.image_mean = [0.1, 0.2, 0.3]
    for changes in (
        {"max_length": 14},
        {"processing_class": larger},
        {"ref_model": double(name, 6)},
        {"ld_alpha": 0.5},
    ):
        other = run(**changes)
        assert len(passes) == 2, changes
        assert not torch.equal(columns_of(other)[0], columns_of(first)[0]), changes


def test_rows_that_come_after_training_have_no_reference_computed_ahead(tmp_path):
    """Not that of the model which has been trained since."""
    options = {"precompute_ref_log_probs": True, "max_steps": 1}
    name, held_out = "llava", image_pairs("llava", 3)
    run = image_trainer("dpo", tmp_path, name, eval_dataset=held_out, **options)
    assert run.ref_model is None
    assert run.evaluate(held_out)["eval_loss"] == pytest.approx(0.6931472, rel=1e-5)
    run.train()
    kept = run.evaluate()["eval_loss"]
    assert kept != pytest.approx(0.6931472, rel=1e-5)
    with pytest.raises(ValueError, match="precompute_ref_log_probs: got rows without"):
        run.evaluate(held_out)
    own = {"ref_model": vision_model(name), **options}
    with_model = image_trainer("dpo", tmp_path, name, **own)
    with_model.train()
    assert with_model.evaluate(held_out)["eval_loss"] == pytest.approx(kept, rel=1e-5)


@pytest.mark.parametrize("ahead", [0, 4, 1])
def test_rows_are_cut_as_trl_does_and_the_dead_are_dropped(tmp_path, caplog, ahead):
    """An image and its marks are six tokens, a word one; `ahead` is the batch of that pass."""
    name, place = "gemma3", PLACES["gemma3"]
    texts = [
        (f"{place} the", "cat cat cat", "cat cat sat"),  # equal when cut
        (f"{place} the", "sat cat cat", "cat"),
        (f"the the the the {place}", "cat", "sat"),  # half of the image is left
        (f"{place} mat", "on", "sat on the mat"),
    ]
    rows = [
        {"images": [image(index)], "prompt": prompt, "chosen": f" {chosen}"}
        | {"rejected": f" {rejected}", "weight": float(index % 2)}
        for index, (prompt, chosen, rejected) in enumerate(texts)
    ]

    def make():
        return {"ref_model": double(name, 5), "max_length": 9}

    own = make() | {"model": double(name), "precompute_ref_log_probs": ahead > 0}
    own |= {"precompute_ref_batch_size": ahead or None}
    run = in_order(image_trainer("dpo", tmp_path, name, dataset(rows), **own))
    with caplog.at_level(logging.WARNING):
        batch = first_batch(run)
    told = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    assert len(told) == 1 and "image data: dropped a row with two equal sides" in told[0]
    theirs, _ = beside(tmp_path, name, make=lambda: make() | {"data": dataset(rows[1::2])})
    same = first_batch(in_order(theirs))
    assert batch["input_ids"].shape == (4, 9) and batch["weights"].tolist() == [1.0] * 4
    for each in same:
        assert torch.equal(batch[each], same[each]), each
    truth = theirs.compute_loss(theirs.model, same).item()
    assert run.compute_loss(run.model, batch).item() == pytest.approx(truth, rel=1e-6)
    with pytest.raises(ValueError, match="max_length: got 9, which leaves none of a batch's 1"):
        run.data_collator([dataset(rows)[2]])


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_training_resumes_with_the_weights_of_a_checkpoint(tmp_path, name):
    """It holds them by other names than the model."""

    def run(**options):
        return image_trainer(
            "dpo", tmp_path, name, model=vision_model(name), loss="simpo", max_steps=3, **options
        )

    first, second = run(save_strategy="steps", save_steps=1), run()
    first.train()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert history(second, "loss")[1:] == pytest.approx(history(first, "loss")[1:], rel=1e-5)
    third = run()
    third.state.best_model_checkpoint = str(tmp_path / "checkpoint-3")
    third._load_best_model()
    for each, value in first.model.named_parameters():
        assert torch.equal(third.model.get_parameter(each), value), each


@pytest.mark.slow
def test_completions_about_images_are_trls(tmp_path):
    """KTO's, with the divergence of completions behind other prompts and images."""

    def make():
        return {"ref_model": double("qwen2-vl", 5), "max_steps": 3}

    runs = beside(tmp_path, "qwen2-vl", "kto", make, log_tokens=True)
    for run in runs:
        run.train()
    assert {"kl", "loss", "grad_norm", "rewards/chosen"} < assert_same_logs(*runs, tolerance=1e-5)
    assert any(history(runs[1], "kl"))


def test_completions_about_images_with_references_computed_ahead(tmp_path):
    ahead = {"precompute_ref_log_probs": True, "ref_model": double("gemma3", 5)}
    own = {"model": double("gemma3"), "loss": "apo-zero-unpaired"}
    runs = [
        image_trainer("kto", tmp_path, "gemma3", **own | options)
        for options in ({"ref_model": double("gemma3", 5)}, ahead)
    ]
    assert "ref_logps" in runs[1].train_dataset.column_names
    losses = [run.compute_loss(run.model, first_batch(in_order(run))).item() for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for loss, field in (("kto", "kl"), ("dro", "prompt_reference")):
        with pytest.raises(ValueError, match=f"got True with images .* wants `{field}`"):
            image_trainer("kto", tmp_path, "gemma3", loss=loss, **ahead)
    scored = image_points("gemma3", score=[0.5] * 8)
    with pytest.raises(ValueError, match="train_dataset: got .*, needs a column 'label'"):
        image_trainer("kto", tmp_path, "gemma3", scored, ref_model=double("gemma3"))
