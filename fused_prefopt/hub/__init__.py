"""Log-probs, entropies and KL divergences of an LM head without logits in memory.

The front of the package for the Hugging Face kernel hub: `fused-prefopt hub` writes this file, what
it imports and what that imports as a tree of its own.
"""

from fused_prefopt.hub import layers
from fused_prefopt.ops.kept_buffer import release_workspace
from fused_prefopt.ops.kl import SequenceKl, sequence_kl
from fused_prefopt.ops.logps import sequence_logps, token_logps, token_policy, token_statistics
from fused_prefopt.types import (
    LMHead,
    LowRank,
    Plan,
    SequenceLogps,
    TokenPolicy,
    TokenStatistics,
)

__all__ = [
    "LMHead",
    "LowRank",
    "Plan",
    "SequenceKl",
    "SequenceLogps",
    "TokenPolicy",
    "TokenStatistics",
    "layers",
    "release_workspace",
    "sequence_kl",
    "sequence_logps",
    "token_logps",
    "token_policy",
    "token_statistics",
]
