"""What the kernels take of a GPU: launches recorded, compiled ahead of time, read from the binary.

A launcher runs on meta tensors under a driver that has no device. Triton specialises the arguments
as it would on a GPU, so no signature is written by hand, and the launch stops where it would
compile.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

Usage = dict[str, Any]

# Opcodes in the machine code: matrix products, copies that do not wait, and spilled registers.
_MATRIX = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|v_mfma)")
_COPIES = re.compile(r"\b(LDGSTS|UTMALDG|global_load_lds)|\b(buffer_load)\w* .*\blds\b")
_SPILLS = re.compile(r"\b(STL|LDL)\b")


@dataclass(frozen=True)
class Launch:
    """One launch of a jit function, as Triton would compile it.

    Attributes:
        kernel: the `triton.jit` function.
        signature: parameter → type.
        constants: position of a parameter → value.
        attributes: position of a parameter → what is known of it, divisibility for one.
        options: warps, stages and the backend's other options.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def configuration(self) -> str:
        """The parameters that the source declares constexpr, and their values."""
        params = self.kernel.params
        shown = [(params[place[0]], value) for place, value in self.constants.items()]
        return " ".join(f"{param.name}={value}" for param, value in shown if param.is_constexpr)

    @property
    def key(self) -> str:
        """Equal for two launches that Triton compiles once."""
        parts = (self.name, self.signature, self.constants, self.attributes, self.options)
        return repr(parts)


class _NoDevice:
    """As much of a driver as a launch asks for before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        # Triton keeps its binders by device: those of two targets must not mix.
        return str(self._target)

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def recording(target: GPUTarget) -> Iterator[list[Launch]]:
    """Within the block, launches on `target` are put into the list instead of being made.

    Raises:
        RuntimeError: kernels are interpreted in this process.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: interpreted kernels cannot be compiled, unset it")
    launches: list[Launch] = []

    def record(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        del options["extern_libs"]
        found = Launch(
            fn.jit_function,
            compile["signature"],
            compile["constants"],
            compile["configs"][0],
            {name: tuple(x) if isinstance(x, list) else x for name, x in options.items()},
        )
        if found.key not in {launch.key for launch in launches}:
            launches.append(found)
        return True

    # `driver.active` cannot be asked for where there is no GPU, so its state is kept as it is.
    state, hook = dict(vars(driver)), knobs.runtime.jit_cache_hook
    driver.set_active(_NoDevice(target))
    knobs.runtime.jit_cache_hook = record
    try:
        yield launches
    finally:
        knobs.runtime.jit_cache_hook = hook
        vars(driver).update(state)


def usage(launch: Launch, target: GPUTarget) -> Usage:
    """Compile a launch and read what its binary takes of a `target`.

    Returns:
        registers of a thread, its stack bytes and spill instructions, shared bytes of a program,
        and how often each matrix and asynchronous copy instruction stands in the code.
    """
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=target, options=launch.options)
    read = _read_cubin if "cubin" in compiled.asm else _read_amdgcn
    return {
        "warps": launch.options["num_warps"],
        "stages": launch.options["num_stages"],
        "shared": compiled.metadata.shared,
        **read(compiled.asm),
    }


def _read_cubin(asm: dict[str, Any]) -> Usage:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(asm["cubin"])
        resources = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
        code = _output(knobs.nvidia.nvdisasm.path, "-c", str(path))
    numbers = re.findall(r"REG:(\d+) STACK:(\d+)", resources)
    if not numbers:
        raise ValueError("cuobjdump: no function in the binary")
    return {
        "registers": max(int(registers) for registers, _ in numbers),
        "stack": max(int(stack) for _, stack in numbers),
        "spills": len(_SPILLS.findall(code)),
        "matrix": _counts(_MATRIX, code),
        "copies": _counts(_COPIES, code),
    }


def _read_amdgcn(asm: dict[str, Any]) -> Usage:
    code = asm["amdgcn"]

    def number(name: str) -> int:
        return max(map(int, re.findall(rf"\.{name}:\s+(\d+)", code)))

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        # Scalar registers are spilled to lanes of a vector register; if those too, `stack` grows.
        "spills": number("vgpr_spill_count"),
        "matrix": _counts(_MATRIX, code),
        "copies": _counts(_COPIES, code),
    }


def _counts(pattern: re.Pattern[str], code: str) -> dict[str, int]:
    names = ("".join(match.groups(default="")) for match in pattern.finditer(code))
    return dict(sorted(Counter(names).items()))


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout
