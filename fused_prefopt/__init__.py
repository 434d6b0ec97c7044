"""Preference-optimisation losses fused with the LM head: no logits in memory."""

from fused_prefopt.losses import (
    available_losses,
    bradley_terry_loss,
    preset,
    published_settings,
)
from fused_prefopt.ops import (
    SequenceKl,
    release_workspace,
    sequence_kl,
    sequence_logps,
    token_logps,
    token_policy,
    token_statistics,
)
from fused_prefopt.ops.logps import shared_and_tail_logps
from fused_prefopt.preference import PreferenceLoss
from fused_prefopt.types import (
    LMHead,
    LogpBatch,
    LossOutput,
    LowRank,
    Plan,
    SequenceLogps,
    TokenPolicy,
    TokenStatistics,
)

__all__ = [
    "LMHead",
    "LogpBatch",
    "LossOutput",
    "LowRank",
    "Plan",
    "PreferenceLoss",
    "SequenceKl",
    "SequenceLogps",
    "TokenPolicy",
    "TokenStatistics",
    "available_losses",
    "bradley_terry_loss",
    "preset",
    "published_settings",
    "release_workspace",
    "sequence_kl",
    "sequence_logps",
    "shared_and_tail_logps",
    "token_logps",
    "token_policy",
    "token_statistics",
]
__version__ = "0.2.0"
