"""Batches, steps and checkpoints of a trainer with an attached loss, as mixins: all stay exact."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_prefopt.data.columns import COMPLETION_MASK
from fused_prefopt.data.labels import LabelCounts
from fused_prefopt.integrations.fsdp1 import named_as_saved
from fused_prefopt.models.model_call import exact_fields, exact_loss, past_wrappers, unwrapped
from fused_prefopt.models.peft_head import require_saved_whole

if TYPE_CHECKING:
    from fused_prefopt.integrations.attach import Attachment
    from fused_prefopt.integrations.sequence_parallel import SharedBatches

LOSS_STATE = "preference_loss.pt"


class KeepsLossState:
    """Mixin for a `transformers.Trainer` with an `attachment`: saves and restores its loss.

    It tells the loss how many batches make a step of the optimizer, and loads weights that a
    checkpoint holds by other names than the model, as those of models that see images, of which
    transformers' trainer only warns: training would go on without them.

    Raises:
        ValueError: training resumes from, or ends with, the statistics of a loss of another kind or
            size, or an adapter would be loaded that its checkpoints do not hold whole.
    """

    attachment: Attachment
    args: Any
    model: Any
    state: Any
    _loaded_from: str
    current_gradient_accumulation_steps: int

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's own; the loss's statistics know of the step that it is a part of."""
        statistics = self.attachment.loss_fn.statistics
        if statistics is not None:
            statistics.batches_per_step = self.current_gradient_accumulation_steps
        found: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        require_saved_whole("resume_from_checkpoint", self.model if model is None else model)
        self._loaded_from = resume_from_checkpoint
        with named_as_saved(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        require_saved_whole("load_best_model_at_end", self.model)
        self._loaded_from = self.state.best_model_checkpoint
        with named_as_saved(self.model):
            super()._load_best_model()  # type: ignore[misc]
        self._load_loss(self.state.best_model_checkpoint, "those of the last step stay")

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if not (load_result.missing_keys and load_result.unexpected_keys):
            super()._issue_warnings_after_load(load_result)  # type: ignore[misc]
            return
        model: Any = unwrapped(self.model)
        saved = type(model).from_pretrained(self._loaded_from, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with named_as_saved(self.model):
            super()._save(*args, **kwargs)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Under FSDP the weights to resume from are saved here, too.
        with named_as_saved(self.model):
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.args.should_save:
            torch.save(self.attachment.loss_fn.state_dict(), Path(output_dir) / LOSS_STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self._load_loss(checkpoint, "the statistics start empty")

    def _load_loss(self, checkpoint: str, otherwise: str) -> None:
        path, loss_fn = Path(checkpoint) / LOSS_STATE, self.attachment.loss_fn
        if not path.is_file():
            if loss_fn.statistics is not None:
                warnings.warn(f"{path}: not found, {otherwise}", stacklevel=3)
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        try:
            loss_fn.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"{path}: got the statistics of another loss, needs those of {loss_fn.extra_repr()}"
            ) from error


class PreparesExactly:
    """Mixin for a `transformers.Trainer`: what it makes of its batches leaves their fields alone.

    DeepSpeed's cast would round them; every `Trainer` makes mappings anew, of their items.
    """

    args: Any

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = super()._prepare_inputs(inputs)  # type: ignore[misc]
        if COMPLETION_MASK in inputs:
            for name, value in exact_fields(inputs).items():
                prepared[name] = value.to(self.args.device)
            for name, value in inputs.items():
                if isinstance(value, LabelCounts):
                    prepared[name] = value
        return prepared


class TakesLossAlone:
    """Mixin for a trainer whose every batch becomes the attached loss: no logits are built.

    In front of `WeighsBatches`, which weighs the loss, and `MindsNonfinite`, which judges it.
    """

    shared: SharedBatches
    weighed: Any
    judge_before_backward: Any
    compute_loss_context_manager: Any

    def of_loss(self, model: Any, inputs: Any) -> dict[str, Any]:
        """A batch of the collator as the loss takes it, with what the reference gives.

        Args:
            model: the policy, in its wrappers.
            inputs: of the collator, where they are to be.
        """
        raise NotImplementedError

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The fused loss of a batch."""
        arguments = past_wrappers(self.of_loss(model, inputs))
        outputs = model(**arguments)
        loss = exact_loss(outputs["loss"], arguments)
        self.shared.before_backward(loss)
        loss = self.weighed(loss)
        self.judge_before_backward(model, loss)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss alone: there are no logits to return."""
        inputs = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None
