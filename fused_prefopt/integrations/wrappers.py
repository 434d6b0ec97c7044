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
        # PEFT says it publicly of adapters in layers only.
        and getattr(each, "_adapters_disabled", False) == off
    ]
