"""What the passes of a training compute in."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def training_autocast(training: Any) -> AbstractContextManager[Any]:
    """Autocast as the trainer's forward passes run under it, for passes before and after them.

    A policy in bf16 beside reference log-probs in fp32 would start with a reward that is rounding.

    Args:
        training: `transformers.TrainingArguments`; without `bf16` and `fp16` the launcher decides,
            as it does for the trainer.
    """
    given = "bf16" if training.bf16 else "fp16" if training.fp16 else None
    dtype = _DTYPES.get(given or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    return nullcontext() if dtype is None else torch.autocast(training.device.type, dtype)
