"""What the trainers on top of TRL's make, and refuse, before they train."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from data_tokenizer import tiny_tokenizer
from tiny_models import tiny_llama

pytest.importorskip("trl")
from test_integrations_points import rows  # noqa: E402
from test_integrations_trl import dataset, options, trainer  # noqa: E402

from fused_prefopt.integrations.trl import (  # noqa: E402
    FusedDPOConfig,
    FusedDPOTrainer,
    FusedKTOConfig,
    FusedKTOTrainer,
)

KINDS = {
    "DPO": (FusedDPOTrainer, FusedDPOConfig, dataset),
    "KTO": (FusedKTOTrainer, FusedKTOConfig, rows),
}


@pytest.mark.parametrize("kind", KINDS)
def test_functions_of_logits_are_refused_by_name_and_by_place(tmp_path, kind):
    make, config, data = KINDS[kind]
    wanted = "^compute_metrics: got a function of logits, needs None: .*; log_tokens=True logs"
    args = config(**options(tmp_path))
    with pytest.raises(ValueError, match=wanted):
        trainer(make, args, data(), compute_metrics=print)
    with pytest.raises(ValueError, match=wanted):
        make(tiny_llama(), None, args, None, data(), None, tiny_tokenizer(), print)
    with pytest.raises(TypeError, match="preprocess_logits_for_metrics"):
        trainer(make, args, data(), preprocess_logits_for_metrics=print)


@pytest.mark.parametrize("given", ["an object", "a name", "a name by place"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_default_configuration_is_named_after_the_model(tmp_path, monkeypatch, kind, given):
    make, config, data = KINDS[kind]

    @dataclass
    class OnCpu(config):
        """TRL's own default asks for a GPU."""

        use_cpu: bool = True
        bf16: bool = False

    monkeypatch.setattr(make, "config_type", OnCpu)
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    model.save_pretrained("some/tiny")
    if given == "an object":
        model.config._name_or_path = "some/tiny"
    model = model if given == "an object" else "some/tiny"
    more = {"train_dataset": data(), "processing_class": tiny_tokenizer()}
    places = (model, None, None) if given == "a name by place" else (model,)
    run = make(*places, **more)
    assert run.args.output_dir == f"tiny-{kind}"
    assert run.args == OnCpu(f"tiny-{kind}", logging_nan_inf_filter=False)
    assert run.attachment.loss_fn.name == kind.lower()
    assert run.train_dataset.num_rows == 16
