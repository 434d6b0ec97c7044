"""Reference log-probs of a batch, from another model or from the policy without its adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fused_prefopt.integrations.causal_lm import lm_head_of, unwrapped
from fused_prefopt.integrations.collated import collated_rows, completion_logps
from fused_prefopt.integrations.evaluating import evaluating
from fused_prefopt.integrations.fronted_forward import (
    has_front,
    let_wrappers_follow,
    put_in_front,
)
from fused_prefopt.integrations.past_wrappers import (
    BESIDE_KEY,
    Beside,
    batch_behind,
    past_wrappers,
    without_beside,
)
from fused_prefopt.reference import Collator, Feature, add_reference_logps
from fused_prefopt.types import LMHead

# As what a model is asked for: the rows that its head would meet.
_HIDDEN = {"hidden": True}


@torch.no_grad()
def logps_through(model: nn.Module, batch: Mapping[str, Any], **wanted: Any) -> dict[str, Tensor]:
    """What ``completion_logps(model, batch, **wanted)`` returns, through the model's wrappers.

    Their hooks (DDP's, FSDP's, DeepSpeed's, PEFT's) gather sharded weights; what they would round
    goes past them.

    Args:
        model: causal language model, wrapped or not.
        batch: as in `collated_rows`.
        **wanted: options of `completion_logps`.
    """
    inner = unwrapped(model)
    if not has_front(inner):
        put_in_front(inner, _answer_or_go_on)
    let_wrappers_follow(model)
    arguments = past_wrappers(batch, wanted)
    model(**arguments)
    found: dict[str, Tensor] = arguments[BESIDE_KEY].found
    return found


def answered(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Answer a call of `logps_through`; None if it is another's.

    Args:
        model: causal language model without wrappers.
        arguments: of the call.
    """
    beside: Beside | None = arguments.get(BESIDE_KEY)
    if beside is None or beside.wanted is None:
        return None
    batch = batch_behind(arguments)
    if beside.wanted == _HIDDEN:
        beside.found["hidden"] = collated_rows(model, batch, prompt=False).hidden
    else:
        beside.found |= completion_logps(model, batch, **beside.wanted)
    return beside.found


def place(model: nn.Module, device: torch.device) -> None:
    """Move a model to an accelerator, unless another has placed it.

    A model stays where it is if it is sharded, partitioned, dispatched, quantised, without values
    or in several places, and none goes to the CPU.

    Args:
        model: a reference.
        device: of its batches.
    """
    values = list(model.parameters())
    plain = all(type(value) is nn.Parameter and not hasattr(value, "ds_id") for value in values)
    devices = {value.device for value in values}
    if device.type == "cpu" or not plain or hasattr(model, "hf_device_map"):
        return
    if len(devices) == 1 and not devices & {device, torch.device("meta")}:
        model.to(device)


def _answer_or_go_on(
    model: nn.Module, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    found = answered(model, kwargs)
    return own(*args, **without_beside(kwargs)) if found is None else found


class Reference:
    """What a policy is compared with.

    Args:
        policy: the model that trains.
        source: another model, or "adapter": the policy itself without its PEFT adapters.
        **options: of `completion_logps`, such as `workspace_mb`.

    Raises:
        ValueError: `source` is "adapter" and the policy has none, or another string.
    """

    def __init__(
        self,
        policy: nn.Module,
        source: nn.Module | str,
        **options: Any,
    ) -> None:
        self._options = options
        self._peft: Any = None
        if isinstance(source, str):
            if source != "adapter":
                raise ValueError(
                    f"reference: got {source!r}, needs 'adapter', 'precomputed' or a model"
                )
            self._peft = _peft_of(policy)
        self.model: nn.Module = source if isinstance(source, nn.Module) else self._peft
        self._is_placed = self._peft is not None
        # The policy asks itself inside its own forward: its wrappers are at work already, and
        # the autocast that accelerate puts there cannot be entered twice.
        self._asked = self.model if self._peft is None else unwrapped(self._peft)

    def logps(self, batch: Mapping[str, Any], *, prompt: bool) -> dict[str, Tensor]:
        """`reference`, and `prompt_reference` where prompts are wanted, (S,) fp32 in nats."""
        self.place(batch["input_ids"].device)
        with self.active():
            sums = logps_through(self._asked, batch, prompt=prompt, **self._options)
        names = {"completion": "reference", "prompt": "prompt_reference"}
        return {names[part]: values for part, values in sums.items()}

    def hidden(self, batch: Mapping[str, Any]) -> Tensor:
        """The rows that the head would meet, (S, L, D) or packed (N, D)."""
        self.place(batch["input_ids"].device)
        with self.active():
            return logps_through(self._asked, batch, **_HIDDEN)["hidden"]

    def head(self) -> LMHead:
        """Its head, which must be whole here (of the policy's own: inside the policy's head)."""
        with self.active():
            return lm_head_of(self.model)

    def add_logps(
        self, features: Sequence[Feature], collator: Collator, **options: Any
    ) -> list[dict[str, Any]]:
        """`add_reference_logps` with this reference."""
        with self.active():
            return add_reference_logps(self.model, features, collator, **options)

    def place(self, device: torch.device) -> None:
        """Move a model of its own to where its batches are, as `place` does, the first time."""
        if not self._is_placed:
            place(self.model, device)
            self._is_placed = True

    @contextmanager
    def active(self) -> Iterator[None]:
        """The reference in eval mode, its adapters off where it is the policy."""
        off: AbstractContextManager[Any]
        off = nullcontext() if self._peft is None else self._peft.disable_adapter()
        with evaluating(self.model), off:
            yield


def _peft_of(model: nn.Module) -> nn.Module:
    inner: Any = model
    while isinstance(inner, nn.Module):
        if callable(getattr(inner, "disable_adapter", None)):
            return inner
        inner = getattr(inner, "module", None)
    raise ValueError(f"reference: got 'adapter' with a {type(model).__name__}, needs a PeftModel")
