"""What matmuls compute in while the op runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fused_prefopt.devices import current

_REDUCTIONS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


class fixed_precision:
    """What a pass over the head runs under.

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
