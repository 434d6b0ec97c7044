"""Liger's kernels beside an attached loss."""

from __future__ import annotations

from typing import Any


def leave_out_ligers_loss(args: Any) -> None:
    """With ``use_liger_kernel`` keep Liger's kernels of layers, and not its fused loss.

    That one comes with a forward of its own, which a trainer puts in the model's place when
    training starts: in place of an attached one.

    Args:
        args: of a `transformers.Trainer`; its `liger_kernel_config` is changed.
    """
    if args.use_liger_kernel:
        config = args.liger_kernel_config or {}
        args.liger_kernel_config = {**config, "fused_linear_cross_entropy": False}
