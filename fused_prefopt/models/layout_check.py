"""Layouts that not every model has: trials and checks that its attention keeps sequences apart."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fused_prefopt.data.columns import ATTENTION_MASK, INPUT_IDS, POSITION_IDS, SEGMENTS
from fused_prefopt.data.shared_prompts import IN_REJECTED, shared_attention, shared_layout
from fused_prefopt.models.causal_lm import backbone_of, last_hidden, text_config
from fused_prefopt.models.model_call import evaluating

# Attention that adds a mask of any pattern to its scores.
_IMPLEMENTATIONS = ("eager", "sdpa")
# Tokens of each of two sequences on which packing is tried.
_LENGTH = 4
# Backbone that keeps packed sequences, or the sides of a pair, apart → the attention it had then.
_PASSED: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_PASSED_SHARED: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


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
    _require_alike(
        model,
        lambda: (_hidden_of_second(model, input_ids, token) for token in (0, _LENGTH)),
        _PASSED,
        "padding_free: got a {} attention, whose packed sequences see one another, needs a model"
        " that heeds position_ids, or padded batches",
    )


def _require_alike(
    model: nn.Module,
    trials: Callable[[], Iterable[Tensor]],
    passed: WeakKeyDictionary[nn.Module, Any],
    refused: str,
) -> None:
    """Raise ValueError unless two trials of a model give the same hidden states, tried once."""
    backbone = backbone_of(model)
    attention = getattr(text_config(model), "_attn_implementation", None)
    if torch.compiler.is_compiling() or passed.get(backbone, False) == attention:
        return
    distance, rounding = math.inf, 0.0
    if _takes_positions(backbone):
        first, second = trials()
        distance = float((second - first).norm() / first.norm())
        rounding = tolerance(first)
    if distance > rounding:
        raise ValueError(refused.format(f"{type(model).__name__} with {attention}"))
    if distance <= rounding:
        passed[backbone] = attention


def _takes_positions(backbone: nn.Module) -> bool:
    parameters = inspect.signature(backbone.forward).parameters
    return "position_ids" in parameters or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def tolerance(hidden: Tensor) -> float:
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
    with evaluating(backbone_of(model)), uncached(ids.device.type):
        hidden = last_hidden(model, {INPUT_IDS: ids, POSITION_IDS: position_ids})
    return hidden[0, _LENGTH:]


def uncached(device: str) -> torch.autocast:
    """Autocast as it is, but for a trial.

    Older torch's keeps what it casts there, without a gradient, for the pass that trains.
    """
    return torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False)


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


def shared_rows(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """(B, L, D) last hidden states of rows that share a prompt."""
    dtype = next(model.parameters()).dtype
    inputs = {**batch, ATTENTION_MASK: shared_attention(batch[SEGMENTS], dtype)}
    return last_hidden(model, inputs)


def require_separate_sides(model: nn.Module, input_ids: Tensor) -> None:
    """Raise ValueError unless the sides of a pair that shares its prompt do not see each other.

    Recurrent layers and positions that are no argument (RWKV's) do not tell of themselves in every
    config, so the model is tried, as in `require_separate_sequences`: another chosen side, and a
    longer one, must not change the rejected side.

    Args:
        model: causal language model that `require_mask_attention` lets pass.
        input_ids: the batch's, for their device.

    Raises:
        ValueError: the model lets them see each other, or takes no mask for each pair of tokens.
    """

    def trials() -> list[Tensor]:
        try:
            return [_hidden_of_rejected(model, input_ids, chosen) for chosen in ([1], [2, 3])]
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(
                f"shared_prompt: got a {type(model).__name__}, which takes no attention mask of"
                f" (1, 1, 4, 4) ({error}); needs a model that does, or padded batches"
            ) from error

    _require_alike(
        model,
        trials,
        _PASSED_SHARED,
        "shared_prompt: got a {} attention, whose two sides of a pair see each other, needs a model"
        " that heeds its mask and position_ids, or padded batches",
    )


@torch.no_grad()
def _hidden_of_rejected(model: nn.Module, input_ids: Tensor, chosen: list[int]) -> Tensor:
    """(1, D) hidden state of a rejected side of one token, behind a prompt of one."""
    prompt = torch.zeros(1, dtype=torch.int64)
    sides = (prompt, torch.tensor(chosen)), (prompt, torch.ones_like(prompt))
    row = shared_layout([sides], pad_token_id=0, multiple=4)
    row = {name: value.to(input_ids.device) for name, value in row.items()}
    with evaluating(backbone_of(model)), uncached(row[INPUT_IDS].device.type):
        return shared_rows(model, row)[row[SEGMENTS] == IN_REJECTED]
