"""A recording of what code asks of a GPU: library calls and launches on tensors without data.

Tensors are on the meta device, and what asks for the GPU gets a machine's answers. Nothing is
computed; every allocation is counted as long as it lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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
    registered,
    registered_backward,
    registered_kl,
    triton_engine,
    tuning,
)
from fused_prefopt.ops.precision import fixed_precision

# A storage, and how many bytes of it.
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
        anchor: whether it is a launch or a matmul into an output: what a mocked step meets too.
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
    anchor: bool = False


@dataclass
class Recording:
    """What a step has asked for.

    Attributes:
        events: in their order.
        peak: most bytes that were alive at once beyond those before the step.
    """

    events: list[Event] = field(default_factory=list)
    peak: int = 0


def record(step: Callable[[], object], labelled: int, machine: Machine) -> Recording:
    """What a step on meta tensors asks of a machine.

    Args:
        step: a forward, and its backward if there is one.
        labelled: rows that a mask over all of them selects.
        machine: that is asked.
    """
    recorder = Recorder(labelled)
    with gpu_answers(machine), _as_meta(), _launches_into(recorder), recorder:
        kept = step()
        del kept
    return recorder.found


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
        body = _BODIES.get(func)
        if body is not None:
            # What the registered op does, not what a compiler is told of it.
            with self:
                return body(*args, **kwargs)
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if inputs and all(each.device.type == "cpu" for each in inputs):
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        self._forget()
        for each in inputs:
            # Not seen being made, so it was there before the step.
            self._live.setdefault(*_alive(each, counts=False))
        masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            each.dtype == torch.bool for each in tree_leaves(args[1]) if isinstance(each, Tensor)
        )
        if masked:
            out = self._masked(name, args)
        elif name in _SPECIAL:
            out = _SPECIAL[name](self._labelled, *args, **kwargs)
        else:
            out = func(*args, **kwargs)
        outputs = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        if outputs and all(each.device.type == "cpu" for each in outputs):
            return out
        self._remember(outputs)
        waits = masked or name in _WAITING
        event = _event_of(func, name, args, inputs, outputs, waits)
        if event is not None:
            self.add(event)
        return out

    def _masked(self, name: str, args: tuple[Any, ...]) -> Tensor:
        source, mask = args[0], args[1][0]
        if name == "index":
            picked: Tensor = source.new_empty(self._labelled, *source.shape[mask.dim() :])
            return picked
        return torch.empty_like(source) if name == "index_put" else source

    def _remember(self, outputs: list[Tensor]) -> None:
        for value in outputs:
            key, known = _alive(value, counts=True)
            if key not in self._live and value.device.type == "meta":
                self._live[key] = known
                self._bytes += known[1]
        self.found.peak = max(self.found.peak, self._bytes)

    def _forget(self) -> None:
        for key in [key for key, (ref, _) in self._live.items() if ref.expired()]:
            self._bytes -= self._live.pop(key)[1]


def _alive(value: Tensor, counts: bool) -> tuple[int, tuple[StorageWeakRef, int]]:
    """A tensor's storage, how to see that it is gone, and the bytes that count for it."""
    storage = value.untyped_storage()
    return storage._cdata, (StorageWeakRef(storage), storage.nbytes() if counts else 0)


def part_of(value: Tensor) -> Part:
    """A tensor's storage, and the bytes of it that are read or written (an expanded one's once)."""
    entries = 1
    for size, stride in zip(value.shape, value.stride(), strict=True):
        entries *= size if stride else 1
    return value.untyped_storage()._cdata, entries * value.itemsize


def _event_of(
    func: Any,
    name: str,
    args: tuple[Any, ...],
    inputs: list[Tensor],
    outputs: list[Tensor],
    waits: bool,
) -> Event | None:
    """What an operator asks of the GPU; None where it only makes views or reserves memory."""
    if name in ("mm", "addmm"):
        left, right = args[-2:]
        return _matmul(name, left, right, outputs[0], name == "addmm")
    known = {each.untyped_storage()._cdata for each in inputs}
    fresh = [each for each in outputs if each.untyped_storage()._cdata not in known]
    mutates = func._schema.is_mutable
    if name.startswith(("empty", "new_empty")) or not (fresh or mutates or waits):
        return None
    changed = fresh if fresh or not mutates else inputs[:1]
    written = [part_of(each) for each in changed]
    if name.startswith(("index_put", "_index_put", "scatter_")):
        # What is put is written, not all that it is put into.
        written = [(part_of(args[0])[0], part_of(args[-1] if name == "scatter_" else args[2])[1])]
        inputs = [each for each in inputs if each is not args[0]]
    elif name in ("index", "index_select", "gather", "embedding"):
        rest = [part_of(each) for each in inputs[1:]]
        return Event(name, [(part_of(inputs[0])[0], written[0][1]), *rest], written, waits=waits)
    elif name in _WRITES_ONLY:
        inputs = inputs[1:] if mutates else []
    return Event(name, [part_of(each) for each in inputs], written, waits=waits)


