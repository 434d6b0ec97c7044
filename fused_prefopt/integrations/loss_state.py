"""A loss's statistics beside the optimizer's state in a trainer's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fused_prefopt.integrations.transformers import Attachment

_FILE = "preference_loss.pt"


class KeepsLossState:
    """Mixin for a `transformers.Trainer` with an `attachment`: saves and restores its loss."""

    attachment: Attachment
    args: Any

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.args.should_save:
            torch.save(self.attachment.loss_fn.state_dict(), Path(output_dir) / _FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None and (Path(checkpoint) / _FILE).is_file():
            state = torch.load(Path(checkpoint) / _FILE, weights_only=True)
            self.attachment.loss_fn.load_state_dict(state)
