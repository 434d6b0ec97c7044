"""A preference loss inside a model's own forward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fused_prefopt.integrations.causal_lm import through_head, unwrapped
from fused_prefopt.integrations.collated import collated_rows, given_fields
from fused_prefopt.integrations.fronted_forward import put_in_front, take_away
from fused_prefopt.integrations.past_wrappers import (
    BESIDE_KEY,
    PREFERENCE_KEY,
    batch_behind,
    keep_beside,
    require_exact,
    without_beside,
)
from fused_prefopt.integrations.reference_pass import Reference, answered
from fused_prefopt.integrations.router_loss import wants_router_loss
from fused_prefopt.integrations.step_metrics import StepMetrics
from fused_prefopt.integrations.token_metrics import Weighed, token_metrics
from fused_prefopt.integrations.wrappers import prompt_learners
from fused_prefopt.losses.needs import WHAT_IT_IS
from fused_prefopt.preference import PreferenceLoss
from fused_prefopt.types import LMHead, LossOutput

# Fields that a reference gives.
OF_REFERENCE = frozenset({"reference", "prompt_reference", "sequence_kl"})
# Says of a batch that its `rewards` are no data's: nothing of them is logged.
MADE_UP_KEY = "made_up_rewards"
# A reference, and its rows of the batch.
Compared = tuple[Reference, Tensor]


def preference_outputs(
    model: nn.Module, loss_fn: PreferenceLoss, batch: Mapping[str, Any]
) -> LossOutput:
    """Backbone, then loss, of a batch from `PairCollator` or `PointCollator`.

    Args:
        model: causal language model with a backbone and an output embedding, in its wrappers.
        loss_fn: which loss.
        batch: `input_ids`, `completion_mask`, `attention_mask` or `position_ids`, and the extras
            that the collators document; padded (S, L) or packed (1, N).

    Raises:
        ValueError: the loss needs a field that the batch does not have.
    """
    return _outputs(model, loss_fn, batch, given_fields(batch), of_tokens=False)[0]


def lacks_reference(loss_fn: PreferenceLoss, missing: Collection[str]) -> str:
    """What to say of rows, where no reference is at hand, that lack what one gives.

    Args:
        loss_fn: the loss.
        missing: at least one of `OF_REFERENCE`.
    """
    name = min(missing)
    ways = ["reference=<model>", "reference='adapter' (the model without its PEFT adapter)"]
    if "sequence_kl" not in missing:
        ways += [
            "reference_cache=<folder> with one of them",
            "rows with the columns of `add_reference_logps`",
        ]
    return f"{loss_fn.name} needs `{name}`: {WHAT_IT_IS[name]}; give {' or '.join(ways)}"


class Attachment:
    """A loss attached to a model; made by `integrations.transformers.attach`.

    A deep copy of the model computes the loss of its own weights, with the same `loss_fn` and
    reference, and adds to the same metrics.

    Args:
        model: causal language model.
        loss_fn: the loss.
        reference: where the reference log-probs of a batch without them come from, or None.
        log_tokens: also log `token_metrics`.
        router_coefficient: of a mixture of experts' load-balancing loss, 0 for none; None leaves
            both to the model's config.

    Attributes:
        loss_fn: the loss; it follows the model's train and eval mode.
        reference: as given.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: PreferenceLoss,
        reference: Reference | None = None,
        log_tokens: bool = False,
        router_coefficient: float | None = None,
    ) -> None:
        self.loss_fn = loss_fn
        self.reference = reference
        self._log_tokens = log_tokens
        self._router_coefficient = router_coefficient
        self._metrics = {"train": StepMetrics(), "eval": StepMetrics()}
        self._model = unwrapped(model)
        self._place = put_in_front(self._model, self._forward)
        # Their forward keeps the token ids to itself.
        self._hooks = [
            each.register_forward_pre_hook(keep_beside, with_kwargs=True)
            for each in prompt_learners(model)
        ]

    def detach(self) -> None:
        """Give the model back the forward that it had."""
        take_away(self._model, self._place)
        for hook in self._hooks:
            hook.remove()

    def pop_metrics(self, mode: str) -> dict[str, float]:
        """Means of the metrics over the steps since the last call and all ranks; forgets them.

        Of each step the mean over all ranks' pairs (completions, tokens), then the mean over the
        steps, as TRL logs them. Every rank must make the call.

        Args:
            mode: "train" or "eval".
        """
        return self._metrics[mode].pop()

    def forget_metrics(self, mode: str) -> None:
        """Drop this rank's metrics since the last `pop_metrics`.

        Args:
            mode: "train" or "eval".
        """
        self._metrics[mode].forget()

    def _forward(
        self,
        model: nn.Module,
        own: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        beside = kwargs.get(BESIDE_KEY)
        found = answered(model, kwargs)
        if found is not None:
            return found
        if kwargs.get(PREFERENCE_KEY) is None:
            return own(*args, **without_beside(kwargs))
        batch = batch_behind(kwargs)
        self.loss_fn.train(model.training)
        extras, compared = self._with_reference(batch)
        output, weighed = _outputs(
            model,
            self.loss_fn,
            batch,
            extras,
            compared=compared,
            of_tokens=self._log_tokens,
            router_coefficient=self._router_coefficient,
        )
        self._metrics["train" if model.training else "eval"].add(*weighed)
        if beside is not None:
            beside.found["loss"] = output.loss
        return {"loss": output.loss}

    def _with_reference(
        self, batch: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor | None], Compared | None]:
        extras, needs = given_fields(batch), self.loss_fn.loss.needs
        for name in OF_REFERENCE:
            require_exact(name, extras[name])
        missing = {name for name in needs & OF_REFERENCE if extras[name] is None}
        if not missing:
            return extras, None
        if self.reference is None:
            raise ValueError(lacks_reference(self.loss_fn, missing))
        if "sequence_kl" in missing:
            return extras, (self.reference, self.reference.hidden(batch))
        return extras | self.reference.logps(batch, prompt="prompt_reference" in missing), None


