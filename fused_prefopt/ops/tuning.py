"""Tile shapes of a device's kernels: the architecture's, or what an opt-in search has stored."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_prefopt.devices import current, gpu_index, gpu_properties
from fused_prefopt.kernels.architectures import CANDIDATES, Architecture, Block, architecture

_REPEATS = 10

# The interpreter runs a program at a time: small tiles, and several of them in a small test.
_SMALL = Block(rows=32, vocab=32, depth=32, group=2, warps=4, stages=2)
_INTERPRETER = Architecture("interpreter", (0, 0), 0, True, _SMALL, _SMALL, _SMALL, {})


@dataclass(frozen=True)
class Tuning:
    """Tile shapes of one device.

    Attributes:
        architecture: the defaults.
        stored: what a measurement has chosen instead, by `key`.
    """

    architecture: Architecture
    stored: dict[str, Block] = field(default_factory=dict)

    @property
    def descriptors(self) -> bool:
        """Whether tiles are loaded through tensor descriptors."""
        return self.architecture.descriptors

    def block(self, kernel: str, operand: torch.dtype, rich: bool) -> Block:
        """The shape of a matmul kernel's tiles.

        Args:
            kernel: "fold", "kept" (fold and keep the exponentials) or "gradient".
            operand: dtype of hidden and weight.
            rich: whether more happens to a tile than a plain fold.
        """
        default = self.architecture.block(operand.itemsize, rich)
        return self.stored.get(key(kernel, operand, rich), default)


def key(kernel: str, operand: torch.dtype, rich: bool) -> str:
    """Under which a kernel's shape is stored."""
    return f"{kernel}/{str(operand).removeprefix('torch.')}/{'rich' if rich else 'plain'}"


def tuning_of(device: torch.device) -> Tuning:
    """The shapes for a device; the interpreter's on CPU."""
    if device.type != "cuda":
        return Tuning(_INTERPRETER)
    return _tuning_of_gpu(gpu_index(device))


@cache
def _tuning_of_gpu(index: int) -> Tuning:
    return Tuning(architecture_of(gpu_properties(index)), load(torch.cuda.get_device_name(index)))


def architecture_of(gpu: Any) -> Architecture:
    """Tile shapes of a GPU with these properties.

    Raises:
        ValueError: `architecture` does.
    """
    # Without the former, which it asks a program to opt in to, AMD has the latter.
    names = ("shared_memory_per_block_optin", "shared_memory_per_block")
    shared = next((getattr(gpu, name) for name in names if hasattr(gpu, name)), None)
    return architecture((gpu.major, gpu.minor), hip=torch.version.hip is not None, shared=shared)


def cache_file() -> Path:
    """File of the choices of `autotune`: below FUSED_PREFOPT_CACHE or the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = os.environ.get("FUSED_PREFOPT_CACHE") or Path(base) / "fused_prefopt"
    return Path(folder) / "tile_shapes.json"


def load(device_name: str) -> dict[str, Block]:
    """The stored shapes of a device, none if nothing was stored."""
    path = cache_file()
    if not path.is_file():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8")).get(device_name, {})
    return {name: Block(**block) for name, block in stored.items()}


def store(device_name: str, blocks: dict[str, Block]) -> Path:
    """Add shapes of a device to the file, replaced as a whole, and use them from now on."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = entries.setdefault(device_name, {})
    known.update({name: asdict(block) for name, block in blocks.items()})
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(entries, indent=1, sort_keys=True), encoding="utf-8")
    partial.replace(path)
    _tuning_of_gpu.cache_clear()
    return path


@dataclass(frozen=True)
class Choice:
    """Result of the search for one kernel.

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
        from fused_prefopt.kernels.fold_logits import fold_logits

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
        from fused_prefopt.kernels.recompute_gradient import recompute_gradient

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
