"""Results on disk: one JSON file per section, rows with the machine and versions they hold for.

One file: what rows of every section hold, and the check that they do.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TypedDict, get_type_hints

import torch

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
KERNELS = RESULTS / "kernels"
# The status of a row that a deadline has left without figures.
NO_TIME = "skipped: no time left"
Row = dict[str, Any]

_LIBRARIES = ("torch", "triton", "trl", "transformers", "liger_kernel", "cut-cross-entropy")
# A section without one of them has nothing there.
_KEY = (
    *("candidate", "shape", "dtype", "sequences", "length", "labelled_rows"),
    *("capacity_bytes", "gpu", "recipe"),
)
# What must be equal for rows of two runs to stand in one file.
_SAME = ("commit", "code", "machine", "versions")
# A null stands for a figure that the status says there is none of.
Figure = int | float | None
Spread = list | None


class Sized(TypedDict):
    """Sizes of what was computed on."""

    candidate: str
    shape: str
    sequences: int
    length: int
    labelled_rows: int
    hidden_size: int
    vocab: int
    dtype: str


class Timed(TypedDict):
    """Times in ms and in P."""

    rounds: int
    ms: Figure
    p_ms: Figure
    in_p: Figure
    in_p_quartiles: Spread


class Erring(TypedDict):
    """Errors against float64."""

    logp_error: Figure
    dhidden_error: Figure
    dweight_error: Figure


class SweepRow(Sized):
    """Of the memory sweep."""

    trains: str
    status: str
    extra_bytes: Figure
    gradient_bytes: Figure
    axis: str


class HeadRow(Sized, Timed, Erring):
    """Of one shape; timed twice: with glibc's defaults, and where freed memory is kept."""

    trains: str
    status: str
    extra_bytes: Figure
    gradient_bytes: Figure
    memory_status: str
    reused_rounds: int
    reused_ms: Figure
    reused_p_ms: Figure
    reused_in_p: Figure
    reused_in_p_quartiles: Spread


class GridRow(Sized, Timed, Erring):
    """Of a point of a grid."""

    trains: str
    status: str
    extra_bytes: Figure
    gradient_bytes: Figure
    memory_status: str
    objective: str
    forward_ms: Figure
    forward_in_p: Figure
    forward_in_p_quartiles: Spread
    flops: Figure
    bytes: Figure


class MethodRow(TypedDict):
    """Of what a loss takes of a step."""

    candidate: str
    shape: str
    dtype: str
    sequences: int
    length: int
    labelled_rows: int
    status: str
    pairs: int
    stateful: bool
    engine: str
    ms: float
    ms_quartiles: list
    step_ms: float
    share: float


class TrainerRow(Sized):
    """Of a whole trainer step; the extra bytes hold the gradients.

    `distance` is the larger of both figures' relative distances from the eager trainer's,
    `of_eager` the time as a share of the eager trainer's in the same round.
    """

    trains: str
    status: str
    extra_bytes: Figure
    gradient_bytes: Figure
    memory_status: str
    layers: int
    loss: Figure
    gradient_norm: Figure
    distance: Figure
    rounds: int
    ms: Figure
    ms_quartiles: Spread
    of_eager: Figure
    of_eager_quartiles: Spread


class FrameworkRow(TypedDict):
    """Of a training by another framework's command: peaks of its process's resident memory.

    The short one is of completions of a few tokens; the losses are those that it has logged.
    """

    candidate: str
    framework: str
    version: str
    shape: str
    pairs: int
    length: int
    hidden_size: int
    vocab: int
    dtype: str
    status: str
    losses: list
    peak_bytes: Figure
    short_peak_bytes: Figure


class ContextRow(TypedDict):
    """Of a search; lengths in tokens: the longest that fits, the shortest that does not, the
    memory model's."""

    candidate: str
    shape: str
    sequences: int
    hidden_size: int
    vocab: int
    dtype: str
    trains: str
    capacity_bytes: int
    longest: int | None
    fails_at: int | None
    predicted: int | None
    ended_by: str
    probes: int
    status: str


class ReplayRow(Sized):
    """Of a prediction: what a step would take on a GPU.

    Of the host: what the GPU waits for it, and its own code; null where it was not measured.
    """

    trains: str
    extra_bytes: Figure
    gradient_bytes: Figure
    gpu: str
    p_ms: float
    ms: float
    in_p: float
    launches: int
    moved_bytes: int
    exposed_ms: Figure
    host_ms: Figure


class ScaledHeadRow(TypedDict):
    """Of a head in the replay, at each length of a rank's two sequences, its gradients among the
    bytes."""

    candidate: str
    head: str
    shape: str
    gpu: str
    trains: str
    hidden_size: int
    vocab: int
    dtype: str
    lengths: list
    peak_bytes: list
    ms: list


class ScalingRow(TypedDict):
    """Of the memory model: the largest context on each number of GPUs, in which layout, and in
    which moment of a step a longer one does not fit; 0 and nothing where none fits."""

    candidate: str
    shape: str
    gpu: str
    recipe: str
    gpus: list
    longest: list
    layouts: list
    ended_by: list


