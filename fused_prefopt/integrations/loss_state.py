"""A loss's statistics beside the optimizer's state in a trainer's checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fused_prefopt.integrations.virtual_tokens import require_saved_whole

if TYPE_CHECKING:
    from fused_prefopt.integrations.attachment import Attachment

LOSS_STATE = "preference_loss.pt"


class KeepsLossState:
    """Mixin for a `transformers.Trainer` with an `attachment`: saves and restores its loss.

    Raises:
        ValueError: training resumes from the statistics of a loss of another kind or size, or an
            adapter would be loaded that its checkpoints do not hold whole.
    """

    attachment: Attachment
    args: Any
    model: Any

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        require_saved_whole("resume_from_checkpoint", self.model if model is None else model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        require_saved_whole("load_best_model_at_end", self.model)
        super()._load_best_model()  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.args.should_save:
            torch.save(self.attachment.loss_fn.state_dict(), Path(output_dir) / LOSS_STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        path, loss_fn = Path(checkpoint) / LOSS_STATE, self.attachment.loss_fn
        if not path.is_file():
            if loss_fn.statistics is not None:
                warnings.warn(f"{path}: not found, the statistics start empty", stacklevel=2)
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        try:
            loss_fn.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"{path}: got the statistics of another loss, needs those of {loss_fn}"
            ) from error
