"""bf16 and gradient checkpointing, and wrappers that round what they see, in every trainer."""

from __future__ import annotations

import pytest
import torch
from tiny_models import pair_features, point_features, tiny_llama
from torch import nn
from torch.distributed.utils import _apply_to_tensors
from trainers import OF_TRL, build, first_batch, lora
from transformers import Trainer

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.integrations.transformers import attach, past_wrappers

peft = pytest.importorskip("peft")
HALF = torch.bfloat16
STEPS = 3


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", ["transformers", *OF_TRL])
def test_bf16_with_gradient_checkpointing(tmp_path, kind, adapted):
    settings = {
        "fp32": {},
        "bf16": {"bf16": True},
        "both": {"bf16": True, "gradient_checkpointing": True},
    }
    curves, trained = {}, {}
    for name, changes in settings.items():
        more = {}
        if adapted:
            more = {"model": lora(lora_dropout=0.0)}
            if kind == "transformers":
                more["reference"] = "adapter"
        run = build(kind, tmp_path, max_steps=STEPS, learning_rate=1e-2, **more, **changes)
        assert run.accelerator.mixed_precision == ("no" if name == "fp32" else "bf16")
        run.train()
        assert not torch.is_autocast_enabled("cpu")
        assert run.model.is_gradient_checkpointing == (name == "both")
        logps = "logps/mean" if kind == "kto" else "logps/chosen"
        rows = [row for row in run.state.log_history if "loss" in row]
        curves[name] = [(row["loss"], row[logps]) for row in rows]
        values = run.model.named_parameters()
        trained[name] = {key: value for key, value in values if value.requires_grad}
    assert len(curves["both"]) == STEPS and len(set(curves["both"])) == STEPS
    # What is computed twice is the same twice.
    assert curves["both"] == curves["bf16"]
    for key, value in trained["both"].items():
        assert torch.equal(value, trained["bf16"][key]), key
    assert curves["bf16"] != curves["fp32"]
    assert all("lora" in key for key in trained["both"]) == adapted
    for both, single in zip(curves["both"], curves["fp32"], strict=True):
        assert both == pytest.approx(single, rel=0.03, abs=0.03)


# Log-probs and scores past wrappers that round what they see, as FSDP and DeepSpeed do


def rounded(values):
    def to_half(value):
        return value.to(HALF) if value.is_floating_point() else value

    return _apply_to_tensors(to_half, values)


class Rounding(nn.Module):
    """Casts the arguments and results of a call, as FSDP2's root unit does."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **arguments):
        return rounded(self.module(**rounded(arguments)))


def far(kind):
    """Rows whose log-probs under the reference are far from what bf16 holds, and a collator."""
    if kind == "points":
        rows = [
            {**row, "reference": -350.3 - i / 7, "prompt_reference": -10.1 - i / 7}
            for i, row in enumerate(point_features(4))
        ]
        return rows, PointCollator(0)
    rows = [
        {**row, "ref_chosen_logps": -350.3 - i / 7, "ref_rejected_logps": -351.9 + i / 9}
        for i, row in enumerate(pair_features(4))
    ]
    return rows, PairCollator(0)


@pytest.mark.parametrize(("kind", "loss"), [("pairs", "dpo"), ("points", "dro")])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_trainers_loss_is_that_of_the_bare_model(tmp_path, kind, loss, autocast):
    features, collator = far(kind)
    run = build("transformers", tmp_path, features, loss=loss, bf16=autocast)
    inputs, wrapped = collator(features), Rounding(run.model)
    with run.accelerator.autocast():
        wanted = run.model(**inputs)["loss"]
        found = run.compute_loss(wrapped, inputs)
        again, outputs = run.compute_loss(wrapped, inputs, return_outputs=True)
    assert found.dtype == torch.float32 and outputs["loss"].dtype == HALF
    assert torch.equal(found, wanted) and torch.equal(again, wanted)
    # Otherwise the test could not fail.
    assert wanted.to(HALF) != wanted
    values = list(run.model.parameters())
    grads = [torch.autograd.grad(each, values, allow_unused=True) for each in (found, wanted)]
    for got, gradient in zip(*grads, strict=True):
        torch.testing.assert_close(got, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_TRL)
def test_trls_trainers_are_exact(tmp_path, kind):
    run = build(kind, tmp_path)
    batch = first_batch(run)
    wanted = run.compute_loss(run.model, dict(batch))
    run.ref_model = Rounding(run.ref_model)
    found = run.compute_loss(Rounding(run.model), dict(batch))
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    assert wanted.to(HALF) != wanted


def test_deepspeeds_cast_of_a_batch_leaves_its_fields(tmp_path, monkeypatch):
    features, collator = far("pairs")
    run = build("transformers", tmp_path, features)
    inputs = collator(features) | {"pixel_values": torch.rand(2)}
    monkeypatch.setattr(Trainer, "_prepare_input", lambda self, data: rounded(data))
    prepared = run._prepare_inputs(inputs)
    for name in ("ref_chosen_logps", "ref_rejected_logps", "rewards", "input_ids"):
        assert torch.equal(prepared[name], inputs[name]), name
        assert prepared[name].dtype == inputs[name].dtype, name
    assert prepared["pixel_values"].dtype == HALF


def test_rounded_log_probs_are_refused():
    model, (features, collator) = tiny_llama(), far("pairs")
    attach(model, fp.PreferenceLoss("dpo"))
    batch = collator(features)
    with pytest.raises(ValueError, match=r"reference: got torch.bfloat16, needs float32; if the m"):
        Rounding(model)(**batch)
    assert Rounding(model)(**past_wrappers(batch))["loss"].isfinite()


def test_a_reference_with_a_wrapper_of_its_own_is_exact():
    model, batch, losses = tiny_llama(), PairCollator(0)(pair_features(4)), []
    for reference in (tiny_llama(7), Rounding(tiny_llama(7))):
        attachment = attach(model, fp.PreferenceLoss("dpo"), reference=reference)
        losses.append(model(**batch)["loss"])
        attachment.detach()
    assert torch.equal(*losses)
