"""A Hugging Face causal language model, taken apart: its backbone and its head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fused_prefopt.types import LMHead, LossOutput, LowRank

# Config attribute → what it does to the logits. Models name the same thing differently.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_VOCABS = ("unpadded_vocab_size", "vocab_size")
# Model types that multiply by what others divide by.
_MULTIPLYING = ("hyperclovax",)
# Model types with a layer between the backbone's last hidden state and the output embedding.
_LAYERS_BEFORE_HEAD = ("modernbert-decoder", "blt")


def unwrapped(model: nn.Module) -> nn.Module:
    """The causal language model inside PEFT, DDP or other wrappers."""
    while True:
        base = getattr(model, "get_base_model", None)
        inner = base() if callable(base) else getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def backbone_of(model: nn.Module) -> nn.Module:
    """The part of a causal language model that ends in the last hidden state.

    Raises:
        ValueError: the model has no such part.
    """
    model = unwrapped(model)
    prefix = getattr(model, "base_model_prefix", "")
    backbone = getattr(model, prefix, None) if prefix else None
    if not isinstance(backbone, nn.Module) or backbone is model:
        raise ValueError(f"model: {type(model).__name__} has no backbone apart from its head")
    return backbone


def last_hidden(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The backbone's last hidden states of a collated batch: padded (S, L, D) or packed (1, N, D).

    Args:
        model: causal language model.
        batch: `input_ids` and, where they are given, `attention_mask` and `position_ids`.

    Raises:
        ValueError: the model has no backbone apart from its head.
    """
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: batch[name] for name in names if batch.get(name) is not None}
    return backbone_of(model)(**inputs, use_cache=False).last_hidden_state


def through_head(
    model: nn.Module, hidden: Tensor, run: Callable[[Tensor, LMHead], LossOutput]
) -> LossOutput:
    """``run(hidden, head)`` from inside the forward of the model's own output embedding.

    Engines that shard the head (FSDP2 with the head as a unit of its own, ZeRO-3) gather its
    weight, and average its gradient, in hooks around that forward.

    Args:
        model: causal language model.
        hidden: last hidden states.
        run: takes the hidden states and the head; its `loss` is what the hooks see.

    Raises:
        ValueError: `lm_head_of` does.
    """
    module = _output_embedding(model)
    results: list[LossOutput] = []

    def forward(hidden: Tensor) -> Tensor:
        results.append(run(hidden, lm_head_of(model)))
        return results[0].loss

    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        loss = module(hidden)
    finally:
        del module.forward
        if own is not None:
            module.forward = own
    return replace(results[0], loss=loss)


def lm_head_of(model: nn.Module) -> LMHead:
    """The head of a Hugging Face causal language model, PEFT-wrapped ones too.

    Args:
        model: has `get_output_embeddings()` and a `config`.

    Raises:
        ValueError: there is no output embedding, or a plain ``hidden @ weight.T + bias`` does not
            describe it (an adapter other than LoRA on the head, a quantised weight, a layer before
            the head).
    """
    model = unwrapped(model)
    module, low_rank = _low_rank(_trained_copy(_output_embedding(model)))
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    extra = [name for name, _ in module.named_parameters() if name not in ("weight", "bias")]
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or extra:
        also = f" (it also has {', '.join(extra)})" if extra else ""
        raise ValueError(
            f"model: its head is a {type(module).__name__}, which weight and bias alone do not"
            f" describe{also}"
        )
    if not weight.is_floating_point():
        raise ValueError(f"model: its head's weight is {weight.dtype}, wanted a floating dtype")
    config = text_config(model)
    kind = getattr(config, "model_type", None)
    if kind in _LAYERS_BEFORE_HEAD:
        raise ValueError(f"model: a {kind} transforms its hidden state before its output embedding")
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= _number(config, name) or 1.0
    for name in _DIVISORS:
        divisor = _number(config, name) or 1.0
        scale *= divisor if kind in _MULTIPLYING else 1.0 / divisor
    softcap = next(filter(None, (_number(config, name) for name in _SOFTCAPS)), None)
    vocab = next(filter(None, (getattr(config, name, None) for name in _VOCABS)), None)
    padded = vocab is not None and vocab < weight.shape[0]
    valid = vocab if padded else None
    return LMHead(weight, bias, softcap, scale, valid_vocab=valid, low_rank=low_rank)


def _output_embedding(model: nn.Module) -> nn.Module:
    model = unwrapped(model)
    getter = getattr(model, "get_output_embeddings", None)
    module = getter() if getter is not None else None
    if not isinstance(module, nn.Module):
        raise ValueError(f"model: {type(model).__name__} has no output embedding to read")
    return module


def _trained_copy(module: nn.Module) -> nn.Module:
    """What PEFT's `modules_to_save` trains in place of the original head."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    active: Any = [] if module.disable_adapters else module.active_adapters
    if active and active[0] in copies:
        return copies[active[0]]
    # Adapters are off, or the active one keeps no copy of the head.
    return module.get_submodule("original_module")


def _low_rank(module: nn.Module) -> tuple[nn.Module, tuple[LowRank, ...]]:
    """The layer below PEFT's LoRA on the head, and the terms of the active adapters."""
    if not (hasattr(module, "lora_A") and hasattr(module, "base_layer")):
        return module, ()
    layer: Any = module
    if layer.merged or layer.disable_adapters:
        if layer.merged and layer.disable_adapters:
            raise ValueError("model: an adapter is merged into its head, call `unmerge_adapter()`")
        return layer.base_layer, ()
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    return layer.base_layer, tuple(_term(layer, name) for name in active)


def _term(layer: Any, name: str) -> LowRank:
    """One adapter's term of a LoRA layer."""
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if name in layer.lora_variant or up.bias is not None:
        raise ValueError(f"model: the adapter {name!r} on its head is not plain LoRA without bias")
    probability = getattr(dropout, "p", 0.0) if dropout.training else 0.0
    return LowRank(down.weight, up.weight, layer.scaling[name], probability)


def text_config(model: nn.Module) -> Any:
    """Config of the language model, which a multimodal model keeps inside its own."""
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"model: {type(model).__name__} has no config to read its head from")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return None if value is None else float(value)
