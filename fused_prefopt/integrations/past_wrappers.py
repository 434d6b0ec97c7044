"""Values that go past a model's wrappers as they are.

FSDP casts every floating argument of a call to the dtype that it computes in, DeepSpeed's trainer
every floating tensor of a batch, FSDP2 also what a call returns: in bf16 a sum of -350 nats is
off by up to one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fused_prefopt.data.labels import LabelCounts
from fused_prefopt.integrations.causal_lm import INPUTS
from fused_prefopt.integrations.virtual_tokens import PROMPTED, REPLACED, is_prompted, prompted

# A batch that carries this key is a preference batch; any other goes the model's own way.
PREFERENCE_KEY = "completion_mask"
BESIDE_KEY = "beside"


class Beside:
    """What goes beside the tensors of a call. No dataclass: wrappers look into those.

    Args:
        fields: floating fields of the batch.
        inputs: those of its inputs that an adapter with a learned prompt replaces.
        wanted: what the model is asked for instead of its own results, or None.

    Attributes:
        fields: as given.
        inputs: as given.
        wanted: as given.
        found: what the call leaves here, by name.
    """

    def __init__(
        self, fields: dict[str, Tensor], inputs: dict[str, Any], wanted: dict[str, Any] | None
    ) -> None:
        self.fields = fields
        self.inputs = inputs
        self.wanted = wanted
        self.found: dict[str, Tensor] = {}


def past_wrappers(batch: Mapping[str, Any], wanted: dict[str, Any] | None = None) -> dict[str, Any]:
    """The arguments of an attached model's call that no wrapper rounds.

    ``model(**past_wrappers(batch))["loss"]`` is the loss of ``model(**batch)``, of exact reference
    log-probs and scores whatever wraps the model.

    Args:
        batch: of a collator.
        wanted: as in `Beside`.

    Returns:
        The batch with a `Beside` in place of its floating fields. What the backbone takes (pixel
        values) stays where it is: that is to be cast.
    """
    kept = exact_fields(batch)
    # What one model's adapter made of the batch is nothing to another model.
    others = {name: batch[name] for name in batch if name not in kept and name != PROMPTED}
    inputs = {name: others[name] for name in REPLACED if others.get(name) is not None}
    return others | {BESIDE_KEY: Beside(kept, inputs, wanted)}


def without_beside(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `past_wrappers` as they would be without it.

    Args:
        arguments: as they come out of the wrappers.
    """
    others = {name: value for name, value in arguments.items() if name != BESIDE_KEY}
    beside: Beside | None = arguments.get(BESIDE_KEY)
    return others if beside is None else others | beside.fields


def batch_behind(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The batch of a call of `past_wrappers`, with what an adapter made of it that learns a prompt.

    Args:
        arguments: as they come out of the wrappers.

    Raises:
        ValueError: `prompted` does.
    """
    batch, beside = without_beside(arguments), arguments.get(BESIDE_KEY)
    if beside is None or not is_prompted(batch):
        return batch
    return prompted(batch | beside.inputs, batch)


def keep_beside(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: `past_wrappers` of a preference batch that comes without it."""
    if kwargs.get(PREFERENCE_KEY) is None or BESIDE_KEY in kwargs:
        return None
    return args, past_wrappers(kwargs)


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
    found = arguments[BESIDE_KEY].found.get("loss", returned)
    return returned if returned.dtype == found.dtype else found


class PreparesExactly:
    """Mixin for a `transformers.Trainer`: what it makes of its batches leaves their fields alone.

    DeepSpeed's cast would round them; every `Trainer` makes mappings anew, of their items.
    """

    args: Any

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = super()._prepare_inputs(inputs)  # type: ignore[misc]
        if PREFERENCE_KEY in inputs:
            for name, value in exact_fields(inputs).items():
                prepared[name] = value.to(self.args.device)
            for name, value in inputs.items():
                if isinstance(value, LabelCounts):
                    prepared[name] = value
        return prepared


def require_exact(name: str, value: Tensor | None) -> None:
    """Raise ValueError if log-probs have been rounded to half precision.

    Args:
        name: of the field, for the message.
        value: its values, or None.
    """
    if value is not None and value.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name}: got {value.dtype}, needs float32; if the model's wrapper rounds it (FSDP),"
            " call `model(**past_wrappers(batch))` of `integrations.past_wrappers`"
        )
