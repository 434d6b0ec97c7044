"""A call of a causal language model through its wrappers: PEFT's, DDP's, FSDP's, DeepSpeed's.

A forward in front of the model's own answers the call from inside the wrappers, where their hooks
have gathered the weights. Values go past the wrappers through a side channel: FSDP casts every
floating argument of a call to the dtype that it computes in, DeepSpeed's trainer every floating
tensor of a batch, FSDP2 also what a call returns: in bf16 a sum of -350 nats is off by up to one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

# What a multimodal model's backbone takes of a collated batch: pictures, and how they are cut up.
IMAGES = (
    "pixel_values",
    "pixel_attention_mask",
    "pixel_mask",
    "spatial_shapes",
    "batch_num_images",
    "image_sizes",
    "image_grid_thw",
    "image_position_ids",
    "pixel_values_videos",
    "video_grid_thw",
    "second_per_grid_ts",
)
# What it takes of each token, the last ones where there are images.
TOKENWISE = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "mm_token_type_ids",
)
INPUTS = (*TOKENWISE, *IMAGES)
# What an adapter that learns a prompt lengthens, shifts or leaves out of them.
REPLACED = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
# Key of a batch: the arguments that such an adapter made of it.
PROMPTED = "prompted"
# Argument of a call: its `SideChannel`.
SIDE_CHANNEL = "side_channel"

# Takes the model that is called, the forward behind, and the arguments of the call.
Run = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

# Attribute of a model: what others were put in front of, the first first; None is its class's.
_BEHIND = "_forwards_behind"
_FRONTS: WeakSet[Callable[..., Any]] = WeakSet()


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


def unwrapped(model: nn.Module) -> nn.Module:
    """The causal language model inside PEFT, DDP, `torch.compile` or other wrappers."""
    *_, inner = wrapped_in(model)
    return inner


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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode again afterwards.

    And what trained before trains again. PEFT, which switches its adapters off and on inside, has
    only those parameters at hand that stand in the model then: after a forward pass FSDP2's whole
    ones may be there instead of their shards, and checkpoints leave out shards that do not train.
    """
    training = [module for module in model.modules() if module.training]
    trained = [value for value in model.parameters() if value.requires_grad]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for value in trained:
            value.requires_grad_(True)


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
    inner = unwrapped(model)
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


class SideChannel:
    """Values that go past a call's wrappers, and back. No dataclass: wrappers look into those.

    Args:
        fields: floating fields of the batch.
        inputs: those of its inputs that an adapter with a learned prompt replaces.
        request: what the model is asked for instead of its own results, or None.

    Attributes:
        fields: as given.
        inputs: as given.
        request: as given.
        found: what the call leaves here, by name.
    """

    def __init__(
        self, fields: dict[str, Tensor], inputs: dict[str, Any], request: dict[str, Any] | None
    ) -> None:
        self.fields = fields
        self.inputs = inputs
        self.request = request
        self.found: dict[str, Tensor] = {}


def past_wrappers(
    batch: Mapping[str, Any], request: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The arguments of an attached model's call that no wrapper rounds.

    ``model(**past_wrappers(batch))["loss"]`` is the loss of ``model(**batch)``, of exact reference
    log-probs and scores whatever wraps the model.

    Args:
        batch: of a collator.
        request: as in `SideChannel`.

    Returns:
        The batch with a `SideChannel` in place of its floating fields. What the backbone takes
        (pixel values) stays where it is: that is to be cast.
    """
    kept = exact_fields(batch)
    # What one model's adapter made of the batch is nothing to another model.
    others = {name: batch[name] for name in batch if name not in kept and name != PROMPTED}
    inputs = {name: others[name] for name in REPLACED if others.get(name) is not None}
    return others | {SIDE_CHANNEL: SideChannel(kept, inputs, request)}


def without_side_channel(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `past_wrappers` as they would be without it.

    Args:
        arguments: as they come out of the wrappers.
    """
    others = {name: value for name, value in arguments.items() if name != SIDE_CHANNEL}
    channel: SideChannel | None = arguments.get(SIDE_CHANNEL)
    return others if channel is None else others | channel.fields


def exact_fields(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The floating fields of a batch that its backbone does not take."""
    return {
        name: value
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.is_floating_point() and name not in INPUTS
    }


def exact_loss(returned: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """The loss of a call of `past_wrappers`, in the dtype that it was computed in.

    Args:
        returned: the call's own, which has been through the wrappers' hooks.
        arguments: of the call.
    """
    # A cast comes after the hooks: the gradient of what was cast meets them too.
    found = arguments[SIDE_CHANNEL].found.get("loss", returned)
    return returned if returned.dtype == found.dtype else found
