"""Compiles every case for every target, and fails on a spill."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.errors import TritonError

from benchmarks.aot import Launch, recording, usage
from benchmarks.kernel_cases import CASES
from benchmarks.kernel_results import (
    KERNELS,
    USAGE,
    changes,
    faults,
    key,
    load_kernels,
    save_kernels,
)
from benchmarks.kernel_targets import DTYPES, TARGETS, Case, Setting, Target
from benchmarks.results import Row


def launches(case: Case, dtype: str, target: Target) -> list[Launch]:
    """What a case launches, each configuration once."""
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
