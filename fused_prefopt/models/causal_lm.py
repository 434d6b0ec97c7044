"""A Hugging Face causal language model, taken apart: its backbone and its head."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_prefopt.checks import is_on_host, require_tokens
from fused_prefopt.data.columns import COMPLETION_MASK
from fused_prefopt.data.labels import labels_of
from fused_prefopt.models.model_call import INPUTS, PROMPTED, unwrapped
from fused_prefopt.models.peft_head import (
    MADE,
    AdaptedHead,
    LowRankTerm,
    adapted_head,
    require_kept_prefix,
    require_whole,
    with_prompt,
)

_VOCABS = ("unpadded_vocab_size", "vocab_size")
# Arguments of a model's forward that are no part of a batch.
_NO_DATA = {
    "labels",
    "past_key_values",
    "inputs_embeds",
    "cache_position",
    "logits_to_keep",
    "use_cache",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
}
# The router loss: its function in transformers' modelling files, and what they all give it.
_ROUTER_LOSS = "load_balancing_loss_func"
_ROUTER_ARGUMENTS = {"num_experts", "top_k", "attention_mask"}
# Names of the three numbers, on the model itself or else in its config.
_ROUTER_EXPERTS = ("num_experts", "num_local_experts")
_ROUTER_TOP_K = ("num_experts_per_tok",)
_ROUTER_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
# Config attribute → what it does to the logits. Models name the same thing differently.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Config attribute → name under which a module of the model applies it.
_READ_AS = {"final_logit_softcapping": "logit_softcap"}
# Model types that multiply by what others divide by.
_MULTIPLYING = ("hyperclovax",)
# Model types whose logits are no function of the last hidden state, the weight and the config.
_OTHERS = {
    "blt": "transforms its hidden state before its output embedding",
    "chameleon": "masks the logits of its image tokens",
}


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
    """The backbone's outputs for a collated batch; no cache is kept.

    The last hidden states are those of the batch's own tokens, which see the virtual ones of an
    adapter that learns a prompt.

    Args:
        model: causal language model, in its wrappers.
        batch: `input_ids` and, where they are given, `attention_mask`, `position_ids` and what
            multimodal models take (`pixel_values` and its like, `token_type_ids`); or one of
            `with_prompt`.
        **options: further arguments of the backbone.

    Raises:
        ValueError: the batch has no `input_ids`, or on CPU one that the model does not know, or
            has what the model takes and its backbone is not given; the model has no backbone apart
            from its head, or one that gives more hidden states than tokens; or an adapter that
            learns a prompt does not fit the batch, or gradient checkpointing it.
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
    if not torch.compiler.is_compiling():
        _require_all_given(model, inputs, given)
    kind: Any = type(backbone)
    if "token_type_ids" in inputs and COMPLETION_MASK in batch and "labels" in _arguments_of(kind):
        # By these some see that completions are there, which they then mask (PaliGemma).
        inputs["labels"] = labels_of(batch)
    outputs = backbone(**inputs, **options, use_cache=False)
    others = outputs.last_hidden_state.shape[1] - ids.shape[1]
    if PROMPTED in batch:
        outputs.last_hidden_state = outputs.last_hidden_state[:, others:]
    elif others:
        raise ValueError(
            f"model: got {ids.shape[1] + others} hidden states of a"
            f" {type(unwrapped(model)).__name__} for {ids.shape[1]} tokens, needs one for each: its"
            " images must stand in input_ids, a token for each of their hidden states"
        )
    return outputs


def _require_all_given(
    model: nn.Module, inputs: Mapping[str, Any], batch: Mapping[str, Any]
) -> None:
    """Raise ValueError if a model's own forward would take more of a batch than its backbone."""
    kind: Any = type(unwrapped(model))
    taken = _arguments_of(kind) - _NO_DATA
    left = [name for name in batch if name in taken and name not in inputs]
    left = [name for name in left if isinstance(batch[name], Tensor)]
    if left:
        raise ValueError(
            f"{left[0]}: got {', '.join(left)} for a {kind.__name__}, needs what its backbone is"
            f" given: {', '.join(INPUTS)}"
        )


@functools.cache
def _arguments_of(kind: type[nn.Module]) -> frozenset[str]:
    """Names of what the forward of a class of models takes."""
    return frozenset(inspect.signature(kind.forward).parameters)


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


@contextmanager
def head_running(
    model: nn.Module, forward: Callable[[Tensor], Tensor]
) -> Iterator[Callable[[Tensor], Tensor]]:
    """A model's head, a call of which runs `forward` in place of its innermost layer's own.

    Engines that shard the head (FSDP with the head as a unit of its own, ZeRO-3) gather its
    weights, and average their gradients, in hooks around the forwards of the modules that hold
    it, or in the forward of a wrapper around each (FSDP1): the output embedding, and the layers
    that PEFT put inside. The head is to be read (`LMHead.of`) inside `forward`; hooks and wrappers
    see what that takes and returns.

    Args:
        model: causal language model.
        forward: hidden states → any tensor.

    Raises:
        ValueError: `readable_head` does; or, from inside, the head is a layer of torch's
            `parallelize_module`.
    """
    parts = readable_head(model)
    modules = parts.modules
    before = [module.__dict__.get("forward") for module in modules]

    forwards = [*(door.__call__ for door in parts.doors[1:]), forward]
    try:
        for module, given in zip(modules, forwards, strict=True):
            module.forward = given
        yield parts.doors[0]
    finally:
        for module, own in zip(modules, before, strict=True):
            module.__dict__.pop("forward", None)
            if own is not None:
                module.forward = own


