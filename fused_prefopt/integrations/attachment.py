"""A preference loss inside a model's own forward."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fused_prefopt.integrations.causal_lm import through_head, unwrapped
from fused_prefopt.integrations.collated import collated_rows, given_fields
from fused_prefopt.integrations.reference_pass import LOGPS_KEY, Reference
from fused_prefopt.integrations.router_loss import wants_router_loss
from fused_prefopt.integrations.step_metrics import StepMetrics
from fused_prefopt.integrations.token_metrics import Weighed, token_metrics
from fused_prefopt.preference import PreferenceLoss
from fused_prefopt.types import LMHead, LossOutput

# A batch that carries this key is a preference batch; any other goes the model's own way.
PREFERENCE_KEY = "completion_mask"
# Fields that a reference gives.
OF_REFERENCE = frozenset({"reference", "prompt_reference", "sequence_kl"})
# A reference, and its rows of the batch.
Compared = tuple[Reference, Tensor]


def preference_outputs(
    model: nn.Module, loss_fn: PreferenceLoss, batch: Mapping[str, Any]
) -> LossOutput:
    """Backbone, then loss, of a batch from `PairCollator` or `PointCollator`.

    Args:
        model: causal language model with a backbone and an output embedding.
        loss_fn: which loss.
        batch: `input_ids`, `completion_mask`, `attention_mask` or `position_ids`, and the extras
            that the collators document; padded (S, L) or packed (1, N).

    Raises:
        ValueError: the loss needs a field that the batch does not have.
    """
    return _outputs(model, loss_fn, batch, given_fields(batch), of_tokens=False)[0]


class Attachment:
    """A loss attached to a model; made by `integrations.transformers.attach`.

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
        self._model = unwrapped(model)
        self._before = self._model.__dict__.get("forward")
        self._forward = self._model.forward
        self._metrics = {"train": StepMetrics(), "eval": StepMetrics()}

        @functools.wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get(PREFERENCE_KEY) is None or LOGPS_KEY in kwargs:
                return self._forward(*args, **kwargs)
            training = self._model.training
            self.loss_fn.train(training)
            extras, compared = self._with_reference(kwargs)
            output, weighed = _outputs(
                self._model,
                self.loss_fn,
                kwargs,
                extras,
                compared=compared,
                of_tokens=log_tokens,
                router_coefficient=router_coefficient,
            )
            self._metrics["train" if training else "eval"].add(*weighed)
            return {"loss": output.loss}

        self._model.forward = forward

    def detach(self) -> None:
        """Give the model back the forward that it had."""
        del self._model.forward
        if self._before is not None:
            self._model.forward = self._before

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

    def _with_reference(
        self, batch: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor | None], Compared | None]:
        extras, needs = given_fields(batch), self.loss_fn.loss.needs
        missing = {name for name in needs & OF_REFERENCE if extras[name] is None}
        if not missing or self.reference is None:
            return extras, None
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
        return loss_fn(hidden, head, rows.labels, prompt_labels=rows.prompt_labels, **given)

    output = through_head(model, rows.hidden, run)
    if rows.router is not None:
        coefficient, loss = rows.router
        if router_coefficient is not None:
            coefficient = router_coefficient
        metrics = output.metrics | {"aux_loss": loss.detach()}
        output = replace(output, loss=output.loss + coefficient * loss, metrics=metrics)
    weights = _weights(output, desirable) | tokens[1]
    return output, (output.metrics | tokens[0], weights)


def _weights(output: LossOutput, desirable: Tensor | None) -> dict[str, Tensor]:
    """How many pairs or completions each metric is a mean over."""
    every = torch.tensor(output.losses.shape[-1], device=output.losses.device)
    weights = dict.fromkeys(output.metrics, every)
    if desirable is not None:
        members = {"chosen": desirable.sum(), "rejected": desirable.logical_not().sum()}
        for name in weights:
            side = name.rpartition("/")[2]
            weights[name] = members.get(side, weights[name])
    return weights
