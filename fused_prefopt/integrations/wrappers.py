"""Wrappers around a causal language model: PEFT's, DDP's, `torch.compile`'s."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def wrapped_in(model: nn.Module) -> Iterator[nn.Module]:
    """A model, what it wraps, and so on to what wraps nothing.

    Args:
        model: wrapped or not.
    """
    inner: Any = model
    while isinstance(inner, nn.Module):
        yield inner
        if "_orig_mod" in inner._modules:
            inner = inner.get_submodule("_orig_mod")
            continue
        base = getattr(inner, "get_base_model", None)
        inner = base() if callable(base) else getattr(inner, "module", None)


def prompt_learners(model: nn.Module, *, off: bool = False) -> list[Any]:
    """The wrappers of PEFT's whose active adapter learns a prompt, the outermost first.

    Args:
        model: wrapped or not.
        off: those that are switched off (`disable_adapter`) instead of those that are on.
    """
    return [
        each
        for each in wrapped_in(model)
        if getattr(getattr(each, "active_peft_config", None), "is_prompt_learning", False)
        and _is_off(each) == off
    ]


def _is_off(learner: Any) -> bool:
    """Whether a wrapper's learned prompt is switched off.

    Not every PEFT has a name for that, and others replace its forward too; but then it also
    generates by its base model's method.
    """
    return getattr(learner.prepare_inputs_for_generation, "__self__", None) is not learner