class KlRow(Sized, Timed):
    """Of the exact KL divergence."""

    status: str
    extra_bytes: Figure
    forward_rounds: int
    forward_ms: Figure
    forward_p_ms: Figure
    forward_in_p: Figure
    forward_in_p_quartiles: Spread
    kl_error: Figure
    dhidden_error: Figure
    dweight_error: Figure


SECTIONS: dict[str, type] = {
    "head": HeadRow,
    "sweep": SweepRow,
    "grid": GridRow,
    "method": MethodRow,
    "trainer": TrainerRow,
    "framework": FrameworkRow,
    "context": ContextRow,
    "replay": ReplayRow,
    "scaling-head": ScaledHeadRow,
    "scaling": ScalingRow,
    "kl": KlRow,
}


class Sink(Protocol):
    """A taker of rows: each as often as it grows."""

    def put(self, row: Row) -> None:
        """Add a row, or replace the one that is about the same."""


@dataclass
class Results:
    """One section's rows, written to `path` as often as they grow."""

    path: Path
    section: str
    rows: list[Row] = field(default_factory=list)
    origin: Row = field(default_factory=lambda: origin())

    @classmethod
    def resumed(cls, path: Path, section: str) -> Results:
        """With the rows on disk, if the same code has measured them on the same machine."""
        results = cls(path, section)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            check(content)
        except (OSError, ValueError, KeyError):
            return results
        if all(content.get(name) == results.origin[name] for name in _SAME):
            results.rows = content["rows"]
        return results

    def holds(self, row: Row) -> bool:
        """Whether there is a row about the same."""
        return any(row_key(other) == row_key(row) for other in self.rows)

    def done(self, row: Row) -> bool:
        """Whether there is a row about the same, and nothing was wrong with it."""
        key = row_key(row)
        return any(row_key(other) == key and other["status"] == "ok" for other in self.rows)

    def put(self, row: Row) -> None:
        """Add a row, or replace the one of the same candidate, shape and dtype; then write."""
        self.rows = [other for other in self.rows if row_key(other) != row_key(row)] + [row]
        self.save()

    def save(self) -> None:
        """Write everything; a reader never sees half a file."""
        content = {"section": self.section, **self.origin, "rows": self.rows}
        check(content)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        scratch.replace(self.path)


def origin() -> Row:
    """When, from which commit, and on what the figures are measured."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "code": code(),
        "machine": machine(),
        "versions": versions(),
    }


def load(folder: Path) -> dict[str, Any]:
    """Every checked results file of a folder, by its name without the suffix."""
    files = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")
    }
    for content in files.values():
        check(content)
    return files


def load_kernels(folder: Path = KERNELS) -> dict[str, Any]:
    """Usage of the compiled kernels: target → content of its results file, by name."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    }


def check(content: Mapping[str, Any]) -> None:
    """Check a file's content against its section's rows.

    Raises:
        ValueError: a field is missing, unknown or of another type.
    """
    for name in ("section", "date", "commit", "machine", "versions", "rows"):
        if name not in content:
            raise ValueError(f"{name}: missing in the results")
    fields = _fields(content["section"])
    for row in content["rows"]:
        if row.keys() != fields.keys():
            odd = ", ".join(sorted(row.keys() ^ fields.keys()))
            raise ValueError(f"{odd}: missing or unknown in a row of {content['section']}")
        for name, kind in fields.items():
            if not isinstance(row[name], kind):
                raise ValueError(f"{name}: got {row[name]!r}")


@cache
def _fields(section: str) -> dict[str, Any]:
    return get_type_hints(SECTIONS[section])


def failure(error: Exception) -> str:
    """The status of a candidate that has raised, in one line without paths."""
    if isinstance(error, ImportError) and error.name:
        return f"unavailable: needs {error.name}"
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    text = " ".join(word for word in first.split() if "/" not in word)[:120]
    if isinstance(error, ImportError):
        return f"unavailable: {text}"
    return f"failed: {type(error).__name__}: {text}".rstrip(": ")


def machine() -> dict[str, str | int]:
    """The machine that was measured on, without names that tell where it stands."""
    # pytest-benchmark's description names the host, and a machine lent for its GPU has torch alone.
    described: dict[str, str | int] = {
        "cpu": _cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_memory_bytes() / 2**30),
        "system": platform.system(),
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name.replace("_", "-")] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that was measured, "+changes" added where the tree differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", "../fused_prefopt", "../kernels", "*.py")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "uncommitted"


def code() -> str:
    """A digest of all code that is measured or measures: a copy may be no repository."""
    found = hashlib.sha256()
    for folder in (ROOT, ROOT.parent / "fused_prefopt", ROOT.parent / "kernels"):
        for path in sorted(folder.rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _memory_bytes() -> int:
    try:
        import psutil
    except ImportError:  # A machine lent for its GPU may have no more than torch.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return psutil.virtual_memory().total


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if os.path.exists(info):
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def row_key(row: Row) -> tuple[Any, ...]:
    """The key of a row: two rows of one section with the same key replace each other."""
    return tuple(row.get(name) for name in _KEY)
