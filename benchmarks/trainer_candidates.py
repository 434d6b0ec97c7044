"""Who takes the trainer step: each trainer as built from a setup, with its own collator.

TRL computes DPO's log-probs in tiles by itself and offers no other way (on a CPU over all rows, on
a GPU over the labelled ones); `use_liger_kernel` no longer changes its head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.shapes import IGNORE_INDEX
from benchmarks.trainer_setups import (
    BETA,
    Setup,
    arguments,
    lora_config,
    make_features,
    make_model,
    make_tokenizer,
    set_adapter,
    trained,
)

Builder = Callable[[Setup, Path, str], Any]
_PART = 2**22


@dataclass(frozen=True)
class Taken:
    """One step: its loss, and the norm of all gradients where it was asked for."""

    loss: float
    gradient_norm: float | None


class Stepper:
    """A trainer, its optimizer and its batch.

    Args:
        name: of `TRAINERS`.
        setup: model and batch.
        folder: for the trainer's output, which stays empty.
        device: "cpu" or "cuda".
    """

    def __init__(self, name: str, setup: Setup, folder: Path, device: str = "cpu") -> None:
        self.trainer = TRAINERS[name](setup, folder, device)
        if setup.trains == "adapter":
            set_adapter(self.trainer.model)
        self.optimizer = self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1
        self.batch = self.trainer.data_collator(make_features(setup))
        self._short = self.trainer.data_collator(make_features(setup, length=8))

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of a step."""
        return sum(parameter.nbytes for parameter in trained(self.trainer.model))

    def warm_up(self) -> None:
        """A step on a few tokens, so that libraries are loaded; nothing of it stays."""
        self.trainer.training_step(self.trainer.model, dict(self._short))
        self.optimizer.zero_grad()

    def step(self, *, check: bool = False) -> Taken:
        """Forward, backward and update of a whole step, as the trainer takes it."""
        loss = self.trainer.training_step(self.trainer.model, dict(self.batch))
        norm = _gradient_norm(self.trainer.model) if check else None
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Taken(float(loss), norm)


def _gradient_norm(model: Any) -> float:
    """In fp32, a part at a time: the norm must not be what the step's memory peaks at."""
    gradients = [value.grad.flatten() for value in trained(model) if value.grad is not None]
    parts = (part.float() for gradient in gradients for part in gradient.split(_PART))
    return math.sqrt(sum(float(part.norm()) ** 2 for part in parts))


def _model(setup: Setup, device: str) -> Any:
    model = make_model(setup, device)
    if setup.trains == "all":
        return model
    from peft import get_peft_model

    return get_peft_model(model, lora_config(), autocast_adapter_dtype=False)


def _eager(setup: Setup, folder: Path, device: str) -> Any:
    """transformers' trainer and the loss that a tutorial writes: through the model's logits."""
    from transformers import Trainer, TrainingArguments

    from fused_prefopt.data import PairCollator

    class EagerTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            return _eager_loss(model, inputs)

    options = {**arguments(folder, setup, device), "remove_unused_columns": False}
    return EagerTrainer(
        _model(setup, device),
        args=TrainingArguments(**options),
        data_collator=PairCollator(pad_token_id=0),
    )


def _eager_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    ids = batch["input_ids"]
    labels = ids.masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)[:, 1:]
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
    logps = logits.float().log_softmax(-1)
    picked = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    sums = (picked * (labels != IGNORE_INDEX)).sum(-1)
    chosen, rejected = (sums - _reference(batch)).chunk(2)
    return -functional.logsigmoid(BETA * (chosen - rejected)).mean()


def _reference(batch: dict[str, Tensor]) -> Tensor:
    """(2 B,) reference sums, under the name that the collator gives them."""
    if "reference" in batch:
        return batch["reference"]
    return torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])


def _preference(setup: Setup, folder: Path, device: str) -> Any:
    from transformers import TrainingArguments

    from fused_prefopt import PreferenceLoss
    from fused_prefopt.data import PairCollator
    from fused_prefopt.integrations.transformers import PreferenceTrainer

    options = arguments(folder, setup, device)
    options |= {"remove_unused_columns": False, "label_names": ["completion_mask"]}
    return PreferenceTrainer(
        _model(setup, device),
        args=TrainingArguments(**options),
        data_collator=PairCollator(pad_token_id=0),
        loss_fn=PreferenceLoss("dpo", beta=BETA),
    )


def _trl(ours: bool, setup: Setup, folder: Path, device: str) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    base: Any = DPOTrainer
    config: Any = DPOConfig
    if ours:
        from fused_prefopt.integrations.trl import FusedDPOConfig, FusedDPOTrainer

        base, config = FusedDPOTrainer, FusedDPOConfig

    class GivenTokens(base):
        """On tokens and reference log-probs that the data set has already."""

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
            return dataset

    options = arguments(folder, setup, device) | {"beta": BETA, "precompute_ref_log_probs": True}
    return GivenTokens(
        _model(setup, device),
        args=config(**options, max_length=None),
        train_dataset=Dataset.from_list(make_features(setup)),
        processing_class=make_tokenizer(),
    )


EAGER = "Trainer, eager DPO"
# The eager one first: the others are compared with its step.
TRAINERS: dict[str, Builder] = {
    EAGER: _eager,
    "ours: PreferenceTrainer": _preference,
    "ours: FusedDPOTrainer": partial(_trl, True),
    "TRL DPOTrainer": partial(_trl, False),
}
