"""Reference log-probs of a batch, from another model or from the policy without its adapters."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fused_prefopt.integrations.causal_lm import lm_head_of, unwrapped
from fused_prefopt.integrations.collated import collated_rows, completion_logps
from fused_prefopt.reference import Collator, Feature, add_reference_logps
from fused_prefopt.types import LMHead

# A batch that carries this key is answered with log-probs.
LOGPS_KEY = "wanted_logps"
_MARK = "_answers_logps"


def answer_logps(model: nn.Module) -> None:
    """Let ``model(**batch, wanted_logps=options)`` return ``completion_logps(model, batch, …)``.

    The call goes through the model's wrappers (DDP, FSDP, DeepSpeed, PEFT), whose hooks gather
    sharded weights. With ``wanted_logps={"hidden": True}`` it returns the rows that the head
    would meet. Other calls go the model's own way. To do it twice is to do it once.

    Args:
        model: causal language model, wrapped or not.
    """
    model = unwrapped(model)
    if hasattr(model, _MARK):
        return
    own = model.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.pop(LOGPS_KEY, None)
        if wanted is None:
            return own(*args, **kwargs)
        if "hidden" in wanted:
            return {"hidden": collated_rows(model, kwargs, prompt=False).hidden}
        return completion_logps(model, kwargs, **wanted)

    model.forward = forward
    setattr(model, _MARK, True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
        answer_logps(self.model)

    def logps(self, batch: Mapping[str, Any], *, prompt: bool) -> dict[str, Tensor]:
        """`reference`, and `prompt_reference` where prompts are wanted, (S,) fp32 in nats."""
        wanted = {"prompt": prompt, **self._options}
        with self.active():
            sums = self.model(**batch, **{LOGPS_KEY: wanted})
        names = {"completion": "reference", "prompt": "prompt_reference"}
        return {names[part]: values for part, values in sums.items()}

    @torch.no_grad()
    def hidden(self, batch: Mapping[str, Any]) -> Tensor:
        """The rows that the head would meet, (S, L, D) or packed (N, D)."""
        with self.active():
            found: dict[str, Tensor] = self.model(**batch, **{LOGPS_KEY: {"hidden": True}})
        return found["hidden"]

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