def require_plain(hidden: Tensor) -> None:
    """Raise ValueError if a head is given a DTensor, as in `head_running`'s forward.

    Args:
        hidden: its last hidden states.
    """
    if hasattr(hidden, "placements"):
        raise ValueError(
            "model: got a head of `parallelize_module`, whose hooks take a DTensor of logits"
            " alone; needs transformers' `tp_plan`, or `LMHead(head.weight)` and"
            " `PreferenceLoss` in a loop of your own"
        )


class HeadParts(NamedTuple):
    """The arguments of a `types.LMHead`, whose low-rank terms are those of a `types.LowRank`.

    Plain, so that nothing here needs `types`, whose `LMHead.of` builds itself from them.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    valid_vocab: int | None
    low_rank: tuple[LowRankTerm, ...]


def head_parts(model: nn.Module) -> HeadParts:
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
    return HeadParts(weight, bias, softcap, scale, valid, parts.terms())


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
    # Of FSDP1 without `use_orig_params` it is a view of the parameters of its whole unit.
    if not isinstance(getattr(layer, "weight", None), Tensor) or extra:
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


def logit_transforms(model: nn.Module, config: Any) -> tuple[float, float | None]:
    """Factor on the logits, and their softcap or None.

    A config may have an attribute that its model leaves alone: MPT's `logit_scale`, and those of
    the language model inside most multimodal ones. So only what a forward reads counts.

    Args:
        model: causal language model, unwrapped.
        config: of its language model.
    """
    kind: Any = type(model)
    read, numbers = _names_read(kind), {}
    for name in (*_MULTIPLIERS, *_DIVISORS, *_SOFTCAPS):
        value = getattr(config, name, None)
        if value and read & {name, _READ_AS.get(name)}:
            numbers[name] = float(value)
    scale = math.prod(numbers[name] for name in _MULTIPLIERS if name in numbers)
    divisor = math.prod(numbers[name] for name in _DIVISORS if name in numbers)
    scale *= divisor if getattr(config, "model_type", None) in _MULTIPLYING else 1.0 / divisor
    return scale, next((numbers[name] for name in _SOFTCAPS if name in numbers), None)


@functools.cache
def _names_read(kind: type[nn.Module]) -> frozenset[str]:
    """Names that the forwards of a class and of those it extends read, from their bytecode.

    No public door tells what a model does to its logits: transformers has no method from hidden
    states to logits and no attribute that names their scale or softcap, and a config may hold
    numbers that its model leaves alone. `tests/integrations/test_doors.py` notices such a method.
    """
    names: set[str] = set()
    for each in kind.__mro__:
        code = getattr(inspect.unwrap(vars(each).get("forward", None)), "__code__", None)
        if code is not None:
            names.update(code.co_names)
            names.update(value for value in code.co_consts if isinstance(value, str))
    return frozenset(names)


def wants_router_loss(model: nn.Module) -> bool:
    """Whether a model adds a router loss: ``config.output_router_logits``, and a function for it.

    Args:
        model: causal language model.
    """
    model = unwrapped(model)
    wanted = getattr(text_config(model), "output_router_logits", False)
    return bool(wanted) and _router_function(model) is not None


def router_loss(
    model: nn.Module, router_logits: Any, attention_mask: Tensor | None
) -> tuple[float, Tensor]:
    """The model's own load-balancing loss, and the coefficient that it has in the model's loss.

    Args:
        model: causal language model for which `wants_router_loss`.
        router_logits: of its backbone's outputs, (tokens, experts) each layer.
        attention_mask: (S, L), padding 0; None counts every token.

    Returns:
        Coefficient, and the 0-d loss before it.

    Raises:
        ValueError: the model's loss takes more than the usual arguments, or one of them has no
            known name.

    Source: Switch Transformers (Fedus et al. 2021, arXiv:2101.03961), eqs. 4–6.
    """
    model = unwrapped(model)
    function = _router_function(model)
    name = type(model).__name__
    if function is None or not router_logits:
        raise ValueError(f"router_logits: got none from {name}, needs those of its experts' layers")
    others = list(inspect.signature(function).parameters)[1:]
    if set(others) != _ROUTER_ARGUMENTS:
        raise ValueError(
            f"model: the router loss of {name} takes {', '.join(others)}, needs"
            f" {', '.join(sorted(_ROUTER_ARGUMENTS))}; without output_router_logits it is left out"
        )
    experts, top_k = _router_number(model, _ROUTER_EXPERTS), _router_number(model, _ROUTER_TOP_K)
    loss = function(
        router_logits, num_experts=int(experts), top_k=int(top_k), attention_mask=attention_mask
    )
    return _router_number(model, _ROUTER_COEFFICIENTS), loss


def _router_function(model: nn.Module) -> Any:
    """The function that the model's modelling file defines, or that of a class it extends."""
    for kind in type(model).__mro__:
        module = sys.modules.get(kind.__module__)
        if hasattr(module, _ROUTER_LOSS):
            return getattr(module, _ROUTER_LOSS)
    return None


def _router_number(model: nn.Module, names: tuple[str, ...]) -> float:
    for source in (model, text_config(model)):
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int | float):
                return value
    raise ValueError(f"model: got none of {', '.join(names)}, needs it for its router loss")
