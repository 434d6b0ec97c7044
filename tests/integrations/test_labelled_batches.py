"""A trainer on −100-masked labels with an attached loss, beside the same loss of whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import VOCAB, tiny_llama
from torch.nn.functional import cross_entropy, logsigmoid
from trainers import SETTINGS
from transformers import Trainer, TrainingArguments

import fused_prefopt as fp
from fused_prefopt.integrations.labelled_batches import (
    CompletionMasks,
    FusesLabelled,
    FusesLabelledPoints,
)
from fused_prefopt.integrations.options import FusedOptions

LENGTH, ROWS = 9, 4
JUDGED = torch.tensor([True, False, False, True])


def batch(seed: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """Rows of three prompt tokens, with padding behind some."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (ROWS, LENGTH), generator=draw)
    attended = torch.ones_like(ids)
    for row, padded in enumerate((0, 2, 1, 3)):
        attended[row, LENGTH - padded :] = 0
    labels = ids.masked_fill(attended == 0, -100)
    labels[:, :3] = -100
    found = {"input_ids": ids, "attention_mask": attended, "labels": labels}
    return {prefix + name: value for name, value in found.items()}


class Of:
    """Mixin: the reference that frameworks' trainers have, and the loss."""

    collator_options: dict[str, Any] = {}

    def __init__(self, folder: Any, found: dict[str, Any], loss: fp.PreferenceLoss, **more: Any):
        given = {"output_dir": str(folder), "remove_unused_columns": False}
        super().__init__(tiny_llama(), TrainingArguments(**SETTINGS | given))
        self.ref_model = more.get("ref_model", tiny_llama(1))
        collator = CompletionMasks(lambda _: dict(found), **self.collator_options)
        options = FusedOptions(on_nonfinite=more.get("on_nonfinite", "stop"))
        self.fuse(loss, options, collator=collator, router_coefficient=None)


class Pairs(Of, FusesLabelled, Trainer):
    pass


class Points(Of, FusesLabelledPoints, Trainer):
    judgements = "tags"
    collator_options = {"others": ("tags",), "mismatched": "kl_"}


def logps(model: Any, found: dict[str, torch.Tensor], prefix: str = "") -> torch.Tensor:
    """(S,) sums of float64 log-softmax of whole logits."""
    ids, mask = found[f"{prefix}input_ids"], found[f"{prefix}attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask).logits.double()[:, :-1]
    wanted = found[f"{prefix}labels"][:, 1:]
    return -cross_entropy(logits.mT, wanted, reduction="none", ignore_index=-100).sum(1)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.grad for name, value in model.named_parameters()}


@pytest.mark.parametrize("tails", [1.0, 0.4], ids=["whole", "ld_alpha"])
def test_pairs_have_the_loss_and_gradients_of_whole_logits(tails, tmp_path):
    found = batch(0)
    loss_fn = fp.PreferenceLoss("dpo", beta=0.5, ld_alpha=None if tails == 1 else tails)
    trainer = Pairs(tmp_path, found, loss_fn)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([]))
    loss.backward()
    model = tiny_llama()
    policy = logps(model, found)
    if tails != 1:
        # Row 0 has 6 labels and its partner 5, row 1 has 4 and its partner 3; those of the policy
        # alone are weighted.
        last = dict(found, labels=found["labels"].clone())
        for row, shared in enumerate((5, 3, 5, 3)):
            last["labels"][row, : 3 + shared] = -100
        policy = policy - (1 - tails) * logps(model, last)
    ratio = policy - logps(tiny_llama(1), found).detach()
    wanted = -logsigmoid(0.5 * (ratio[:2] - ratio[2:])).mean()
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradients(trainer.model), gradients(model), atol=1e-6, rtol=1e-4)
    assert trainer.attachment.pop_metrics("train")["rewards/chosen"] == pytest.approx(
        float(0.5 * ratio[:2].mean().detach()), abs=1e-5
    )


def test_points_have_ktos_loss_with_the_divergence_of_the_mismatched(tmp_path):
    found = {**batch(0), **batch(2, "kl_"), "tags": JUDGED}
    model, other = tiny_llama(), tiny_llama(1)
    log_ratio = logps(model, found) - logps(other, found).detach()
    kl = (logps(model, found, "kl_") - logps(other, found, "kl_")).mean().detach().clamp(min=0)
    assert kl > 0  # Of other batches it is cut at 0.
    signed = torch.where(JUDGED, 1.0, -1.0) * 0.5 * (log_ratio - kl)
    wanted = (torch.where(JUDGED, 1.5, 1.0) * (1 - signed.sigmoid())).mean()
    wanted.backward()
    loss_fn = fp.PreferenceLoss("kto", beta=0.5, desirable_weight=1.5)
    trainer = Points(tmp_path, found, loss_fn)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([]))
    loss.backward()
    torch.testing.assert_close(loss.double(), wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradients(trainer.model), gradients(model), atol=1e-6, rtol=1e-4)
    assert trainer.attachment.pop_metrics("train")["kl"] == pytest.approx(float(kl), abs=1e-5)


def test_a_loss_of_rewards_gets_them_of_the_judgements(tmp_path):
    found = {**batch(0), **batch(1, "kl_"), "tags": JUDGED}
    trainer = Points(tmp_path, found, fp.PreferenceLoss("dro"))
    inputs = trainer.of_loss(trainer.model, trainer.data_collator([]))
    assert inputs["rewards"].tolist() == [1, -1, -1, 1]
    assert "kl" not in inputs and inputs["prompt_reference"].shape == (ROWS,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": batch(0)["input_ids"] + 1}, r"^labels: got \d+ on token \d+ \(row 0, column 0"),
        ({"labels": batch(0)["labels"][:, 1:]}, r"^labels: got shape \(4, 8\), wanted that of the"),
        ({"cross_attention_mask": JUDGED}, "^data_collator: got a batch with 'cross_attention_ma"),
        ({"input_ids": batch(0)["input_ids"] + VOCAB, "labels": None}, "^input_ids: got token id"),
    ],
)
def test_batches_that_the_model_would_not_see_whole_are_refused(changes, message, tmp_path):
    found = {**batch(0), **changes}
    if found["labels"] is None:
        found["labels"] = found["input_ids"]
    trainer = Pairs(tmp_path, found, fp.PreferenceLoss("dpo"))
    with pytest.raises(ValueError, match=message):
        trainer.data_collator([])


def test_a_missing_reference_or_field_is_named(tmp_path):
    trainer = Pairs(tmp_path, batch(0), fp.PreferenceLoss("dpo"), ref_model=None)
    with pytest.raises(ValueError, match="^ref_model: got none with a LlamaForCausalLM, needs a m"):
        trainer.compute_loss(trainer.model, trainer.data_collator([]))
    with pytest.raises(ValueError, match="odpo needs `rewards`"):
        Pairs(tmp_path, batch(0), fp.PreferenceLoss("odpo"))


def test_an_optimizer_inside_the_backward_pass_cannot_skip_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(Pairs, "steps_in_backward", "galore_layerwise")
    with pytest.raises(ValueError, match="^on_nonfinite: got 'skip' with galore_layerwise, whose"):
        Pairs(tmp_path, batch(0), fp.PreferenceLoss("simpo"), on_nonfinite="skip")
