"""The scalar part of an LM head, and the dtypes that its matmuls work in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadMath:
    """The scalar part of an `LMHead`, and the dtype that its matmuls compute in.

    ``logits = bend(alpha (hidden @ weight.T + bias))`` with ``bend(x) = ceiling · tanh(x)`` under
    a softcap and ``x`` without.
    """

    softcap: float | None
    logit_scale: float
    temperature: float
    dtype: torch.dtype

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def kept(self) -> torch.dtype:
        """What `local` keeps its probabilities in; they meet a matmul in `dtype` anyway."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else self.accumulator

    @property
    def alpha(self) -> float:
        return self.slope if self.softcap is None else self.logit_scale / self.softcap

    @property
    def ceiling(self) -> float | None:
        return None if self.softcap is None else self.softcap / self.temperature

    @property
    def slope(self) -> float:
        """d logit / d (hidden @ weight.T + bias) where the softcap does not bend it."""
        return self.logit_scale / self.temperature

    @property
    def slack(self) -> float:
        """By how much a logit may exceed what exponentials refer to, in the operand dtype."""
        return 8.0 if self.dtype == torch.float16 else 60.0

    def cap_slope(self, logits: Tensor, out: Tensor | None = None) -> Tensor:
        """1 − tanh² of the softcap, from the logits it has left; any shape; `out` may be those."""
        assert self.ceiling is not None
        tanh = torch.mul(logits, 1 / self.ceiling, out=out)
        return tanh.square_().neg_().add_(1)

    def target_residual(self, logps: Tensor, logsumexps: Tensor) -> Tensor:
        """(c,) residual of the targets, (p − 1) · slope of the softcap, from their log-probs."""
        value = logps.expm1()
        return value if self.softcap is None else value * self.cap_slope(logps + logsumexps)

    def operand(self, device: torch.device) -> torch.dtype:
        """What matmul operands are stored in: CPU matmuls return their operands' dtype, so fp32."""
        if device.type == "cpu" and self.dtype != torch.float64:
            return torch.float32
        return self.dtype
