"""The load-balancing loss of a mixture of experts, which its model adds to its own loss."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import Tensor, nn

from fused_prefopt.integrations.causal_lm import text_config, unwrapped

_FUNCTION = "load_balancing_loss_func"
# What every modelling file of transformers gives that function.
_ARGUMENTS = {"num_experts", "top_k", "attention_mask"}
# Names of the three numbers, on the model itself or else in its config.
_EXPERTS = ("num_experts", "num_local_experts")
_TOP_K = ("num_experts_per_tok",)
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def wants_router_loss(model: nn.Module) -> bool:
    """Whether a model adds a router loss: ``config.output_router_logits``, and a function for it.

    Args:
        model: causal language model.
    """
    model = unwrapped(model)
    wanted = getattr(text_config(model), "output_router_logits", False)
    return bool(wanted) and _function(model) is not None


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
    function = _function(model)
    name = type(model).__name__
    if function is None or not router_logits:
        raise ValueError(f"router_logits: got none from {name}, needs those of its experts' layers")
    others = list(inspect.signature(function).parameters)[1:]
    if set(others) != _ARGUMENTS:
        raise ValueError(
            f"model: the router loss of {name} takes {', '.join(others)}, needs"
            f" {', '.join(sorted(_ARGUMENTS))}; without output_router_logits it is left out"
        )
    experts, top_k = _number(model, _EXPERTS), _number(model, _TOP_K)
    loss = function(
        router_logits, num_experts=int(experts), top_k=int(top_k), attention_mask=attention_mask
    )
    return _number(model, _COEFFICIENTS), loss


def _function(model: nn.Module) -> Any:
    """The function that the model's modelling file defines, or that of a class it extends."""
    for kind in type(model).__mro__:
        module = sys.modules.get(kind.__module__)
        if hasattr(module, _FUNCTION):
            return getattr(module, _FUNCTION)
    return None


def _number(model: nn.Module, names: tuple[str, ...]) -> float:
    for source in (model, text_config(model)):
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int | float):
                return value
    raise ValueError(f"model: got none of {', '.join(names)}, needs it for its router loss")
