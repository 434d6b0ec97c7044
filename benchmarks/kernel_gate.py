"""The gate: every kernel compiled ahead of time for every target, and a spill fails.

A launcher runs on meta tensors under a driver that has no device. Triton specialises the arguments
as it would on a GPU, so no signature is written by hand, and the launch stops where it would
compile. What its binary takes is read from it; results are one file a target, and equal runs give
equal files.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError
from triton.runtime import driver

from benchmarks.kernel_cases import CASES, DTYPES, TARGETS, Case, Setting, Target
from benchmarks.results import KERNELS, Row, load_kernels

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


USAGE = ("warps", "stages", "registers", "stack", "spills", "shared", "matrix", "copies")
_KEY = ("case", "kernel", "dtype", "configuration")


def save_kernels(contents: Mapping[str, Any], folder: Path = KERNELS) -> None:
    """Write one file a target, named by it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        text = json.dumps(content, indent=1) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def key(row: Row) -> tuple[str, ...]:
    """Fields that tell a target's rows from each other."""
    return tuple(row[field] for field in _KEY)


def words(row: Row) -> str:
    """A row's name for people."""
    return f"{row['case']} in {row['dtype']} ({row['kernel']})"


def faults(content: Mapping[str, Any]) -> list[str]:
    """Why a target's default kernels must not be shipped; nothing where it is not gated."""
    if not content["gated"]:
        return []
    return [
        f"{content['target']}, {words(row)}: {reason}"
        for row in content["rows"]
        if row["default"]
        for reason in _reasons(row, content["shared_limit"])
    ]


def _reasons(row: Row, limit: int) -> Iterator[str]:
    if row["status"] != "ok":
        yield row["status"]
        return
    if row["spills"]:
        yield f"{row['spills']} spill instructions"
    if row["stack"]:
        yield f"{row['stack']} bytes of stack"
    if row["shared"] > limit:
        yield f"{row['shared']} bytes of shared memory, {limit} at most"


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Differences from older results of the same target, one line each."""
    old, new = ({key(row): row for row in content["rows"]} for content in (before, after))
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            known = "no longer compiled" if name in old else "new"
            yield f"{after['target']}, {words(new.get(name) or old[name])}: {known}"
            continue
        for field in ("status", *USAGE):
            if old[name][field] != new[name][field]:
                change = f"{field} {old[name][field]} before, {new[name][field]} now"
                yield f"{after['target']}, {words(new[name])}: {change}"


def launches(case: Case, dtype: str, target: Target) -> list[Launch]:
    """Launches of a case, each configuration once."""
    with recording(target.gpu) as found:
        case.launch(Setting(target.architecture, DTYPES[dtype]))
    return found


def rows_of(name: str, case: Case, dtype: str, target: Target) -> list[Row]:
    """One row for each kernel that the case launches, with what it takes or why it fails."""
    rows = []
    for launch in launches(case, dtype, target):
        row: Row = {
            "case": name,
            "kernel": launch.name,
            "dtype": dtype,
            "configuration": launch.configuration,
            "default": case.default,
            "status": "ok",
        }
        try:
            row |= usage(launch, target.gpu)
        except (RuntimeError, TritonError) as error:
            row |= {**dict.fromkeys(USAGE), "status": _reason(error)}
        rows.append(row)
    return rows


def compile_all(names: Iterable[str] = tuple(TARGETS), workers: int = 2) -> dict[str, Any]:
    """Target → content of its results file; every kernel is compiled, no cache is trusted."""
    jobs = [(name, case, dtype) for case in CASES for dtype in CASES[case].dtypes for name in names]
    rows: dict[str, list[Row]] = {name: [] for name in names}
    # A forked child would hold the locks of threads that it does not have.
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as cache:
        with ProcessPoolExecutor(workers, context, _cache_in, (cache,)) as pool:
            for job, found in zip(jobs, pool.map(_rows_of_job, jobs), strict=True):
                rows[job[0]] += found
    return {name: content(TARGETS[name], found) for name, found in rows.items()}


def content(target: Target, rows: list[Row]) -> dict[str, Any]:
    """A target's results file."""
    return {
        "target": target.architecture.name,
        "gated": target.gated,
        "shared_limit": target.architecture.shared,
        "triton": triton.__version__,
        "rows": sorted(rows, key=key),
    }


def run_gate(folder: Path = KERNELS, *, write: bool, say: Callable[[str], None] = print) -> int:
    """Compile everything, say what is wrong and what has changed; returns the exit status."""
    contents, before = compile_all(), load_kernels(folder)
    for name, found in contents.items():
        for line in changes(before.get(name, {"rows": []}), found):
            say(f"changed: {line}")
        compiled = sum(row["status"] == "ok" for row in found["rows"])
        gate = "gated" if found["gated"] else "not gated"
        say(f"{name}: {compiled} of {len(found['rows'])} kernels compile ({gate})")
    wrong = [line for found in contents.values() for line in faults(found)]
    for line in wrong:
        say(f"FAULT: {line}")
    if write:
        save_kernels(contents, folder)
    return 1 if wrong else 0


def _cache_in(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


def _rows_of_job(job: tuple[str, str, str]) -> list[Row]:
    target, case, dtype = job
    return rows_of(case, CASES[case], dtype, TARGETS[target])


def _reason(error: Exception) -> str:
    """The last line of an error, where Triton says what is wrong, without paths."""
    last = (str(error).strip().splitlines() or [""])[-1]
    text = " ".join(word for word in last.split() if "/" not in word)[:120]
    return f"failed: {type(error).__name__}: {text}".rstrip(": ")
