"""Public ops and, below them, the planner, the registered ops, the paths and the engines."""

from fused_prefopt.ops.engines import takes_kernels
from fused_prefopt.ops.kept_buffer import release_workspace
from fused_prefopt.ops.kl import SequenceKl, sequence_kl
from fused_prefopt.ops.logps import (
    sequence_logps,
    shared_and_tail_logps,
    token_logps,
    token_policy,
    token_statistics,
)
from fused_prefopt.types import Plan

__all__ = [
    "Plan",
    "SequenceKl",
    "release_workspace",
    "sequence_kl",
    "sequence_logps",
    "shared_and_tail_logps",
    "takes_kernels",
    "token_logps",
    "token_policy",
    "token_statistics",
]
