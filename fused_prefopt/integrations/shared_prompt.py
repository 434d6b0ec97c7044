"""Pairs whose prompt goes through the backbone once, by an attention mask over the whole row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fused_prefopt.data.shared_prompt import shared_attention
from fused_prefopt.integrations.causal_lm import backbone_outputs, text_config

# Attention that adds a mask of any pattern to its scores.
_IMPLEMENTATIONS = ("eager", "sdpa")


def shared_hidden(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Last hidden states of a batch from ``PairCollator(shared_prompt=True)``.

    Args:
        model: causal language model whose attention is `eager` or `sdpa`.
        batch: of B pairs.

    Returns:
        (N, D), one row for each predicted token, in the order of ``batch["targets"]``.

    Raises:
        ValueError: the model's attention takes no such mask, or its layers see less than a row.
    """
    require_mask_attention(model, batch["position_ids"].shape[1])
    dtype = next(model.parameters()).dtype
    inputs = {**batch, "attention_mask": shared_attention(batch["segments"], dtype)}
    output = backbone_outputs(model, inputs)
    return output.last_hidden_state.flatten(0, 1)[batch["predictors"]]


def require_mask_attention(model: nn.Module, length: int) -> None:
    """Raise ValueError unless a mask alone decides what a token of a row this long sees."""
    config = text_config(model)
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"shared_prompt: got a model with attn_implementation={implementation!r}, wanted one of"
            f" {', '.join(map(repr, _IMPLEMENTATIONS))}"
        )
    layers = set(getattr(config, "layer_types", None) or ())
    if layers - {"full_attention", "sliding_attention"}:
        others = ", ".join(sorted(layers - {"full_attention", "sliding_attention"}))
        raise ValueError(f"shared_prompt: got a model with {others} layers, wanted attention only")
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in layers or (not layers and window is not None)
    if slides and window is not None and length > window:
        raise ValueError(
            f"shared_prompt: got rows of {length} tokens, wanted at most the model's sliding window"
            f" of {window}"
        )
