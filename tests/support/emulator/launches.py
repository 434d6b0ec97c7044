"""Launches of this project's Triton functions, compiled for a target and executed on the CPU.

`with emulated():` stands in the place of `JITFunction.run`: the launchers are called with CPU
tensors, and what they launch is recorded as on a GPU (signature, constants, divisibility, options),
compiled to PTX and executed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.kernel_gate import Launch, recording

from .arithmetic import UNSIGNED
from .async_proxy import WIDTHS
from .cut_off import CutOff
from .machine import Dispatch, Machine, Options, places_of
from .mbarriers import TensorMap
from .memory import Storages
from .ptx import Parameter, parse
from .threads import WARP
from .translation import Code

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32)}
# Triton ends a signature with pointers to scratch memory that none of these kernels asks for.
_SCRATCH = 2


@dataclass(frozen=True)
class Report:
    """What one launch did.

    Attributes:
        name: of the kernel.
        programs: of the grid.
        executed: instructions, of threads.
        copied: bytes by asynchronous copies.
        races: two threads touch a byte, one of them writing, and no barrier stands between.
        unwritten: reads of shared bytes that nothing had been written to.
    """

    name: str
    programs: int
    executed: int
    copied: int
    races: set[str]
    unwritten: set[str]


class Log:
    """What was launched within a block.

    Attributes:
        launches: how many were begun, one that faults too.
        reports: of those that came to their end.
    """

    def __init__(self) -> None:
        self.launches = 0
        self.reports: list[Report] = []

    @property
    def executed(self) -> int:
        return sum(report.executed for report in self.reports)

    @property
    def names(self) -> list[str]:
        return [report.name for report in self.reports]

    @property
    def races(self) -> set[str]:
        return {race for report in self.reports for race in report.races}

    @property
    def unwritten(self) -> set[str]:
        return {one for report in self.reports for one in report.unwritten}


@contextmanager
def emulated(
    target: str = "sm_80",
    *,
    order: str | None = None,
    cut_off: CutOff | None = None,
    approximate: bool = False,
    races: bool = True,
    seed: int = 0,
) -> Iterator[Log]:
    """Within the block, launches of Triton functions are executed here.

    Args:
        target: "sm_80" or "sm_90", what they are compiled for.
        order: of the warps between two barriers: None for lock step, "up", "down" or "random".
        cut_off: how tensor cores add; None for exact sums, rounded once.
        approximate: approximations are off by as much as the ISA allows, at random.
        races: look for them.
        seed: of the order of programs and warps, and of what `approximate` draws.

    Raises:
        Fault: a program does what a GPU would not forgive.
        NotImplementedError: an instruction that the table does not hold.
    """
    gpu = TARGETS[target]
    log = Log()
    original = JITFunction.run
    options = Options(order, cut_off, approximate, races, seed)

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        with recording(gpu) as launches:
            JITFunction.run = original
            try:
                original(self, *args, grid=grid, warmup=warmup, **kwargs)
            finally:
                JITFunction.run = run
        (found,) = launches
        text, shared = compiled(found, target)
        names = [param.name for param in self.params]
        given = {name: value for name, value in kwargs.items() if name in names}
        bound = self.signature.bind(*args, **given)
        bound.apply_defaults()
        taken = [bound.arguments[n] for n in names if found.signature[n] != "constexpr"]
        size = grid(bound.arguments) if callable(grid) else grid
        warps = found.options["num_warps"]
        boxes = descriptors(found, target)
        log.launches += 1
        log.reports.append(_launch(text, taken, size, warps, shared, options, boxes))

    JITFunction.run = run
    try:
        yield log
    finally:
        JITFunction.run = original


def launch(
    text: str,
    arguments: list[Any],
    grid: tuple[int, ...],
    *,
    warps: int,
    shared: int,
    order: str | None = None,
    cut_off: CutOff | None = None,
    approximate: bool = False,
    races: bool = True,
    seed: int = 0,
    lanes: int = 2048,
    descriptors: Sequence[dict[str, Any]] = (),
) -> Report:
    """Execute every program of a grid, in random order.

    Args:
        text: the PTX.
        arguments: of the entry, tensors and numbers, without the scratch pointers at the end.
        grid: of programs.
        warps: of a program.
        shared: bytes of a program.
        order, cut_off, approximate, races, seed: as those of `emulated`.
        lanes: how many threads run in lock step.
        descriptors: what `descriptors` says of each tensor descriptor among the arguments.
    """
    options = Options(order, cut_off, approximate, races, seed)
    return _launch(text, arguments, grid, warps, shared, options, descriptors, lanes)


def _launch(
    text: str,
    arguments: list[Any],
    grid: tuple[int, ...],
    warps: int,
    shared: int,
    options: Options,
    boxes: Sequence[dict[str, Any]],
    lanes: int = 2048,
) -> Report:
    code = _code(text)
    arguments = _unfolded(arguments, boxes)
    program = code.program
    if program.threads not in (None, WARP * warps):
        raise ValueError(f"{program.name}: got {warps} warps, wanted {program.threads} threads")
    missing = len(program.parameters) - len(arguments)
    if not 0 <= missing <= _SCRATCH:
        raise ValueError(
            f"{program.name}: got {len(arguments)} arguments, wanted {len(program.parameters)}"
        )
    storages = Storages()
    values, maps = {}, {}
    # What is missing is scratch memory, unless the program reads it.
    for parameter, argument in zip(program.parameters, arguments, strict=False):
        if isinstance(argument, _Descriptor):
            maps[parameter.offset] = argument.encoded(parameter, storages)
        else:
            values[parameter.name] = _value(parameter, argument, storages)
    x, y, z = (*grid, 1, 1)[:3]
    dispatch = Dispatch(storages, values, (x, y, z), warps, shared, maps)
    places = places_of(dispatch.grid, options.seed)
    at_once = max(1, lanes // (WARP * warps))
    executed = copied = 0
    with np.errstate(all="ignore"):
        for begin in range(0, len(places), at_once):
            machine = Machine(code, dispatch, places[begin : begin + at_once], options)
            machine.run()
            executed += machine.executed
            copied += machine.copies.copied + machine.mbarriers.copied
    found = dispatch.findings
    return Report(program.name, len(places), executed, copied, found.races, found.unwritten)


@dataclass(frozen=True)
class _Descriptor:
    """A tensor descriptor of an argument, and what the compiled kernel wants of it."""

    argument: Any
    box: dict[str, Any]

    def encoded(self, parameter: Parameter, storages: Storages) -> TensorMap:
        """What the driver would make of it."""
        given, box = self.argument, self.box
        if parameter.size != 128:
            raise ValueError(f"{parameter.name}: got a descriptor, wanted {parameter.size} bytes")
        # Older Tritons have neither of these fields: they fill with zeros, and round nothing.
        padding = getattr(given, "padding", "zero")
        rounds = getattr(given, "round_f32_to_tf32", False)
        odd = box["fp4_padded"] or box.get("is_im2col") or rounds
        if odd or padding != "zero" or len(given.shape) != 2 or given.strides[1] != 1:
            raise NotImplementedError(f"{parameter.name}: the tensor descriptor {given} as {box}")
        rows, columns = (int(size) for size in given.shape)
        size = given.base.element_size()
        if box["elem_size"] != size:
            raise ValueError(f"{parameter.name}: got {size} bytes a value, wanted {box}")
        high, wide = box["block_size"]
        pitch = int(given.strides[0]) * size
        swizzle = WIDTHS[box["swizzle"]]
        return TensorMap(
            storages.add(given.base), (rows, columns), pitch, size, (high, wide), swizzle
        )


def _unfolded(arguments: list[Any], boxes: Sequence[dict[str, Any]]) -> list[Any]:
    """With a map, sizes and strides in a descriptor's place, as Triton passes them."""
    found: list[Any] = []
    left = list(boxes)
    for argument in arguments:
        if hasattr(argument, "block_shape"):
            if not left:
                raise ValueError(f"descriptors: got {len(boxes)}, wanted one for {argument}")
            found += [_Descriptor(argument, left.pop(0)), *argument.shape, *argument.strides]
        else:
            found.append(argument)
    return found


