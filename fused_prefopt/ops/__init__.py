"""The public op and, below it, the planner, the registered op, the paths and the engines."""

from fused_prefopt.ops.engines import takes_kernels
from fused_prefopt.ops.kept_buffer import release_workspace
from fused_prefopt.ops.logps import sequence_logps, token_logps, token_policy
from fused_prefopt.ops.plan import Plan
from fused_prefopt.ops.sequence_kl import SequenceKl, sequence_kl
from fused_prefopt.ops.token_statistics import token_statistics

__all__ = [
    "Plan",
    "SequenceKl",
    "release_workspace",
    "sequence_kl",
    "sequence_logps",
    "takes_kernels",
    "token_logps",
    "token_policy",
    "token_statistics",
]
