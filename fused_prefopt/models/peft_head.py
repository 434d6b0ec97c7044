"""PEFT's adapters: around an output embedding, and a learned prompt in front of every row.

Around an output embedding PEFT builds copies, low-rank terms and trainable tokens. For a learned
prompt its wrapper calls the base model with what it makes of the token ids: embeddings, the learned
ones in front, or a cache of learned keys and values, and a longer attention mask. A batch carries
that beside itself, by the name `PROMPTED`; labels and masks of its own stay as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_prefopt.data.columns import SEGMENTS, SEQUENCE_IDS
from fused_prefopt.models.model_call import PROMPTED, REPLACED, in_front, prompt_learners

# What PEFT's wrapper puts in place of token ids, or beside them.
MADE = ("inputs_embeds", "past_key_values")
_OF_TOKENS = ("position_ids", "token_type_ids", "mm_token_type_ids")
# Name of what FSDP1's wrapper wraps. By its class it would be known for seconds of imports.
FSDP1S = "_fsdp_wrapped_module"
# Key of a layout that has no row for each sequence → the option that makes it, what it holds.
_LAYOUTS = {
    SEQUENCE_IDS: ("padding_free", "packed sequences"),
    SEGMENTS: ("shared_prompt", "pairs in one row"),
}


class LowRankTerm(NamedTuple):
    """The arguments of a `types.LowRank`."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout: float


@dataclass(frozen=True)
class AdaptedHead:
    """An output embedding taken apart.

    Attributes:
        layer: the innermost layer, which has the weight and bias of the head.
        adapters: (PEFT layer, name of an active adapter), whose terms come on top.
        modules: those whose forward a run of the head goes through, the outermost first.
        doors: what is called to run each of them: the module, or FSDP1's wrapper around it.
    """

    layer: nn.Module
    adapters: tuple[tuple[Any, str], ...]
    modules: tuple[nn.Module, ...]
    doors: tuple[nn.Module, ...]

    def terms(self) -> tuple[LowRankTerm, ...]:
        """The adapters' terms.

        Raises:
            ValueError: an adapter is not a low-rank term, or its tensors are not whole here.
        """
        return tuple(_term(layer, name) for layer, name in self.adapters)


def adapted_head(module: nn.Module) -> AdaptedHead:
    """Take an output embedding apart, adapted by PEFT or not.

    Args:
        module: what `get_output_embeddings()` returns.

    Raises:
        ValueError: an adapter is merged into the weight while adapters are switched off.
    """
    adapters: list[tuple[Any, str]] = []
    doors = [module]
    while True:
        layer: Any = _inside(doors[-1])
        inner = _next(layer)
        if inner is None:
            break
        names = _active(layer)
        adapters += [(layer, name) for name in names]
        if _is_lora(layer):
            doors += [part[name] for name in names for part in (layer.lora_A, layer.lora_B)]
        doors.append(inner)
    return AdaptedHead(layer, tuple(adapters), tuple(map(_inside, doors)), tuple(doors))


def _inside(module: Any) -> nn.Module:
    """The module in FSDP1's wrapper, whose own forward gathers the weights; itself without one."""
    while FSDP1S in module._modules:
        module = module.get_submodule(FSDP1S)
    return module


def require_whole(name: str, value: Tensor) -> None:
    """Raise ValueError unless a matrix of the head has its values here.

    Args:
        name: of the matrix, for the message.
        value: what the module holds. Partitioned by ZeRO-3 or FSDP it is flat or empty outside
            its module's forward; offloaded it has no storage.
    """
    if value.dim() != 2 or not value.numel() or value.is_meta:
        kind = " on the meta device" if value.is_meta else ""
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}{kind}, needs the whole matrix: it is"
            " partitioned or offloaded, and is gathered only inside its module's forward (see"
            " `models.causal_lm.head_running`)"
        )


def _next(module: Any) -> nn.Module | None:
    """The layer inside one of PEFT's, None where there is none."""
    copies = getattr(module, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        active = [] if module.disable_adapters else module.active_adapters
        # Adapters are off, or the active one keeps no copy of the head.
        kept = active and active[0] in copies
        return copies[active[0]] if kept else module.get_submodule("original_module")
    tokens = getattr(module, "token_adapter", None)
    if isinstance(tokens, nn.Module):
        return tokens
    if hasattr(module, "base_layer") and (_is_lora(module) or _is_tokens(module)):
        return module.base_layer
    return None


def _active(layer: Any) -> list[str]:
    """Adapters of a PEFT layer that add a term to its base layer's output."""
    if not (_is_lora(layer) or _is_tokens(layer)):
        return []
    if layer.merged or layer.disable_adapters:
        if layer.merged and layer.disable_adapters:
            raise ValueError("model: an adapter is merged into its head, call `unmerge_adapter()`")
        return []
    known = layer.lora_A if _is_lora(layer) else layer.trainable_tokens_delta
    return [name for name in layer.active_adapters if name in known]


def _is_lora(module: Any) -> bool:
    # AdaLoRA's are bare matrices, with singular values between them.
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict)


def _is_tokens(module: Any) -> bool:
    return hasattr(module, "trainable_tokens_delta")