def _matmul(name: str, left: Tensor, right: Tensor, out: Tensor, accumulates: bool) -> Event:
    size = (left.shape[0], right.shape[1], left.shape[1])
    reads = [part_of(left), part_of(right)]
    return Event(name, reads, [part_of(out)], size, None, accumulates, left.itemsize)


def _nonzero(rows: int, values: Tensor, **_: Any) -> Tensor:
    return values.new_empty((rows, values.dim()), dtype=torch.int64)


_BODIES: dict[Any, Callable[..., Any]] = {
    torch.ops.fused_prefopt.head_logps.default: registered.head_logps._init_fn,
    torch.ops.fused_prefopt.head_logps_backward.default: (
        registered_backward.head_logps_backward._init_fn
    ),
    torch.ops.fused_prefopt.head_kl.default: registered_kl.head_kl._init_fn,
    torch.ops.fused_prefopt.head_kl_backward.default: registered_kl.head_kl_backward._init_fn,
}
_SPECIAL: dict[str, Callable[..., Any]] = {
    "nonzero": _nonzero,
    "nonzero_static": lambda _, values, *, size, **__: _nonzero(size, values),
    "masked_select": lambda rows, values, mask: values.new_empty(rows),
    "_local_scalar_dense": lambda rows, value: rows,
}
_WAITING = ("nonzero", "masked_select", "_local_scalar_dense")
_WRITES_ONLY = (
    *("zero_", "fill_", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like"),
    *("new_zeros", "new_full", "copy_", "arange", "new_ones", "scalar_tensor"),
)


@contextmanager
def gpu_answers(machine: Machine) -> Iterator[None]:
    """Within the block, what asks for the GPU is told of a machine."""
    known = architecture(machine.capability)
    with ExitStack() as stack:

        def put(target: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(target, name, value))

        put(call, "choose_engine", lambda name, device, dtype: name)
        put(call, "_check", lambda *_: None)
        put(call, "device_memory", lambda device: machine.memory)
        put(engines, "processors", lambda device: machine.processors)
        put(head_rows, "processors", lambda device: machine.processors)
        put(tuning, "tuning_of", lambda device: tuning.Tuning(known))
        put(triton_engine, "tuning_of", lambda device: tuning.Tuning(known))
        yield


@contextmanager
def _as_meta() -> Iterator[None]:
    """Within the block, meta tensors go where autocast is asked for, which knows none."""

    def without_device(_: Tensor, dtype: torch.dtype) -> fixed_precision:
        return fixed_precision(torch.empty(0), dtype)

    with (
        patch.object(torch, "is_autocast_enabled", lambda kind: False),
        patch.object(registered, "fixed_precision", without_device),
        patch.object(registered_backward, "fixed_precision", without_device),
        patch.object(registered_kl, "fixed_precision", without_device),
    ):
        yield


@contextmanager
def _launches_into(recorder: Recorder) -> Iterator[None]:
    """Within the block, kernels and matmuls into an output are recorded instead of being run."""

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        recorder.add(_launch(kernel.__name__, named, grid))

    def check(condition: Tensor, *_: Any) -> None:
        recorder.add(Event("_assert_async", [part_of(condition)], []))

    def matmul(name: str, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*operands: Tensor, out: Tensor | None = None, **options: Any) -> Tensor:
            if out is None:
                return real(*operands, **options)
            accumulates = name == "addmm" and options.get("beta", 1.0) != 0
            left, right = operands[-2:]
            event = _matmul(name, left, right, out, accumulates)
            event.anchor = True
            recorder.add(event)
            return out

        return call

    with (
        patch.object(JITFunction, "run", run),
        patch.object(torch, "mm", matmul("mm", torch.mm)),
        patch.object(torch, "addmm", matmul("addmm", torch.addmm)),
        patch.object(torch, "_assert_async", check),
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
        anchor=True,
    )