def _value(parameter: Parameter, argument: Any, storages: Storages) -> Any:
    """The bits of an argument."""
    if parameter.size not in UNSIGNED:
        raise NotImplementedError(f"{parameter.name}: a parameter of {parameter.size} bytes")
    kind = UNSIGNED[parameter.size]
    if hasattr(argument, "data_ptr"):
        if parameter.size != 8:
            raise ValueError(f"{parameter.name}: got a tensor, wanted {parameter.size} bytes")
        return kind(storages.add(argument))
    if isinstance(argument, float):
        return np.array(argument, {4: np.float32, 8: np.float64}[parameter.size]).view(kind)[()]
    bits = 8 * parameter.size
    if not -(1 << (bits - 1)) <= int(argument) < 1 << bits:
        raise ValueError(f"{parameter.name}: got {argument}, wanted a number of {bits} bits")
    return kind(int(argument) & ((1 << bits) - 1))


_CODES: dict[str, Code] = {}


def _code(text: str) -> Code:
    if text not in _CODES:
        _CODES[text] = Code(parse(text))
    return _CODES[text]


_COMPILED: dict[str, tuple[str, int, list[dict[str, Any]]]] = {}


def compiled(launch: Launch, target: str) -> tuple[str, int]:
    """PTX of a recorded launch, and the shared bytes of a program."""
    return _compiled(launch, target)[:2]


def descriptors(launch: Launch, target: str) -> list[dict[str, Any]]:
    """Box, swizzle and element of each tensor descriptor that a recorded launch takes."""
    return _compiled(launch, target)[2]


def _compiled(launch: Launch, target: str) -> tuple[str, int, list[dict[str, Any]]]:
    key = f"{launch.key} {target}"
    if key not in _COMPILED:
        source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
        with _ptx_only():
            found = triton.compile(source, target=TARGETS[target], options=launch.options)
        text = found.asm["ptx"]
        shared = found.metadata.shared
        boxes = list(getattr(found.metadata, "tensordesc_meta", None) or [])
        _COMPILED[key] = (text.decode() if isinstance(text, bytes) else text, shared, boxes)
    return _COMPILED[key]


@contextmanager
def _ptx_only() -> Iterator[None]:
    """Triton stops at the PTX: ptxas takes most of the time, and nothing here reads its binary.

    What is cached has no binary, so the folder is another than that of real compilations.
    """
    stages, create, folder = CUDABackend.add_stages, CUDABackend.__init__, knobs.cache.dir

    def add_stages(self: Any, found: dict[str, Any], *rest: Any) -> None:
        stages(self, found, *rest)
        found.pop("cubin")

    def create_for_ptx(self: Any, target: GPUTarget) -> None:
        create(self, target)
        self.binary_ext = "ptx"

    CUDABackend.add_stages, CUDABackend.__init__ = add_stages, create_for_ptx
    knobs.cache.dir = os.path.join(tempfile.gettempdir(), f"ptx_of_triton_{triton.__version__}")
    try:
        yield
    finally:
        CUDABackend.add_stages, CUDABackend.__init__ = stages, create
        knobs.cache.dir = folder