def _outputs(
    model: nn.Module,
    loss_fn: PreferenceLoss,
    batch: Mapping[str, Any],
    extras: Mapping[str, Tensor | None],
    *,
    compared: Compared | None = None,
    of_tokens: bool,
    router_coefficient: float | None = None,
) -> tuple[LossOutput, Weighed]:
    """The loss of a batch, and its metrics with what each is a mean over."""
    router = wants_router_loss(model) if router_coefficient is None else router_coefficient != 0
    rows = collated_rows(model, batch, prompt="prompt" in loss_fn.loss.needs, router=router)
    device = rows.hidden.device
    _move(loss_fn, device)
    extras = {name: None if value is None else value.to(device) for name, value in extras.items()}
    desirable = None if loss_fn.loss.pairwise else extras["desirable"]
    tokens: Weighed = {}, {}

    def run(hidden: Tensor, head: LMHead) -> LossOutput:
        if of_tokens:
            for kept, found in zip(
                tokens, token_metrics(loss_fn, rows, hidden, head, desirable), strict=True
            ):
                kept.update(found)
        reference: dict[str, Any] = {}
        if compared is not None:
            source, ref_hidden = compared
            reference = {"ref_hidden": ref_hidden, "ref_head": source.head()}
        given = {**rows.layout, **reference, **extras}
        if rows.prompt_labels is not None:
            given["prompt_labels"] = rows.prompt_labels
            given["num_prompt_labels"] = rows.num_prompt_labels
        return loss_fn(hidden, head, rows.labels, **given)

    output = through_head(model, rows.hidden, run)
    if rows.router is not None:
        coefficient, loss = rows.router
        if router_coefficient is not None:
            coefficient = router_coefficient
        metrics = output.metrics | {"aux_loss": loss.detach()}
        output = replace(output, loss=output.loss + coefficient * loss, metrics=metrics)
    weights = _weights(output, desirable) | tokens[1]
    if batch.get(MADE_UP_KEY):
        scores = [name for name in weights if name.startswith("reward_model/")]
        weights |= dict.fromkeys(scores, output.losses.new_zeros(()))
    return output, (output.metrics | tokens[0], weights)


def _move(loss_fn: PreferenceLoss, device: torch.device) -> None:
    """Put a loss's statistics where the hidden states are, if they are elsewhere."""
    if device.type == "mps":
        raise ValueError("model: got one on mps, needs a device that has float64 (CUDA or the CPU)")
    if any(buffer.device != device for buffer in loss_fn.buffers()):
        loss_fn.to(device)


def _weights(output: LossOutput, desirable: Tensor | None) -> dict[str, Tensor]:
    """How many pairs or completions each metric is a mean over."""
    every = output.losses.new_full((), output.losses.shape[-1], dtype=torch.int64)
    weights = dict.fromkeys(output.metrics, every)
    if desirable is not None:
        members = {"chosen": desirable.sum(), "rejected": desirable.logical_not().sum()}
        for name in weights:
            side = name.rpartition("/")[2]
            weights[name] = members.get(side, weights[name])
    return weights
