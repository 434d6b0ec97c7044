"""Bytes of live tensors on a CPU, and an attention that holds what flash attention holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operator has met, as long as it lives.

    A storage that is resized, as FSDP2 frees what it has gathered, counts as large as it is.

    Attributes:
        peak: most bytes alive after an operator since it was set to 0.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._met: dict[int, StorageWeakRef] = {}
        self.peak = 0
        self._meet(known)

    @property
    def now(self) -> int:
        """Bytes alive."""
        found = 0
        for key, ref in list(self._met.items()):
            storage = None if ref.expired() else torch.UntypedStorage._new_with_weak_ptr(key)
            if storage is None:
                del self._met[key]
            else:
                found += storage.nbytes()
        return found

    def _meet(self, values: list[Any]) -> None:
        for value in values:
            # A wrapper's storage is empty: its parts are met by themselves.
            if type(value) in (Tensor, torch.nn.Parameter):
                storage = value.untyped_storage()
                self._met.setdefault(storage._cdata, StorageWeakRef(storage))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._meet(tree_leaves((args, kwargs, out)))
        self.peak = max(self.peak, self.now)
        return out


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.zeros_like(query.transpose(1, 2)).transpose(1, 2)
        logsumexp = query.new_zeros(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(each) for each in ctx.saved_tensors[:3])


def held_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """In the place of attention: what flash attention keeps and returns, all of it zero."""
    return _Held.apply(query, key, value).transpose(1, 2), None
