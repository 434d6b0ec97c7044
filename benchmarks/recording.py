"""A recording of what code asks of a GPU: library calls and launches on tensors without data.

Tensors are on the meta device, and what asks for the GPU gets a machine's answers. Nothing is
computed; every allocation is counted as long as it lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from benchmarks.kernel_traffic import traffic_of
from benchmarks.machines import Machine
from fused_prefopt.kernels.architectures import architecture
from fused_prefopt.ops import (
    call,
    engines,
    head_rows,
    logps,
    registered,
    triton_engine,
    tuning,
)

Part = tuple[int, int]


@dataclass
class Event:
    """A call that a GPU would run.

    Attributes:
        name: of the operator or kernel.
        reads, writes: (storage, bytes) of what it reads and writes.
        size: (m, n, k) of a matmul, or None.
        tile: of a fused kernel's matmul, or None for the library's.
        accumulates: whether a matmul adds to its output.
        itemsize: bytes of a matmul's operands.
        triton: whether it is a kernel launch, not a library call.
        waits: whether the host waits for its result.
    """

    name: str
    reads: list[Part]
    writes: list[Part]
    size: tuple[int, int, int] | None = None
    tile: tuple[int, int] | None = None
    accumulates: bool = False
    itemsize: int = 2
    triton: bool = False
    waits: bool = False


@dataclass
class Recording:
    """What a step has asked for.

    Attributes:
        events: in their order.
        peak: most bytes that were alive at once beyond those before.
        python: seconds of the host between one anchor (matmul or kernel) and the next.
    """

    events: list[Event] = field(default_factory=list)
    peak: int = 0
    python: list[float] = field(default_factory=list)


def part_of(value: Tensor) -> Part:
    """A tensor's storage, and the bytes of it that are read or written (an expanded one's once)."""
    entries = 1
    for size, stride in zip(value.shape, value.stride(), strict=True):
        entries *= size if stride else 1
    return value.untyped_storage()._cdata, entries * value.itemsize


def _matmul(name: str, left: Tensor, right: Tensor, out: Tensor, accumulates: bool) -> Event:
    size = (left.shape[0], right.shape[1], left.shape[1])
    reads = [part_of(left), part_of(right)]
    return Event(name, reads, [part_of(out)], size, None, accumulates, left.itemsize)


class Recorder(TorchDispatchMode):
    """Records operators on meta tensors; answers what depends on their data.

    Args:
        labelled: rows that a mask over all of them selects.
    """

    def __init__(self, labelled: int) -> None:
        super().__init__()
        self.found, self._labelled = Recording(), labelled
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bytes = 0

    def add(self, event: Event) -> None:
        self.found.events.append(event)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _BODIES:
            # What the registered op does, not what a compiler is told of it.
            with self:
                return _BODIES[func](*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        self._forget()
        special = _SPECIAL.get(name)
        bools = any(each.dtype == torch.bool for each in tree_leaves(args[1:2]) if _is(each))
        if name == "index" and bools:
            out = args[0].new_empty(self._labelled, *args[0].shape[args[1][0].dim() :])
        elif special is not None:
            out = special(self._labelled, *args, **kwargs)
        else:
            out = func(*args, **kwargs)
        outputs = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        self._remember(outputs)
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.add(_matmul(name, left, right, outputs[0], name == "addmm"))
            return out
        waits = name in _WAITING or (name == "index" and bools)
        known = {each.untyped_storage()._cdata for each in inputs}
        fresh = [x for x in outputs if x.untyped_storage()._cdata not in known]
        mutates = func._schema.is_mutable
        if name.startswith(("empty", "new_empty")) or not (fresh or mutates or waits):
            return out
        written = [part_of(x) for x in (inputs[:1] if mutates and not fresh else fresh)]
        if name in ("index_put_", "index_put", "_index_put_impl_"):
            written = [(part_of(args[0])[0], part_of(args[2])[1])]
            inputs = [each for each in inputs if each is not args[0]]
        elif name in ("index", "index_select", "gather", "embedding"):
            rest = [part_of(each) for each in inputs[1:]]
            self.add(Event(name, [(part_of(inputs[0])[0], written[0][1]), *rest], written))
            self.found.events[-1].waits = waits
            return out
        if name in _WRITES_ONLY:
            inputs = inputs[1:] if mutates else []
        self.add(Event(name, [part_of(each) for each in inputs], written, waits=waits))
        return out

    def _remember(self, outputs: list[Tensor]) -> None:
        for value in outputs:
            storage = value.untyped_storage()
            if storage._cdata not in self._live and value.device.type == "meta":
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self._bytes += storage.nbytes()
        self.found.peak = max(self.found.peak, self._bytes)

    def _forget(self) -> None:
        for key in [key for key, (ref, _) in self._live.items() if ref.expired()]:
            self._bytes -= self._live.pop(key)[1]

    def before(self, *values: Tensor) -> None:
        """Tensors that are there before the step: they count for nothing."""
        for value in values:
            storage = value.untyped_storage()
            self._live[storage._cdata] = (StorageWeakRef(storage), 0)


def _is(value: object) -> bool:
    return isinstance(value, Tensor)


_BODIES: dict[Any, Callable[..., Any]] = {
    torch.ops.fused_prefopt.head_logps.default: registered.head_logps._init_fn,
    torch.ops.fused_prefopt.head_logps_backward.default: registered.head_logps_backward._init_fn,
}


def _nonzero(rows: int, values: Tensor, **_: Any) -> Tensor:
    return values.new_empty((rows, values.dim()), dtype=torch.int64)


_SPECIAL: dict[str, Callable[..., Any]] = {
    "nonzero": _nonzero,
    "nonzero_static": lambda _, values, *, size, **__: _nonzero(size, values),
    "masked_select": lambda rows, values, mask: values.new_empty(rows),
    "_local_scalar_dense": lambda rows, value: rows,
    "_assert_async": lambda *_: None,
}
_WAITING = ("nonzero", "masked_select", "_local_scalar_dense")
_WRITES_ONLY = ("zero_", "fill_", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like")
_WRITES_ONLY += ("new_zeros", "new_full", "copy_", "arange", "new_ones", "scalar_tensor")


@contextmanager
def gpu_of(machine: Machine) -> Iterator[None]:
    """Within the block, meta tensors are treated as a GPU's."""
    known = architecture(machine.capability)
    with ExitStack() as stack:

        def put(target: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(target, name, value))

        def chosen(name: str, device: torch.device, dtype: torch.dtype) -> str:
            return name

        put(call, "choose_engine", chosen)
        put(call, "_check", lambda *_: None)
        put(call, "device_memory", lambda device: machine.memory)
        put(head_rows, "processors", lambda device: machine.processors)
        put(tuning, "tuning_of", lambda device: tuning.Tuning(known))
        put(triton_engine, "tuning_of", lambda device: tuning.Tuning(known))
        yield


