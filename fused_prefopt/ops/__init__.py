"""The public op and, below it, the planner, the registered op, the paths and the engine."""

from fused_prefopt.ops.logps import sequence_logps, token_logps
from fused_prefopt.ops.plan import Plan

__all__ = ["Plan", "sequence_logps", "token_logps"]
