"""A forward in front of a model's own, which a deep copy of the model takes for its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any
from weakref import WeakSet

from torch import nn

from fused_prefopt.integrations.wrappers import prompt_learners, wrapped_in

# Takes the model that is called, the forward behind, and the arguments of the call.
Run = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

# Attribute of a model: what others were put in front of, the first first; None is its class's.
_BEHIND = "_forwards_behind"
_FRONTS: WeakSet[Callable[..., Any]] = WeakSet()


def put_in_front(model: nn.Module, run: Run) -> int:
    """Let every call of a model's forward be a call of `run`.

    A deep copy of the model calls `run` with itself, and has copies of the forwards behind.

    Args:
        model: without wrappers.
        run: gets the model that is called, the forward that was in front until now, and the
            positional and keyword arguments.

    Returns:
        The place of `run`, for `take_away`.
    """
    behind = model.__dict__.setdefault(_BEHIND, [])
    place = len(behind)

    @functools.wraps(getattr(model.forward, "__func__", type(model).forward))
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = self.__dict__[_BEHIND][place]
        past = MethodType(type(self).forward, self) if given is None else given
        return run(self, past, args, kwargs)

    behind.append(model.__dict__.get("forward"))
    _FRONTS.add(forward)
    model.forward = MethodType(forward, model)
    return place


def has_front(model: nn.Module) -> bool:
    """Whether calls of a model meet what `put_in_front` put there, decorated or not.

    Args:
        model: without wrappers.
    """
    forward: Any = model.forward
    if getattr(forward, "__self__", None) is not model:
        return False
    function = forward.__func__
    while function is not None and function not in _FRONTS:
        function = getattr(function, "__wrapped__", None)
    return function is not None


def take_away(model: nn.Module, place: int) -> None:
    """Give a model back the forward that it had, without what came in front of it later.

    Args:
        model: as it was given to `put_in_front`.
        place: what that returned.
    """
    behind = model.__dict__[_BEHIND]
    before = behind[place]
    del behind[place:], model.forward
    if before is not None:
        model.forward = before


@contextmanager
def in_front(model: nn.Module, run: Run) -> Iterator[None]:
    """`put_in_front` of the model inside the wrappers, for a while.

    Args:
        model: wrapped or not.
        run: as in `put_in_front`.
    """
    *_, inner = wrapped_in(model)
    place = put_in_front(inner, run)
    let_wrappers_follow(model)
    try:
        yield
    finally:
        take_away(inner, place)
        let_wrappers_follow(model)


def let_wrappers_follow(model: nn.Module) -> None:
    """Let wrappers call the forward that the model inside has now.

    PEFT switches a learned prompt off by calling the forward that its base model had then.

    Args:
        model: wrapped or not.
    """
    for each in prompt_learners(model, off=True):
        each.forward = each.get_base_model().forward
