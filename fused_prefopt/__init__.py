"""Preference-optimisation losses fused with the LM head: no logits in memory."""

from fused_prefopt.losses import available_losses, bradley_terry_loss, preset
from fused_prefopt.ops import (
    Plan,
    release_workspace,
    sequence_logps,
    token_logps,
    token_statistics,
)
from fused_prefopt.preference import PreferenceLoss
from fused_prefopt.types import (
    LMHead,
    LogpBatch,
    LossOutput,
    LowRank,
    SequenceLogps,
    TokenStatistics,
)

__all__ = [
    "LMHead",
    "LogpBatch",
    "LossOutput",
    "LowRank",
    "Plan",
    "PreferenceLoss",
    "SequenceLogps",
    "TokenStatistics",
    "available_losses",
    "bradley_terry_loss",
    "preset",
    "release_workspace",
    "sequence_logps",
    "token_logps",
    "token_statistics",
]
__version__ = "0.1.0"
