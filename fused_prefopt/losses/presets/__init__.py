"""All registered losses: one function and one registration each, in the file of its reward."""

from fused_prefopt.losses.presets import anchored, log_probs, log_ratios, rankings, scored

__all__ = ["anchored", "log_probs", "log_ratios", "rankings", "scored"]
