"""A Hugging Face causal language model, taken apart: its backbone and its head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fused_prefopt.checks import is_on_host, require_tokens
from fused_prefopt.integrations.adapted_head import AdaptedHead, adapted_head, require_whole
from fused_prefopt.integrations.logit_transforms import logit_transforms
from fused_prefopt.integrations.virtual_tokens import (
    MADE,
    PROMPTED,
    require_kept_prefix,
    with_prompt,
)
from fused_prefopt.integrations.wrappers import wrapped_in
from fused_prefopt.types import LMHead, LossOutput

_VOCABS = ("unpadded_vocab_size", "vocab_size")
# Model types whose logits are no function of the last hidden state, the weight and the config.
_OTHERS = {
    "blt": "transforms its hidden state before its output embedding",
    "chameleon": "masks the logits of its image tokens",
}
# What a backbone takes of a collated batch, the last ones those of multimodal models.
INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "mm_token_type_ids",
    "pixel_values",
    "pixel_attention_mask",
    "image_sizes",
    "image_grid_thw",
    "image_position_ids",
    "pixel_values_videos",
    "video_grid_thw",
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The causal language model inside PEFT, DDP, `torch.compile` or other wrappers."""
    *_, inner = wrapped_in(model)
    return inner


def backbone_of(model: nn.Module) -> nn.Module:
    """The part of a causal language model that ends in the last hidden state.

    Its inputs are those behind an adapter that learns a prompt (`with_prompt`).

    Raises:
        ValueError: the model has no such part.
    """
    model = unwrapped(model)
    # The prefix of some models' text halves is that of the whole.
    for name in (getattr(model, "base_model_prefix", ""), "model"):
        backbone = getattr(model, name, None) if name else None
        if isinstance(backbone, nn.Module) and backbone is not model:
            return backbone
    raise ValueError(f"model: {type(model).__name__} has no backbone apart from its head")


def backbone_outputs(model: nn.Module, batch: Mapping[str, Any], **options: Any) -> Any:
    """What the backbone returns for a collated batch; no cache is kept.

    The last hidden states are those of the batch's own tokens, which see the virtual ones of an
    adapter that learns a prompt.

    Args:
        model: causal language model, in its wrappers.
        batch: `input_ids` and, where they are given, `attention_mask`, `position_ids` and what
            multimodal models take (`pixel_values` and its like, `token_type_ids`); or one of
            `with_prompt`.
        **options: further arguments of the backbone.

    Raises:
        ValueError: the batch has no `input_ids`, or on CPU one that the model does not know; the
            model has no backbone apart from its head; or an adapter that learns a prompt does not
            fit the batch, or gradient checkpointing it.
    """
    ids = batch.get("input_ids")
    if ids is None or (PROMPTED not in batch and batch.get("past_key_values") is not None):
        got = "none" if ids is None else "past_key_values with them"
        learned = "; with an adapter that learns a prompt call `model(**past_wrappers(batch))`"
        raise ValueError(
            f"input_ids: got {got} in {', '.join(map(repr, batch))}, needs token ids{learned}"
        )
    if is_on_host(ids) and not torch.compiler.is_compiling():
        require_tokens("input_ids", ids, input_vocab(model))
    batch = with_prompt(model, batch)
    backbone, given = backbone_of(model), batch.get(PROMPTED, batch)
    names = (*INPUTS, *MADE) if PROMPTED in batch else INPUTS
    inputs = {name: given[name] for name in names if given.get(name) is not None}
    require_kept_prefix(backbone, inputs)
    outputs = backbone(**inputs, **options, use_cache=False)
    if PROMPTED in batch:
        virtual = outputs.last_hidden_state.shape[1] - ids.shape[1]
        outputs.last_hidden_state = outputs.last_hidden_state[:, virtual:]
    return outputs


def input_vocab(model: nn.Module) -> int:
    """Rows of the model's input embedding, whatever adapts or partitions it.

    Raises:
        ValueError: the model has no config.
    """
    model = unwrapped(model)
    getter = getattr(model, "get_input_embeddings", None)
    embedding: Any = getter() if getter is not None else None
    while embedding is not None and not hasattr(embedding, "num_embeddings"):
        inner = ("base_layer", "original_module")
        embedding = next((getattr(embedding, n) for n in inner if hasattr(embedding, n)), None)
    return int(text_config(model).vocab_size if embedding is None else embedding.num_embeddings)


