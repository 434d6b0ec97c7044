"""Adapters of models in FSDP1's wrappers, whose layers PEFT looks up by their names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

from fused_prefopt.distributed import gather_objects
from fused_prefopt.models.peft_head import FSDP1S

_NAMED = ("named_modules", "named_parameters")


@contextmanager
def named_as_saved(model: nn.Module) -> Iterator[None]:
    """What is inside FSDP1's wrappers goes by the names of a state dict, which leave them out.

    PEFT compares the two kinds of names. It would leave layers inside a wrapper out of what it
    loads, and from 0.21 on out of what it saves, without a word; there it also loads by the names
    in each rank's state dict, which are on the first rank alone.

    Args:
        model: what a trainer saves or loads, on every rank; one without a wrapper stays as it is.
    """
    if FSDP1S not in model._modules:
        yield
        return
    changed = [(each, name) for each in (model, model.get_submodule(FSDP1S)) for name in _NAMED]
    for module, name in changed:
        setattr(module, name, MethodType(_without_wrappers(name), module))
    changed.append((model, "state_dict"))
    model.state_dict = MethodType(_named_on_all_ranks, model)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, name in changed:
            delattr(module, name)


def _without_wrappers(method: str) -> Any:
    """A method of a module that gives (name, value), with names that leave out the wrappers'."""

    def named(self: Any, *args: Any, **options: Any) -> Iterator[tuple[str, Any]]:
        for name, value in getattr(type(self), method)(self, *args, **options):
            yield ".".join(part for part in name.split(".") if part != FSDP1S), value

    return named


def _named_on_all_ranks(self: Any, *args: Any, **options: Any) -> dict[str, Any]:
    """A state dict with the first rank's names, None for what is not here."""
    found = type(self).state_dict(self, *args, **options)
    if args or options:
        return found
    return dict.fromkeys(gather_objects(list(found))[0]) | found
