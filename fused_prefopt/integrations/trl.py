"""TRL: its DPO trainer, with any pairwise loss of this package computed by the fused op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from fused_prefopt.integrations.loss_state import KeepsLossState
from fused_prefopt.integrations.transformers import attach
from fused_prefopt.preference import PreferenceLoss

SCORES = ("score_chosen", "score_rejected")


@dataclass
class FusedDPOConfig(DPOConfig):
    """`trl.DPOConfig` with a loss of this package; TRL's own loss options have no effect.

    Args:
        loss: name of a pairwise loss; see `fused_prefopt.available_losses()`.
        loss_kwargs: its hyperparameters.
        workspace_mb: budget of the op in MiB.
        engine: of the op; `auto`, `torch`, `cublas` or `triton`.
    """

    loss: str = field(default="dpo", metadata={"help": "Name of a pairwise loss."})
    # A string of JSON on the command line, as transformers reads its own dictionaries.
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Hyperparameters of the loss."}
    )
    workspace_mb: float = field(default=256, metadata={"help": "Workspace of the op in MiB."})
    engine: str = field(default="auto", metadata={"help": "Engine of the op."})

    _VALID_DICT_FIELDS = [*getattr(DPOConfig, "_VALID_DICT_FIELDS", []), "loss_kwargs"]

    def build_loss(self) -> PreferenceLoss:
        """The loss that the configuration names.

        Raises:
            ValueError: there is no such loss, or it is not pairwise.
            TypeError: it has no such hyperparameter.
        """
        options: dict[str, Any] = self.loss_kwargs or {}  # type: ignore[assignment]
        loss_fn = PreferenceLoss(
            self.loss, workspace_mb=self.workspace_mb, engine=self.engine, **options
        )
        if not loss_fn.loss.pairwise:
            raise ValueError(f"loss: {self.loss!r} is point-wise, wanted one on pairs")
        return loss_fn


class FusedDPOTrainer(KeepsLossState, DPOTrainer):
    """`trl.DPOTrainer` whose loss is one of this package's, computed without logits.

    TRL's datasets, collation, reference handling (model, adapter switch, precomputed), PEFT and
    logging stay as they are; score columns `score_chosen` and `score_rejected` reach the loss as
    `rewards`. A loss without a reference keeps no reference model. Its metrics are logged instead
    of TRL's, by TRL's names; its statistics are saved with the optimizer.

    Args:
        *args, **kwargs: of `trl.DPOTrainer`, with `args` a `FusedDPOConfig`.

    Raises:
        ValueError: `args` is no `FusedDPOConfig`, or names an unknown or point-wise loss.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("args") or next((a for a in args if isinstance(a, DPOConfig)), None)
        if not isinstance(config, FusedDPOConfig):
            raise ValueError(f"args: got {type(config).__name__}, wanted a FusedDPOConfig")
        loss_fn = config.build_loss()
        self.needs_reference = "reference" in loss_fn.loss.needs
        if not self.needs_reference:
            # TRL then loads no reference model; there is nothing to compute either.
            config.precompute_ref_log_probs = True
        super().__init__(*args, **kwargs)
        if not self.needs_reference:
            config.precompute_ref_log_probs = self.precompute_ref_logps = False
        self.data_collator: Any = _WithScores(self.data_collator)
        self.attachment = attach(self.accelerator.unwrap_model(self.model), loss_fn)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The fused loss of a batch from TRL's collator.

        Raises:
            ValueError: the loss needs scores that the data set does not have.
        """
        batch = dict(inputs)
        given = "ref_chosen_logps" in batch
        if self.needs_reference and not given:
            logps = self.compute_ref_log_probs(self.ref_model or model, inputs)
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = logps
        outputs = model(**batch)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss alone: there are no logits to return."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss's metrics since the last log, means over steps and ranks."""
        mode = "train" if self.model.training else "eval"
        for name, value in self.attachment.pop_metrics(mode).items():
            self._metrics[mode][name] = [value]
        super().log(logs, start_time)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if not self.needs_reference:
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in SCORES if name not in self._signature_columns]


@dataclass
class _WithScores:
    """A collator of TRL's that also stacks the score columns, where the examples have them."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        if all(name in examples[0] for name in SCORES):
            scores = [float(example[name]) for name in SCORES for example in examples]
            batch["rewards"] = torch.tensor(scores)
        return batch
