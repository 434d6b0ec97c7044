"""The file that keeps a reference model's log-probs, and the parts an unfinished run leaves."""

from __future__ import annotations

import hashlib
import io
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SUFFIX = ".logps"
_MAGIC = b"fused_prefopt reference log-probs 2\n"


@dataclass(frozen=True)
class Fingerprints:
    """What log-probs belong to, by content.

    Attributes:
        data: token ids.
        model: config and weights.
        precision: what matmuls compute in, the weights' own dtype or autocast's.
        tokenizer: None where it is not known.
    """

    data: str
    model: str
    precision: str
    tokenizer: str | None = None

    @property
    def name(self) -> str:
        """Short name of them together, for a file."""
        tokenizer = (self.tokenizer or "any")[:8]
        return f"{self.model[:16]}-{self.data[:16]}-{tokenizer}-{self.precision}"

    def differences(self, stored: Mapping[str, str | None]) -> list[str]:
        """Which of them differ from stored ones; an unknown tokenizer does not."""
        pairs = {name: (stored.get(name), own) for name, own in vars(self).items()}
        return [name for name, (old, own) in pairs.items() if old and own and old != own]


class Known:
    """Columns of a data set, with which of its features are filled.

    Args:
        size: features of the data set.

    Attributes:
        done: (size,) bool.
        columns: name → (size,) fp32.
    """

    def __init__(self, size: int) -> None:
        self.done = torch.zeros(size, dtype=torch.bool)
        self.columns: dict[str, Tensor] = {}

    def add(self, indices: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Fill the features of these indices, (k,) int64, with (k,) columns."""
        self.done[indices] = True
        for name, values in columns.items():
            self.columns.setdefault(name, torch.zeros(len(self.done)))[indices] = values

    def merge(self, other: Known) -> None:
        """Fill what the other has."""
        indices = other.done.nonzero()[:, 0]
        self.add(indices, {name: values[indices] for name, values in other.columns.items()})

    def is_done(self, indices: list[int]) -> bool:
        """Whether all of these features are filled."""
        return bool(self.done[indices].all())


class ReferenceCache:
    """One finished file, or parts beside it until it is finished.

    Every file is written elsewhere and renamed, so that none is ever half-written, and any number
    of processes may write the same cache: they write the same values.

    Args:
        path: of the finished file.
        fingerprints: what it must belong to.
    """

    def __init__(self, path: Path, fingerprints: Fingerprints) -> None:
        self.path = path
        self.fingerprints = fingerprints

    def load(self, size: int) -> Known:
        """What is on disk.

        Args:
            size: features of the data set.

        Raises:
            ValueError: a file is damaged, or belongs to another model, precision, tokenizer or
                data.
        """
        known = Known(size)
        for path in (self.path, *self._parts()):
            try:
                stored = _read(path)
            except FileNotFoundError:
                # Not there yet, or another process has just finished and cleared its parts.
                continue
            self._check(path, stored)
            known.add(stored["indices"], stored["columns"])
        return known

    def save_part(self, name: str, indices: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Keep the log-probs of some features, for a later run if this one is killed."""
        self._write(self.path.with_name(f"{self._prefix}{name}{SUFFIX}"), indices, columns)

    def finish(self, known: Known) -> None:
        """Write the finished file and clear the parts."""
        self._write(self.path, torch.arange(len(known.done)), known.columns)
        self.clear_parts()

    def clear_parts(self) -> None:
        """Remove the parts that are visible here."""
        for path in self._parts():
            path.unlink(missing_ok=True)

    @property
    def _prefix(self) -> str:
        return f"{self.path.name}.part-"

    def _parts(self) -> list[Path]:
        if not self.path.parent.is_dir():
            return []
        names = sorted(path.name for path in self.path.parent.iterdir())
        parts = (name for name in names if name.startswith(self._prefix) and name.endswith(SUFFIX))
        return [self.path.with_name(name) for name in parts]

    def _check(self, path: Path, stored: Mapping[str, Any]) -> None:
        differences = self.fingerprints.differences(stored["fingerprints"])
        if differences:
            raise ValueError(
                f"{path}: got log-probs of another {' and another '.join(differences)}, needs those"
                " of the given model, precision, data and tokenizer; name another file or delete"
                " this one"
            )

    def _write(self, path: Path, indices: Tensor, columns: Mapping[str, Tensor]) -> None:
        stored = {"fingerprints": vars(self.fingerprints), "indices": indices, "columns": columns}
        content = io.BytesIO()
        torch.save(stored, content)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        with beside.open("wb") as file:
            file.write(_MAGIC + hashlib.sha256(content.getbuffer()).digest())
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)


def _read(path: Path) -> dict[str, Any]:
    """What a file holds: a line that names its kind, a hash of what follows, what torch saves.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another kind, or damaged.
    """
    content = path.read_bytes()
    hashed, saved = content[len(_MAGIC) :][:32], content[len(_MAGIC) + 32 :]
    if not _MAGIC.startswith(content[: len(_MAGIC)]):
        raise ValueError(f"{path}: got another kind of file, needs a reference cache")
    if hashlib.sha256(saved).digest() != hashed:
        # Torch reads a damaged file with wrong values, or with an error that explains nothing.
        raise ValueError(
            f"{path}: got a damaged or truncated file, needs a whole one; delete it, and its"
            " log-probs are computed again"
        )
    return torch.load(io.BytesIO(saved), weights_only=True)