def _term(layer: Any, name: str) -> LowRankTerm:
    return _lora_term(layer, name) if _is_lora(layer) else _token_term(layer, name)


def _lora_term(layer: Any, name: str) -> LowRankTerm:
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if name in layer.lora_variant or up.bias is not None:
        raise ValueError(f"model: the adapter {name!r} on its head is not plain LoRA without bias")
    for part, side in ((down, "lora_A"), (up, "lora_B")):
        require_whole(f"{side} of the head", part.weight)
    probability = getattr(dropout, "p", 0.0) if dropout.training else 0.0
    return LowRankTerm(down.weight, up.weight, layer.scaling[name], probability)


def _token_term(layer: Any, name: str) -> LowRankTerm:
    """Rows of the weight replaced by trained ones: their difference, spread by a one-hot matrix.

    A copy of the weight with the rows in it, which PEFT makes, would be a second (V, D) matrix,
    and its gradient a third.
    """
    base: Any = _inside(layer.base_layer)
    weight, rows = base.weight, layer.trainable_tokens_delta[name]
    if not isinstance(base, nn.Linear) or base.bias is not None:
        raise ValueError(
            "model: trainable_token_indices on its head needs a linear layer without bias, got"
            f" {base}"
        )
    require_whole("weight of the head", weight)
    require_whole("trainable tokens of the head", rows)
    index = torch.tensor(layer.token_indices[name]).to(weight.device, non_blocking=True)
    spread = weight.new_zeros(weight.shape[0], len(index))
    spread[index, torch.arange(len(index), device=weight.device)] = 1
    return LowRankTerm(rows.to(weight) - weight[index], spread, scaling=1.0, dropout=0.0)


def is_prompted(arguments: Mapping[str, Any]) -> bool:
    """Whether a model is called with more than token ids.

    Args:
        arguments: of the call.
    """
    return any(arguments.get(name) is not None for name in MADE)


def with_prompt(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch with what the model's adapter makes of it, where that learns a prompt.

    Args:
        model: causal language model, in its wrappers.
        batch: of a collator; one that has been here stays as it is.

    Raises:
        ValueError: `prompted` does.
    """
    learners = prompt_learners(model)
    if not learners or PROMPTED in batch:
        return batch
    arguments: dict[str, Any] = {}
    with in_front(model, lambda inner, own, args, kwargs: arguments.update(kwargs)):
        learners[0](**batch)
    return prompted(batch, arguments)


def lacks_rows(key: str) -> str:
    """Message about a layout that has no row for each sequence.

    Args:
        key: by which a batch has it, `SEQUENCE_IDS` or `SEGMENTS`.
    """
    option, kind = _LAYOUTS[key]
    return (
        f"{option}: got {kind} with an adapter that learns a prompt, which stands in front of a"
        " row; needs padded batches with a row for each sequence"
    )


def prompted(batch: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with what an adapter made of it.

    Args:
        batch: as it went to the model's wrappers.
        arguments: what the model inside is called with.

    Returns:
        The batch, on the device of the arguments, with those under `PROMPTED`.

    Raises:
        ValueError: the batch has no row for each sequence, or says something of each token that
            the adapter does not say of its virtual ones.
    """
    for key in _LAYOUTS:
        if key in batch:
            raise ValueError(lacks_rows(key))
    given = {name: arguments[name] for name in arguments if arguments[name] is not None}
    rows: Tensor = given["inputs_embeds"] if "inputs_embeds" in given else given["input_ids"]
    for name in _OF_TOKENS:
        if batch.get(name) is None:
            continue
        if name not in given or given[name].shape[-1] != rows.shape[1]:
            raise ValueError(
                f"{name}: got some with an adapter that learns a prompt, which leaves them out;"
                " needs a batch without"
            )
    whole = {name: value for name, value in batch.items() if name not in MADE}
    for name in REPLACED:
        if isinstance(whole.get(name), Tensor):
            whole[name] = whole[name].to(rows.device)
    return whole | {PROMPTED: given}


def require_kept_prefix(backbone: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raise ValueError if a backbone would leave out the keys and values of a learned prefix.

    Args:
        backbone: of a causal language model.
        inputs: its arguments.
    """
    if "past_key_values" in inputs and any(
        module.training and getattr(module, "gradient_checkpointing", False)
        for module in backbone.modules()
    ):
        raise ValueError(
            "gradient_checkpointing: got True with an adapter that learns a prefix, which the"
            " layers then leave out; needs gradient_checkpointing=False"
        )


def require_saved_whole(option: str, model: nn.Module) -> None:
    """Raise ValueError if checkpoints hold a prompt without the layers that it trains through.

    Loaded into the model that trains, the prompt would go through those layers once more.

    Args:
        option: of a trainer, for the message.
        model: in its wrappers.
    """
    for learner in prompt_learners(model):
        encoder = learner.prompt_encoder[learner.active_adapter]
        layers = [name for name, _ in encoder.named_children() if name != "embedding"]
        if layers:
            raise ValueError(
                f"{option}: got an adapter whose prompt trains through {', '.join(layers)}, which"
                " PEFT does not save; needs PromptTuningConfig or a PrefixTuningConfig without"
                " projection"
            )
