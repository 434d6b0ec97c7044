"""Sequences packed in one row: whether a model keeps them apart."""

from __future__ import annotations

import inspect
import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fused_prefopt.integrations.causal_lm import backbone_of, last_hidden, text_config
from fused_prefopt.integrations.evaluating import evaluating

_LENGTH = 4
# Backbone that has passed → the attention implementation it had.
_PASSED: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def require_separate_sequences(model: nn.Module, input_ids: Tensor) -> None:
    """Raise ValueError unless a token's hidden state is that of its own sequence alone.

    Packed sequences differ from one long one by their `position_ids` only, which many models do
    not heed: those with recurrent or convolutional layers, with ALiBi, or whose attention mask is
    made without them (OPT, Falcon, Qwen2-VL). Their configs do not tell, so the model is tried,
    once: of two short sequences in a row the first is changed, which must not change the second.
    Under torch.compile it is not tried.

    Args:
        model: causal language model; every rank makes the call where it is sharded.
        input_ids: the batch's, for their device.

    Raises:
        ValueError: the model lets packed sequences see one another.
    """
    backbone = backbone_of(model)
    attention = getattr(text_config(model), "_attn_implementation", None)
    if torch.compiler.is_compiling() or _PASSED.get(backbone, False) == attention:
        return
    distance, tolerance = math.inf, 0.0
    if _takes_positions(backbone):
        first, second = (_hidden_of_second(model, input_ids, token) for token in (0, _LENGTH))
        distance = float((second - first).norm() / first.norm())
        tolerance = _tolerance(first)
    if distance > tolerance:
        raise ValueError(
            f"padding_free: got a {type(model).__name__} with {attention} attention, whose packed"
            " sequences see one another, needs a model that heeds position_ids, or padded batches"
        )
    if distance <= tolerance:
        _PASSED[backbone] = attention


def _takes_positions(backbone: nn.Module) -> bool:
    parameters = inspect.signature(backbone.forward).parameters
    return "position_ids" in parameters or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def _tolerance(hidden: Tensor) -> float:
    """Above rounding, as experts may round otherwise in other company; below what is seen."""
    dtypes, device = {hidden.dtype}, hidden.device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return float(max(torch.finfo(dtype).eps for dtype in dtypes) ** (2 / 3))


@torch.no_grad()
def _hidden_of_second(model: nn.Module, input_ids: Tensor, token: int) -> Tensor:
    """(length, D) hidden states of the first tokens, behind a sequence of those from `token` on."""
    positions = torch.arange(_LENGTH, device=input_ids.device)
    ids, position_ids = torch.cat((positions + token, positions))[None], positions.repeat(2)[None]
    device = ids.device.type
    # Older torch's autocast keeps what it casts here, without a gradient, for the pass that trains.
    uncached = torch.autocast(
        device, enabled=torch.is_autocast_enabled(device), cache_enabled=False
    )
    with evaluating(backbone_of(model)), uncached:
        hidden = last_hidden(model, {"input_ids": ids, "position_ids": position_ids})
    return hidden[0, _LENGTH:]