@contextmanager
def launches_into(recorder: Recorder | None, clock: Callable[[], None]) -> Iterator[None]:
    """Within the block, kernels and matmuls into an output are recorded instead of being run.

    Args:
        recorder: gets them, or None.
        clock: called at each.
    """

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        clock()
        if recorder is not None:
            named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            recorder.add(_launch(kernel.__name__, named, grid))

    real_mm, real_addmm = torch.mm, torch.addmm

    def mm(left: Tensor, right: Tensor, *, out: Tensor | None = None, **options: Any) -> Tensor:
        if out is None:
            return real_mm(left, right, **options)
        clock()
        if recorder is not None:
            recorder.add(_matmul("mm", left, right, out, False))
        return out

    def addmm(added: Tensor, left: Tensor, right: Tensor, **options: Any) -> Tensor:
        out = options.get("out")
        if out is None:
            return real_addmm(added, left, right, **options)
        clock()
        if recorder is not None:
            accumulates = options.get("beta", 1.0) != 0
            recorder.add(_matmul("addmm", left, right, out, accumulates))
        return out

    with (
        patch.object(JITFunction, "run", run),
        patch.object(torch, "mm", mm),
        patch.object(torch, "addmm", addmm),
        patch.object(torch, "_assert_async", lambda *_: None),
    ):
        yield


def _launch(name: str, arguments: dict[str, Any], grid: Any) -> Event:
    found = traffic_of(name, SimpleNamespace(**arguments), grid)

    def parts(named: list[tuple[Tensor, int | None]]) -> list[Part]:
        whole = [(part_of(value), size) for value, size in named]
        return [(key, nbytes if size is None else size) for (key, nbytes), size in whole]

    return Event(
        name,
        parts(found.reads),
        parts(found.writes),
        found.size,
        found.tile,
        itemsize=found.itemsize,
        triton=True,
    )


class Stopwatch:
    """Seconds of the host between anchors."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = perf_counter()

    def __call__(self) -> None:
        now = perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
