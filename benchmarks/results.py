"""Results on disk: one JSON file per section, rows with the machine and versions they hold for."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
# The status of a row that a deadline has left without figures.
NO_TIME = "skipped: no time left"
Row = dict[str, Any]

_LIBRARIES = ("torch", "triton", "trl", "transformers", "liger_kernel", "cut-cross-entropy")
_SHAPE_KEY = ("candidate", "shape", "dtype", "sequences", "length", "labelled_rows")
# A section without one of them has nothing there.
_KEY = (*_SHAPE_KEY, "capacity_bytes", "gpu")
# What must be equal for rows of two runs to stand in one file.
_SAME = ("commit", "code", "machine", "versions")
_NUMBER = (int, float, type(None))
_SHAPE_FIELDS: dict[str, tuple[type, ...]] = {
    "candidate": (str,),
    "shape": (str,),
    "sequences": (int,),
    "length": (int,),
    "labelled_rows": (int,),
    "hidden_size": (int,),
    "vocab": (int,),
    "dtype": (str,),
    "trains": (str,),
    "status": (str,),
    "extra_bytes": _NUMBER,
    "gradient_bytes": _NUMBER,
}
# Section → field → types. A null stands for a figure that the status says there is none of.
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "head": {
        **_SHAPE_FIELDS,
        "memory_status": (str,),
        # Twice: with glibc's defaults, and in a process that keeps its freed memory.
        **{
            f"{prefix}{name}": types
            for prefix in ("", "reused_")
            for name, types in {
                "rounds": (int,),
                "ms": _NUMBER,
                "p_ms": _NUMBER,
                "in_p": _NUMBER,
                "in_p_quartiles": (list, type(None)),
            }.items()
        },
        "logp_error": _NUMBER,
        "dhidden_error": _NUMBER,
        "dweight_error": _NUMBER,
    },
    "sweep": {**_SHAPE_FIELDS, "axis": (str,)},
}
_SPREAD = (list, type(None))
FIELDS["grid"] = {
    **{name: kinds for name, kinds in FIELDS["head"].items() if not name.startswith("reused_")},
    "objective": (str,),
    "forward_ms": _NUMBER,
    "forward_in_p": _NUMBER,
    "forward_in_p_quartiles": _SPREAD,
    "flops": _NUMBER,
    "bytes": _NUMBER,
}
FIELDS["method"] = {
    **{name: _SHAPE_FIELDS[name] for name in (*_SHAPE_KEY, "status")},
    "pairs": (int,),
    "stateful": (bool,),
    "engine": (str,),
    "ms": (float,),
    "ms_quartiles": (list,),
    "step_ms": (float,),
    "share": (float,),
}
FIELDS["trainer"] = {
    **_SHAPE_FIELDS,
    "layers": (int,),
    "loss": _NUMBER,
    "gradient_norm": _NUMBER,
    # The larger of both figures' relative distances from the eager trainer's.
    "distance": _NUMBER,
    "rounds": (int,),
    "ms": _NUMBER,
    "ms_quartiles": _SPREAD,
    # The time as a share of the eager trainer's in the same round.
    "of_eager": _NUMBER,
    "of_eager_quartiles": _SPREAD,
    # Here the extra bytes hold the gradients.
    "memory_status": (str,),
}
FIELDS["context"] = {
    **{
        name: _SHAPE_FIELDS[name]
        for name in ("candidate", "shape", "sequences", "hidden_size", "vocab", "dtype", "trains")
    },
    "capacity_bytes": (int,),
    # Lengths in tokens: the longest that fits, the shortest that does not, the memory model's.
    "longest": (int, type(None)),
    "fails_at": (int, type(None)),
    "predicted": (int, type(None)),
    "ended_by": (str,),
    "probes": (int,),
    "status": (str,),
}
# A prediction: what a step would take on a GPU.
FIELDS["replay"] = {
    **{name: kinds for name, kinds in _SHAPE_FIELDS.items() if name != "status"},
    "gpu": (str,),
    "p_ms": (float,),
    "ms": (float,),
    "in_p": (float,),
    "launches": (int,),
    "moved_bytes": (int,),
    # Of the host: what the GPU waits for it, and its own code; null where it was not measured.
    "exposed_ms": _NUMBER,
    "host_ms": _NUMBER,
}
FIELDS["kl"] = {
    **{
        name: kinds
        for name, kinds in _SHAPE_FIELDS.items()
        if name not in ("trains", "gradient_bytes")
    },
    **{
        f"{prefix}{name}": FIELDS["head"][name]
        for prefix in ("", "forward_")
        for name in ("rounds", "ms", "p_ms", "in_p", "in_p_quartiles")
    },
    **dict.fromkeys(("kl_error", "dhidden_error", "dweight_error"), _NUMBER),
}


class Sink(Protocol):
    """What takes a row as often as it grows."""

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


def check(content: Mapping[str, Any]) -> None:
    """Check a file's content against `FIELDS`.

    Raises:
        ValueError: a field is missing, unknown or of another type.
    """
    for name in ("section", "date", "commit", "machine", "versions", "rows"):
        if name not in content:
            raise ValueError(f"{name}: missing in the results")
    fields = FIELDS[content["section"]]
    for row in content["rows"]:
        if row.keys() != fields.keys():
            odd = ", ".join(sorted(row.keys() ^ fields.keys()))
            raise ValueError(f"{odd}: missing or unknown in a row of {content['section']}")
        for name, kinds in fields.items():
            if not isinstance(row[name], kinds):
                raise ValueError(f"{name}: got {row[name]!r}")


def machine() -> dict[str, str | int]:
    """What was measured on, without names that tell where it stands."""
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
    """What a row is about: two rows of one section with the same key replace each other."""
    return tuple(row.get(name) for name in _KEY)
