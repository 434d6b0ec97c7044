"""Files in which TRL keeps a reference's log-probs of a data set, for other processes and runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from datasets.fingerprint import Hasher


def folder_of(args: Any) -> Path:
    """Where references are kept that have no data set's file beside which they could be.

    Args:
        args: of a trainer.
    """
    return Path(args.output_dir) / "reference_logps"


@contextmanager
def kept_apart(dataset: Any, own: tuple[Any, ...], folder: Path) -> Iterator[None]:
    """TRL keeps what it precomputes by the model and by this of the data, its own with it.

    Beside the data's own file. Data that have none are in memory, for which `datasets` names a
    folder of this process alone, where no other process and no later run would look.

    Args:
        dataset: of `datasets`; one without a length stays as it is.
        own: what the log-probs depend on beside TRL's model and data.
        folder: for data in memory, one that all processes see.
    """
    if isinstance(dataset, IterableDataset):
        yield
        return
    before = dataset._fingerprint
    dataset._fingerprint = Hasher.hash((before, *own))
    if not dataset.cache_files:
        folder.mkdir(parents=True, exist_ok=True)
        dataset._get_cache_file_path = lambda print_: str(folder / f"cache-{print_}.arrow")
    try:
        yield
    finally:
        dataset._fingerprint = before
        vars(dataset).pop("_get_cache_file_path", None)
