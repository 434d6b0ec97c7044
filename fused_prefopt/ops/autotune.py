"""An opt-in search for the fastest tile shapes on a GPU; its choice is stored on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_prefopt.devices import current
from fused_prefopt.kernels.architectures import CANDIDATES, Block
from fused_prefopt.kernels.fold_logits import fold_logits
from fused_prefopt.kernels.recompute_gradient import recompute_gradient
from fused_prefopt.ops.tuning import key, store, tuning_of

_REPEATS = 10


@dataclass(frozen=True)
class Choice:
    """What the search has found for one kernel.

    Attributes:
        key: of the kernel, as it is stored.
        block: the fastest shape.
        milliseconds: its time, and `before` that of the shape used so far.
    """

    key: str
    block: Block
    milliseconds: float
    before: float


def autotune(
    hidden_size: int,
    vocab: int,
    *,
    rows: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    softcap: float | None = None,
    device: torch.device | str = "cuda",
    timer: Callable[[Callable[[], object]], float] | None = None,
    save: bool = True,
) -> list[Choice]:
    """Time every candidate shape of the matmul kernels on a head of this size.

    Args:
        hidden_size: D.
        vocab: V.
        rows: N, labelled rows of a typical batch.
        dtype: of the matmuls' operands.
        softcap: of the head, or None.
        device: the GPU.
        timer: seconds of a call; the median of CUDA events by default.
        save: store the choices, so that they are used from now on, in later processes too. A
            running process keeps the shapes of the paths it has begun.

    Returns:
        The fastest shape of each kernel.

    Raises:
        RuntimeError: no candidate runs.
    """
    device = torch.device(device)
    head = _Head.random(hidden_size, vocab, rows, dtype, softcap, device)
    timer = timer or _median_time
    choices = []
    for kernel, run in (("fold", head.fold), ("kept", head.keep), ("gradient", head.gradient)):
        rich = kernel == "kept" or softcap is not None
        default = tuning_of(device).block(kernel, dtype, rich)
        with current(head.hidden.device):
            times = dict(_times(run, [default, *CANDIDATES], timer))
        if not times:
            raise RuntimeError(f"no tile shape of {kernel!r} runs on {device}")
        best = min(times, key=lambda block: times[block])
        before = times.get(default, math.inf)
        choices.append(Choice(key(kernel, dtype, rich), best, times[best] * 1e3, before * 1e3))
    if save:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
        store(name, {choice.key: choice.block for choice in choices})
    return choices


def _times(
    run: Callable[[Block], object], blocks: list[Block], timer: Callable[..., float]
) -> Iterator[tuple[Block, float]]:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    for block in dict.fromkeys(blocks):
        try:
            yield block, timer(lambda block=block: run(block))
        except (OutOfResources, CompilationError):
            continue  # it takes more shared memory or registers than this GPU has


@dataclass(frozen=True)
class _Head:
    hidden: Tensor
    weight: Tensor
    rows: Tensor
    targets: Tensor
    out: Tensor
    ceiling: float | None
    descriptors: bool

    @classmethod
    def random(
        cls,
        hidden_size: int,
        vocab: int,
        rows: int,
        dtype: torch.dtype,
        softcap: float | None,
        device: torch.device,
    ) -> _Head:
        hidden = torch.randn(rows, hidden_size, device=device).to(dtype)
        weight = (torch.randn(vocab, hidden_size, device=device) / hidden_size**0.5).to(dtype)
        # The gradient is written slab by slab: a slab is what has to be fast.
        out = torch.empty(rows, min(vocab, 16384), dtype=dtype, device=device)
        targets = torch.randint(vocab, (rows,), device=device)
        numbers = torch.full((rows,), 20.0, device=device)
        descriptors = tuning_of(device).descriptors
        return cls(hidden, weight, numbers, targets, out, softcap, descriptors)

    def fold(self, block: Block) -> object:
        return self._fold(block, self.weight, None)

    def keep(self, block: Block) -> object:
        return self._fold(block, self.weight[: self.out.shape[1]], self.out)

    def _fold(self, block: Block, weight: Tensor, kept: Tensor | None) -> object:
        return fold_logits(
            self.hidden,
            weight,
            None,
            self.targets,
            self.rows.clone(),
            alpha=1.0,
            ceiling=self.ceiling,
            block=block,
            descriptors=self.descriptors,
            kept=kept,
        )

    def gradient(self, block: Block) -> object:
        return recompute_gradient(
            self.hidden,
            self.weight[: self.out.shape[1]],
            None,
            self.rows,
            self.targets,
            self.rows,
            self.rows,
            self.out,
            alpha=1.0,
            ceiling=self.ceiling,
            block=block,
            descriptors=self.descriptors,
        )


def _median_time(call: Callable[[], object]) -> float:
    """Median seconds of a call, compiled and warmed up before."""
    call()
    torch.cuda.synchronize()
    times = []
    for _ in range(_REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times)[len(times) // 2]
