"""TRL's default settings, bf16 and gradient checkpointing, in the three trainers."""

from __future__ import annotations

import pytest
import torch
from data_tokenizer import tiny_tokenizer
from test_integrations_transformers import arguments, pairs_with_reference
from tiny_models import pair_features, tiny_llama

import fused_prefopt as fp
from fused_prefopt.data import PairCollator
from fused_prefopt.integrations.transformers import PreferenceTrainer

pytest.importorskip("trl")
peft = pytest.importorskip("peft")
import test_integrations_points as points  # noqa: E402
import test_integrations_trl as pairs  # noqa: E402

from fused_prefopt.integrations.trl import (  # noqa: E402
    FusedDPOConfig,
    FusedDPOTrainer,
    FusedKTOConfig,
    FusedKTOTrainer,
)

STEPS = 4
ADAPTER = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def of_transformers(folder, adapted, **changes):
    model = tiny_llama()
    if adapted:
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(**ADAPTER))
    data = pair_features(16) if adapted else pairs_with_reference(16)
    return PreferenceTrainer(
        model,
        arguments(folder, max_steps=STEPS, optim="adamw_torch", learning_rate=1e-2, **changes),
        train_dataset=data,
        data_collator=PairCollator(0),
        loss_fn=fp.PreferenceLoss("dpo"),
        reference="adapter" if adapted else "precomputed",
    )


def of_trl(kind, config, data):
    def build(folder, adapted, **changes):
        given = pairs.options(folder, max_steps=STEPS, learning_rate=1e-2, **changes)
        more = {"peft_config": peft.LoraConfig(**ADAPTER)} if adapted else {}
        if not adapted:
            more["ref_model"] = tiny_llama(5)
        return kind(
            tiny_llama(),
            args=config(**given),
            train_dataset=data(),
            processing_class=tiny_tokenizer(),
            **more,
        )

    return build


TRAINERS = {
    "transformers": of_transformers,
    "dpo": of_trl(FusedDPOTrainer, FusedDPOConfig, pairs.dataset),
    "kto": of_trl(FusedKTOTrainer, FusedKTOConfig, points.rows),
}


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", TRAINERS)
def test_bf16_with_gradient_checkpointing(tmp_path, kind, adapted):
    settings = {
        "fp32": {},
        "bf16": {"bf16": True},
        "both": {"bf16": True, "gradient_checkpointing": True},
    }
    curves, trained = {}, {}
    for name, changes in settings.items():
        run = TRAINERS[kind](tmp_path, adapted, **changes)
        assert run.accelerator.mixed_precision == ("no" if name == "fp32" else "bf16")
        run.train()
        assert not torch.is_autocast_enabled("cpu")
        assert run.model.is_gradient_checkpointing == (name == "both")
        curves[name] = [
            (row["loss"], row["logps/mean" if kind == "kto" else "logps/chosen"])
            for row in run.state.log_history
            if "loss" in row
        ]
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
