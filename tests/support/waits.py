"""Operations as they are dispatched: what would make Python wait for a GPU, and what is large."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
)
from torch.utils._pytree import tree_leaves

import fused_prefopt
from fused_prefopt import checks
from fused_prefopt.ops import passes

_PACKAGE = str(Path(fused_prefopt.__file__).parent)
_TORCH = str(Path(torch.__file__).parent)
_MASKS = (torch.bool, torch.uint8)
_BODIES = torch._library.custom_ops.OPDEFS


class Inside(TorchDispatchMode):
    """Sees every operation, those in the bodies of this package's registered ops too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fused_prefopt":
            with self:
                return _BODIES[func._schema.name]._init_fn(*args, **kwargs)
        return self.seen(func, args, kwargs)

    def seen(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation that is none of this package's."""
        return func(*args, **kwargs)


class LargestTensor(Inside):
    """The most entries of fp32 that any operation's result has room for."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def seen(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        made = [value for value in tree_leaves(out) if isinstance(value, torch.Tensor)]
        sizes = [value.untyped_storage().nbytes() // 4 for value in made]
        self.entries = max([self.entries, *sizes])
        return out


class OpCalls(TorchDispatchMode):
    """Calls of this package's registered ops.

    Attributes:
        found: op, arguments, result of each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "fused_prefopt":
            assert not kwargs
            self.found.append((func, args, out))
        return out


class Waits(Inside):
    """Operations whose result's values or shape Python must know, called by this package.

    Bodies of this package's registered ops are watched like any other code. What a library asks
    for on its own account (its frame is the innermost outside of torch) is not counted.

    Attributes:
        found: "operation in file:function" of each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def seen(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self._waits(func, args, kwargs):
            self.note(str(func))
        return func(*args, **kwargs)

    def note(self, operation: str) -> None:
        """Count an operation if this package's code is what asks for it."""
        frames = [
            frame
            for frame in traceback.extract_stack()
            if not frame.filename.startswith(_TORCH) and frame.filename != __file__
        ]
        caller = frames[-1]
        if caller.filename.startswith(_PACKAGE) or "/kernels/" in caller.filename:
            self.found.append(f"{operation} in {Path(caller.filename).stem}:{caller.name}")

    def _waits(self, func: Any, args: Any, kwargs: Any) -> bool:
        name = func._schema.name
        if name.startswith("aten::index") and len(args) > 1 and isinstance(args[1], list | tuple):
            return any(each is not None and each.dtype in _MASKS for each in args[1])
        if name == "aten::repeat_interleave":
            return kwargs.get("output_size") is None
        # A number or list of the host's, on its way to where the others are.
        if name == "aten::lift_fresh":
            return True
        tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
        return any(tag in func.tags for tag in tags)


def watched(monkeypatch: Any) -> Waits:
    """A `Waits` for code that takes no device for a host, whose values it could look at."""
    waits = Waits()
    monkeypatch.setattr(checks, "_HOSTS", ())
    tolist = torch.Tensor.tolist

    def noted(self: torch.Tensor) -> Any:
        # No mode sees it.
        if isinstance(_get_current_dispatch_mode(), Waits):
            waits.note("tolist")
        return tolist(self)

    def on_host(run: Any) -> Any:
        def unwatched(*args: Any) -> Any:
            with _disable_current_modes():
                return run(*args)

        return unwatched

    monkeypatch.setattr(torch.Tensor, "tolist", noted)
    # A ticket is a tensor of the host's on every device.
    for name in ("lease", "find", "give_back"):
        monkeypatch.setattr(passes, name, on_host(getattr(passes, name)))
    return waits


def watched_steps(trainer: Any, waits: Waits) -> Waits:
    """Let a trainer's forward and backward passes be watched, the last one's waits be kept."""
    step = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        # The first step asks once whether the model can do what it is to do.
        waits.found.clear()
        with waits:
            loss: torch.Tensor = step(*args, **kwargs)
        return loss

    trainer.training_step = training_step
    return waits
