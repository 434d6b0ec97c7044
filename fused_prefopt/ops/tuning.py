"""Which tile shapes a device's kernels take: the architecture's, or what `autotune` has stored."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fused_prefopt.devices import gpu_index, gpu_properties
from fused_prefopt.kernels.architectures import Architecture, Block, architecture

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
    """What is chosen for a GPU with these properties.

    Raises:
        ValueError: `architecture` does.
    """
    # Without the former, which it asks a program to opt in to, AMD has the latter.
    names = ("shared_memory_per_block_optin", "shared_memory_per_block")
    shared = next((getattr(gpu, name) for name in names if hasattr(gpu, name)), None)
    return architecture((gpu.major, gpu.minor), hip=torch.version.hip is not None, shared=shared)


def cache_file() -> Path:
    """Where `autotune` stores its choices: below FUSED_PREFOPT_CACHE or the user's cache."""
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
