"""Models with an adapter that learns a prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_families import family
from tiny_models import tiny_llama
from torch import nn

peft = pytest.importorskip("peft")
VIRTUAL = 3
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "prompt": (peft.PromptTuningConfig, {}),
    "encoder": (peft.PromptEncoderConfig, {"encoder_hidden_size": 16}),
    "prefix": (peft.PrefixTuningConfig, {}),
    "projected prefix": (
        peft.PrefixTuningConfig,
        {"prefix_projection": True, "encoder_hidden_size": 16},
    ),
}


def adapter(kind: str) -> Any:
    """A configuration of PEFT's."""
    config, own = KINDS[kind]
    return config(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, **own)


def base_model(name: str = "llama") -> nn.Module:
    """A float64 model with weights that make a prompt matter."""
    model = family(name)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 2:
                value.add_(torch.randn(value.shape, generator=generator).to(value) * 0.15)
    return model


def prompted(name: str = "llama", kind: str = "prompt") -> Any:
    """A float64 model in eval mode behind an adapter of random values."""
    torch.manual_seed(3)
    return peft.get_peft_model(base_model(name), adapter(kind)).double().eval()


def vivid_llama() -> nn.Module:
    """A tiny Llama in fp32 whose weights are large enough for a prompt to matter."""
    model = tiny_llama()
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 2:
                value.mul_(10)
    return model
