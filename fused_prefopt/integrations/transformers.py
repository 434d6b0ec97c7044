"""transformers: compute the loss inside `model.forward`, log it with `Trainer`'s own log.

Inside `forward` the hooks of DDP, FSDP and DeepSpeed are alive, gradient accumulation stays
exact, and no logits are built: the head meets the labelled rows only.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from fused_prefopt.data import labels_of, prompt_labels_of
from fused_prefopt.integrations.causal_lm import (
    backbone_of,
    last_hidden,
    lm_head_of,
    through_head,
    unwrapped,
)
from fused_prefopt.integrations.loss_state import KeepsLossState
from fused_prefopt.integrations.shared_prompt import shared_hidden
from fused_prefopt.preference import PreferenceLoss
from fused_prefopt.types import LMHead, LossOutput

# A batch that carries this key is a preference batch; any other goes the model's own way.
PREFERENCE_KEY = "completion_mask"
_FIELDS = (
    "reference",
    "rewards",
    "desirable",
    "kl",
    "prompt_reference",
    "groups",
    "sequence_kl",
)


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
    shared = "segments" in batch
    hidden = shared_hidden(model, batch) if shared else last_hidden(model, batch)
    labels, extras = labels_of(batch), {name: batch.get(name) for name in _FIELDS}
    if "ref_chosen_logps" in batch:
        halves = (batch["ref_chosen_logps"], batch["ref_rejected_logps"])
        extras["reference"] = torch.cat(halves)
    prompt_labels = prompt_labels_of(batch) if "prompt" in loss_fn.loss.needs else None
    if shared:
        if prompt_labels is not None:
            raise ValueError(f"shared_prompt: {loss_fn.name} needs the prompt of each sequence")
        labels, sequences = batch["targets"], 2 * batch["input_ids"].shape[0]
        extras |= {"sequence_ids": batch["target_sequences"], "num_sequences": sequences}
    if "sequence_ids" in batch:
        hidden, labels = hidden[0], labels[0]
        prompt_labels = None if prompt_labels is None else prompt_labels[0]
        extras["sequence_ids"] = batch["sequence_ids"][0]
        extras["num_sequences"] = batch["num_sequences"]

    def run(hidden: Tensor, head: LMHead) -> LossOutput:
        return loss_fn(
            hidden, head, labels, shift=not shared, prompt_labels=prompt_labels, **extras
        )

    return through_head(model, hidden, run)


class Attachment:
    """A loss attached to a model; made by `attach`.

    Attributes:
        loss_fn: the loss; it follows the model's train and eval mode.
    """

    def __init__(self, model: nn.Module, loss_fn: PreferenceLoss) -> None:
        self.loss_fn = loss_fn
        self._model = unwrapped(model)
        self._forward = self._model.forward
        self._means = {"train": _Means(), "eval": _Means()}

        @functools.wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get(PREFERENCE_KEY) is None:
                return self._forward(*args, **kwargs)
            self.loss_fn.train(self._model.training)
            output = preference_outputs(self._model, self.loss_fn, kwargs)
            self._means["train" if self._model.training else "eval"].add(output.metrics)
            return {"loss": output.loss}

        self._model.forward = forward

    def detach(self) -> None:
        """Give the model its own forward back."""
        del self._model.forward

    def pop_metrics(self, mode: str) -> dict[str, float]:
        """Means of the metrics over the steps since the last call and all ranks; forgets them.

        Every rank must make the call.

        Args:
            mode: "train" or "eval".
        """
        return self._means[mode].pop()


class _Means:
    """Means of metrics, summed on their own device so that no step waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def pop(self) -> dict[str, float]:
        own = {name: float(total) for name, total in self._sums.items()}, self._count
        self._sums, self._count = {}, 0
        ranks = [own]
        if dist.is_available() and dist.is_initialized():
            # As objects: a rank without a batch has no names to agree on.
            ranks = [own] * dist.get_world_size()
            dist.all_gather_object(ranks, own)
        count = max(1, sum(steps for _, steps in ranks))
        names = dict.fromkeys(name for sums, _ in ranks for name in sums)
        return {name: sum(sums.get(name, 0.0) for sums, _ in ranks) / count for name in names}


def attach(model: nn.Module, loss_fn: PreferenceLoss) -> Attachment:
    """Let `model.forward` return the preference loss of batches that carry `completion_mask`.

    Use it with ``TrainingArguments(remove_unused_columns=False, label_names=["completion_mask"])``
    and a collator of `fused_prefopt.data`; other batches go the model's own way.

    Args:
        model: any Hugging Face causal language model, PEFT-wrapped ones too.
        loss_fn: the loss; it is moved to the model's device.

    Raises:
        ValueError: the model's head or backbone cannot be told apart or read.
    """
    lm_head_of(model), backbone_of(model)
    loss_fn.to(next(model.parameters()).device)
    return Attachment(model, loss_fn)


class PreferenceTrainer(KeepsLossState, Trainer):
    """`transformers.Trainer` with a preference loss attached to its model.

    It logs the loss's metrics by TRL's names and saves the loss's statistics beside the
    optimizer's state.

    Args:
        loss_fn: the loss.
        *args, **kwargs: of `transformers.Trainer`; `args` needs ``remove_unused_columns=False``
            and ``label_names=["completion_mask"]``.

    Raises:
        ValueError: `args` would drop or mistake the batch's columns.
    """

    def __init__(self, *args: Any, loss_fn: PreferenceLoss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.remove_unused_columns or self.label_names != [PREFERENCE_KEY]:
            raise ValueError(
                "args: wanted remove_unused_columns=False and"
                f" label_names=[{PREFERENCE_KEY!r}], got {self.args.remove_unused_columns} and"
                f" {self.label_names}"
            )
        self.attachment = attach(self.model, loss_fn)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the metrics since the last log; evaluation's have the prefix `eval_`."""
        in_eval = any(name.startswith("eval_") for name in logs)
        metrics = self.attachment.pop_metrics("eval" if in_eval else "train")
        prefix = "eval_" if in_eval else ""
        logs.update({f"{prefix}{name}": value for name, value in metrics.items()})
        super().log(logs, *args, **kwargs)
