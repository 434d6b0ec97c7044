"""Published settings: the numbers of their sources, for losses that are registered."""

from __future__ import annotations

import pytest
from loss_cases import compute, random_batch

from fused_prefopt.losses import available_losses, find, preset, published_settings


def test_published_settings_are_those_of_the_papers():
    assert preset("gamma-simpo/llama-3-8b-instruct") == (
        "gamma-simpo",
        {"beta": 10.0, "gamma": 4.0, "tau": 10.0},
    )
    assert preset("Alpha_DPO/Mistral-7B-Instruct")[1] == pytest.approx(
        {"beta": 2.5, "gamma": 0.375, "alpha": 0.05}
    )
    settings = published_settings()
    assert preset("omni-dpo/qwen2.5-7b")[1] == {"beta": 3.5, "tau_ref": 0.8}
    # The other numbers of its configurations are the loss's defaults.
    others = {"eta": 0.7, "focus": 3.0, "nll_weight": 0.001, "tau_good": 3.2}
    assert others.items() <= find("omni-dpo").defaults.items()
    assert preset("epsilon-dpo/llama-3-8b-instruct")[1] == {"beta": 0.01, "epsilon": 0.01}
    assert len(settings) == 22
    assert preset("repo/llama-3-8b-instruct-v0.2") == ("repo", {"gamma": 0.6})
    assert settings["repo/mistral-7b-instruct"].learning_rate == 6e-7
    assert preset("simper/mistral-7b-base") == ("simper", {})
    assert settings["simper/mistral-7b-base"].learning_rate == 3e-7
    assert settings["gamma-simpo/qwen2.5-7b-instruct"].hyperparameters["tau"] == 3.0
    assert settings["alpha-dpo/gemma-2-9b-it"].learning_rate == 8e-7
    for name, setting in settings.items():
        assert name.split("/")[0] == setting.loss in available_losses()
        loss = find(setting.loss).build(**setting.hyperparameters)
        assert compute(loss, random_batch()).loss.isfinite()
    preset("alpha-dpo/gemma-2-9b-it")[1]["beta"] = 0.0
    assert preset("alpha-dpo/gemma-2-9b-it")[1]["beta"] == 10.0
