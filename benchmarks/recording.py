"""A recording of what code asks of a GPU, and what the host's own code takes of it.

Tensors are on the meta device, and what asks for the GPU gets a machine's answers: library calls
and launches are recorded, nothing is computed, and every allocation is counted as long as it lives.
The host is measured with the real code on a CPU, its kernels and matmuls mocked: rows have one
entry, and the planner is told the real hidden size. What is left is the Python that plans, makes
views and launches, on one core.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from time import thread_time
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from benchmarks.device import Event, Machine, Part, traffic_of
from fused_prefopt import checks, ops
from fused_prefopt.kernels.architectures import architecture
from fused_prefopt.ops.autograd import head_logps, head_logps_backward
from fused_prefopt.ops.cublas_engine import CublasEngine
from fused_prefopt.ops.engines import choose_engine, device_memory, processors
from fused_prefopt.ops.head_rows import HeadRows
from fused_prefopt.ops.inputs import Call, _check, labelled_rows
from fused_prefopt.ops.kl import head_kl, head_kl_backward
from fused_prefopt.ops.precision import HeadMath, fixed_precision
from fused_prefopt.ops.tuning import Tuning, tuning_of

# All now: one that is first imported within a block would keep what stands there meanwhile.
for _module in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
    importlib.import_module(_module.name)


@dataclass
class Recording:
    """Events and memory of a step.

    Attributes:
        events: in their order.
        peak: most bytes that were alive at once beyond those before the step.
    """

    events: list[Event] = field(default_factory=list)
    peak: int = 0


def record(step: Callable[[], object], labelled: int, machine: Machine) -> Recording:
    """The recording of a step on meta tensors.

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
    """The event of an operator; None where it only makes views or reserves memory."""
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
    torch.ops.fused_prefopt.head_logps.default: head_logps._init_fn,
    torch.ops.fused_prefopt.head_logps_backward.default: (head_logps_backward._init_fn),
    torch.ops.fused_prefopt.head_kl.default: head_kl._init_fn,
    torch.ops.fused_prefopt.head_kl_backward.default: head_kl_backward._init_fn,
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
def in_place_of(replacements: Mapping[Any, Any]) -> Iterator[None]:
    """Within the block, each function is another one in every module of ours that knows it."""
    ours = [module for name, module in sys.modules.items() if name.startswith("fused_prefopt")]
    by_id = {id(real): value for real, value in replacements.items()}
    with ExitStack() as stack:
        for module in ours:
            for name, known in list(vars(module).items()):
                if id(known) in by_id:
                    stack.enter_context(patch.object(module, name, by_id[id(known)]))
        yield


@contextmanager
def gpu_answers(machine: Machine) -> Iterator[None]:
    """Within the block, what asks for the GPU is told of a machine."""
    tuning = Tuning(architecture(machine.capability))
    answers: dict[Any, Any] = {
        choose_engine: lambda name, device, dtype: name,
        _check: lambda *_: None,
        device_memory: lambda device: machine.memory,
        processors: lambda device: machine.processors,
        tuning_of: lambda device: tuning,
    }
    with in_place_of(answers):
        yield


@contextmanager
def _as_meta() -> Iterator[None]:
    """Within the block, meta tensors go where autocast is asked for, which knows none."""

    def without_device(_: Tensor, dtype: torch.dtype) -> fixed_precision:
        return fixed_precision(torch.empty(0), dtype)

    with (
        patch.object(torch, "is_autocast_enabled", lambda kind: False),
        in_place_of({fixed_precision: without_device}),
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


_WARM, _ROUNDS = 3, 9


def host_seconds(
    step: Callable[[], object], machine: Machine, hidden_size: int, anchors: list[str]
) -> list[float]:
    """Seconds of the host before each anchor: a kernel's launch, or a matmul into an output.

    The median over several steps: what is searched once for a shape has been found.

    Args:
        step: a forward, and its backward if there is one, on CPU tensors of hidden size 1.
        machine: that is asked for.
        hidden_size: D that the planner is told.
        anchors: their names as a recording has them.

    Raises:
        ValueError: the step has launched something else.
    """
    marks: list[tuple[str, float]] = []
    rounds = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _mocked(machine, hidden_size, lambda name: marks.append((name, thread_time()))):
            for _ in range(_WARM + _ROUNDS):
                marks.clear()
                start = thread_time()
                step()
                times = [start, *(time for _, time in marks)]
                rounds.append([after - before for before, after in pairwise(times)])
    finally:
        torch.set_num_threads(threads)
    if [name for name, _ in marks] != anchors:
        raise ValueError(f"the host launched {len(marks)} times, the recording {len(anchors)}")
    return [median(each) for each in zip(*rounds[_WARM:], strict=True)]


def spread_over(events: list[Event], seconds: list[float]) -> list[float]:
    """The same for each event: what comes between two anchors is all before the first of them."""
    found, left = [], iter(seconds)
    ahead: list[float] = []
    for event in events:
        ahead.append(0.0)
        if event.anchor:
            ahead[0] += next(left)
            found += ahead
            ahead = []
    return found + ahead


@contextmanager
def _mocked(machine: Machine, hidden_size: int, mark: Callable[[str], None]) -> Iterator[None]:
    """Within the block CPU tensors are treated as a GPU's, and nothing of size is computed."""
    known: dict[Any, Tensor] = {}

    def matmul(name: str, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*operands: Tensor, out: Tensor | None = None, **options: Any) -> Tensor:
            if out is None:
                return real(*operands, **options)
            mark(name)
            return out

        return call

    def found(targets: Tensor, ignore_index: int, num_labels: int) -> Tensor:
        key = (targets.shape, ignore_index, num_labels)
        if key not in known:
            known[key] = labelled_rows(targets, ignore_index, num_labels)
        return known[key]

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        mark(kernel.__name__)

    methods = {
        (JITFunction, "run"): run,
        (torch, "mm"): matmul("mm", torch.mm),
        (torch, "addmm"): matmul("addmm", torch.addmm),
        (torch, "_assert_async"): lambda *_: None,
        (checks, "_HOSTS"): (),
        (Call, "hidden_size"): hidden_size,
        (HeadRows, "hidden_size"): hidden_size,
        (HeadMath, "operand"): lambda math, device: math.dtype,
        (CublasEngine, "in_place"): staticmethod(lambda math, device: math.kept == math.dtype),
    }
    with gpu_answers(machine), in_place_of({labelled_rows: found}), ExitStack() as stack:
        for (target, name), value in methods.items():
            stack.enter_context(patch.object(target, name, value))
        yield
