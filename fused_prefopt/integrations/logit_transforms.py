"""What a model does to the logits of its output embedding: scale and softcap, from its config."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

from torch import nn

# Config attribute → what it does to the logits. Models name the same thing differently.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Config attribute → name under which a module of the model applies it.
_READ_AS = {"final_logit_softcapping": "logit_softcap"}
# Model types that multiply by what others divide by.
_MULTIPLYING = ("hyperclovax",)


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
    """Names that the forwards of a class and of those it extends read."""
    names: set[str] = set()
    for each in kind.__mro__:
        code = getattr(inspect.unwrap(vars(each).get("forward", None)), "__code__", None)
        if code is not None:
            names.update(code.co_names)
            names.update(value for value in code.co_consts if isinstance(value, str))
    return frozenset(names)