def last_hidden(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The backbone's last hidden states of a collated batch: padded (S, L, D) or packed (1, N, D).

    Arguments and errors are those of `backbone_outputs`.
    """
    return backbone_outputs(model, batch).last_hidden_state


def inside_head(
    model: nn.Module, hidden: Tensor, run: Callable[[Tensor, LMHead], Tensor]
) -> Tensor:
    """``run(hidden, head)`` from inside the forward of the modules that hold the head.

    Engines that shard the head (FSDP2 with the head as a unit of its own, ZeRO-3) gather its
    weights, and average their gradients, in hooks around those forwards: around the output
    embedding's, and around those of the layers that PEFT put inside.

    Args:
        model: causal language model.
        hidden: last hidden states.
        run: takes the hidden states and the head; the hooks see what it returns.

    Raises:
        ValueError: `lm_head_of` does.
    """

    def forward(hidden: Tensor) -> Tensor:
        return run(hidden, lm_head_of(model))

    for module in reversed(readable_head(model).modules):
        forward = partial(_forward_as, module, forward)
    return forward(hidden)


def through_head(
    model: nn.Module, hidden: Tensor, run: Callable[[Tensor, LMHead], LossOutput]
) -> LossOutput:
    """`inside_head` for a loss: the hooks see its `loss`.

    Args:
        model: causal language model.
        hidden: last hidden states.
        run: takes the hidden states and the head.

    Raises:
        ValueError: `lm_head_of` does.
    """
    results: list[LossOutput] = []

    def loss_of(hidden: Tensor, head: LMHead) -> Tensor:
        results.append(run(hidden, head))
        return results[0].loss

    loss = inside_head(model, hidden, loss_of)
    # FSDP2 casts what a unit's forward returns, after its hooks are on it.
    exact = loss.dtype == results[0].loss.dtype
    return replace(results[0], loss=loss) if exact else results[0]


def _forward_as(module: nn.Module, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """Call a module with another forward in place of its own: its hooks run around it."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        return module(hidden)
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def lm_head_of(model: nn.Module) -> LMHead:
    """The head of a Hugging Face causal language model, PEFT-wrapped ones too.

    Args:
        model: has `get_output_embeddings()` and a `config`.

    Raises:
        ValueError: `readable_head` does; or the weight is not whole here (ZeRO-3, FSDP or
            offloading outside its module's forward), is not floating, or has fewer rows than the
            config's vocabulary.
    """
    parts = readable_head(model)
    layer: Any = parts.layer
    weight: Tensor = layer.weight
    require_whole("weight of the head", weight)
    # Eight bits need scales, wherever those are kept.
    if not weight.is_floating_point() or weight.itemsize == 1:
        raise ValueError(f"model: its head's weight is {weight.dtype}, wanted a floating dtype")
    config = text_config(unwrapped(model))
    scale, softcap = logit_transforms(unwrapped(model), config)
    rows = weight.shape[0]
    vocab = next(filter(None, (getattr(config, name, None) for name in _VOCABS)), rows)
    if vocab > rows:
        raise ValueError(
            f"model: its head has {rows} rows, its config a vocabulary of {vocab}: a part of it"
        )
    valid = vocab if vocab < rows else None
    bias = getattr(layer, "bias", None)
    return LMHead(weight, bias, softcap, scale, valid_vocab=valid, low_rank=parts.terms())


def readable_head(model: nn.Module) -> AdaptedHead:
    """The layers of a model's head, checked to be one matrix with low-rank terms.

    It reads no values: they may be partitioned.

    Args:
        model: has `get_output_embeddings()` and a `config`.

    Raises:
        ValueError: there is no output embedding, or a plain ``hidden @ weight.T + bias`` does not
            describe it (an adapter other than LoRA and trainable tokens on the head, a quantised
            weight, a layer before the head).
    """
    model = unwrapped(model)
    getter = getattr(model, "get_output_embeddings", None)
    module = getter() if getter is not None else None
    if not isinstance(module, nn.Module):
        raise ValueError(f"model: {type(model).__name__} has no output embedding to read")
    parts = adapted_head(module)
    layer = parts.layer
    tensors = [*dict(layer.named_parameters()), *dict(layer.named_buffers())]
    extra = [name for name in tensors if name not in ("weight", "bias")]
    if not isinstance(getattr(layer, "weight", None), nn.Parameter) or extra:
        also = f" (it also has {', '.join(extra)})" if extra else ""
        raise ValueError(
            f"model: its head is a {type(layer).__name__}, which weight and bias alone do not"
            f" describe{also}"
        )
    kind = getattr(text_config(model), "model_type", None)
    if kind in _OTHERS:
        raise ValueError(f"model: a {kind} {_OTHERS[kind]}")
    _require_nothing_between(model, module)
    return parts


def _require_nothing_between(model: nn.Module, head: nn.Module) -> None:
    """Raise ValueError if a model has parameters outside its backbone and its head."""
    try:
        backbone = backbone_of(model)
    except ValueError:
        return
    known = {id(value) for value in head.parameters()}
    # Every step comes here: the backbone, of many parameters, is not walked through.
    others = [
        f"{name}.{inner}"
        for name, part in model.named_children()
        if part is not backbone
        for inner, value in part.named_parameters()
        if id(value) not in known
    ]
    if others:
        raise ValueError(
            f"model: a {type(model).__name__} has parameters outside its backbone and its output"
            f" embedding ({', '.join(others[:3])}), which may transform its hidden state before its"
            " output embedding"
        )


def text_config(model: nn.Module) -> Any:
    """Config of the language model, which a multimodal model keeps inside its own."""
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"model: {type(model).__name__} has no config to read its head from")
    return config.get_text_config() if hasattr(config, "get_text_config") else config
