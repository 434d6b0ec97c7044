"""Scalars and dtypes of an LM head's logits, and the precision that its matmuls run under."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_prefopt.devices import current
from fused_prefopt.types import LMHead

_REDUCTIONS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


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

    @classmethod
    def of(cls, head: LMHead, dtype: torch.dtype) -> HeadMath:
        """The scalars of a head, computing in `dtype`."""
        return cls(head.softcap, head.logit_scale, head.temperature, dtype)

    @property
    def scalars(self) -> tuple[float, ...]:
        """All but the dtype, as numbers: what `from_scalars` reads."""
        return self.softcap or 0.0, self.logit_scale, self.temperature

    @classmethod
    def from_scalars(cls, scalars: Sequence[float], dtype: torch.dtype) -> HeadMath:
        """The reverse of `scalars`; there is no softcap of 0."""
        softcap, logit_scale, temperature = scalars
        return cls(softcap or None, logit_scale, temperature, dtype)

    @property
    def bent(self) -> bool:
        """Whether a softcap bends the logits, which takes a fused kernel's registers."""
        return self.softcap is not None

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def kept(self) -> torch.dtype:
        """Dtype that `local` keeps its probabilities in; they meet a matmul in `dtype` anyway."""
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
        """Dtype of matmul operands: CPU matmuls return their operands' dtype, so fp32."""
        if device.type == "cpu" and self.dtype != torch.float64:
            return torch.float32
        return self.dtype


class fixed_precision:
    """Context that a pass over the head runs under.

    Autocast is off (the op has chosen its dtype), matmuls have the precision of that dtype, and
    the GPU that holds the tensors is the current one.
    """

    def __init__(self, hidden: Tensor, dtype: torch.dtype) -> None:
        self._device = current(hidden.device)
        self._autocast = torch.autocast(hidden.device.type, enabled=False)
        self._precision = _matmul_precision(dtype, hidden.device)

    def __enter__(self) -> None:
        self._device.__enter__()
        self._autocast.__enter__()
        self._precision.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._precision.__exit__(*error)
        self._autocast.__exit__(*error)
        self._device.__exit__(*error)


def _matmul_precision(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """Products that round once: fp32 sums of exact products, whatever is set outside.

    On CPU, matmuls of bf16 values held in fp32 may use bf16 instructions: the operands are exact,
    the sums and the result stay fp32. On CUDA, sums of fp16 and bf16 products stay fp32.
    """
    if device.type == "cpu" and dtype == torch.bfloat16:
        return _bf16_products()
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        return _full_sums()
    return nullcontext()


@contextmanager
def _bf16_products() -> Iterator[None]:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None or not hasattr(matmul, "fp32_precision"):
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextmanager
def _full_sums() -> Iterator[None]:
    before = {name: _reduction(name) for name in _REDUCTIONS}
    for name, (_, *split_k) in before.items():
        _set_reduction(name, (False, *split_k))
    try:
        yield
    finally:
        for name, values in before.items():
            _set_reduction(name, values)


def _reduction(name: str) -> tuple[bool, ...]:
    """Whether sums may be rounded on the way, and from torch 2.10 on whether they may be split."""
    matmul: Any = torch.backends.cuda.matmul
    split_k: bool | None = getattr(matmul, f"{name}_split_k", None)
    allowed: bool = getattr(matmul, name)
    return (allowed,) if split_k is None else (allowed, split_k)


def _set_reduction(name: str, values: tuple[bool, ...]) -> None:
    # Older torch takes no tuple; a bool alone would let a newer one split again.
    setattr(torch.backends.cuda.matmul, name, values if len(values) > 1 else values[0])
