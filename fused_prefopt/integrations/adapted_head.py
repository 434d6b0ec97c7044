"""What PEFT builds around an output embedding: copies, low-rank terms, trainable tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_prefopt.types import LowRank


@dataclass(frozen=True)
class AdaptedHead:
    """An output embedding taken apart.

    Attributes:
        layer: the innermost layer, which has the weight and bias of the head.
        adapters: (PEFT layer, name of an active adapter), whose terms come on top.
        modules: those whose forward a run of the head goes through, the outermost first.
    """

    layer: nn.Module
    adapters: tuple[tuple[Any, str], ...]
    modules: tuple[nn.Module, ...]

    def terms(self) -> tuple[LowRank, ...]:
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
    modules = [module]
    while True:
        inner = _next(modules[-1])
        if inner is None:
            break
        layer: Any = modules[-1]
        names = _active(layer)
        adapters += [(layer, name) for name in names]
        if _is_lora(layer):
            modules += [part[name] for name in names for part in (layer.lora_A, layer.lora_B)]
        modules.append(inner)
    return AdaptedHead(modules[-1], tuple(adapters), tuple(modules))


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
            " `integrations.causal_lm.inside_head`)"
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


def _term(layer: Any, name: str) -> LowRank:
    return _lora_term(layer, name) if _is_lora(layer) else _token_term(layer, name)


def _lora_term(layer: Any, name: str) -> LowRank:
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if name in layer.lora_variant or up.bias is not None:
        raise ValueError(f"model: the adapter {name!r} on its head is not plain LoRA without bias")
    for part, side in ((down, "lora_A"), (up, "lora_B")):
        require_whole(f"{side} of the head", part.weight)
    probability = getattr(dropout, "p", 0.0) if dropout.training else 0.0
    return LowRank(down.weight, up.weight, layer.scaling[name], probability)


def _token_term(layer: Any, name: str) -> LowRank:
    """Rows of the weight replaced by trained ones: their difference, spread by a one-hot matrix.

    A copy of the weight with the rows in it, which PEFT makes, would be a second (V, D) matrix,
    and its gradient a third.
    """
    weight, rows = layer.base_layer.weight, layer.trainable_tokens_delta[name]
    if not isinstance(layer.base_layer, nn.Linear) or layer.base_layer.bias is not None:
        raise ValueError(
            "model: trainable_token_indices on its head needs a linear layer without bias, got"
            f" {layer.base_layer}"
        )
    require_whole("weight of the head", weight)
    require_whole("trainable tokens of the head", rows)
    index = torch.tensor(layer.token_indices[name]).to(weight.device, non_blocking=True)
    spread = weight.new_zeros(weight.shape[0], len(index))
    spread[index, torch.arange(len(index), device=weight.device)] = 1
    return LowRank(rows.to(weight) - weight[index], spread)
