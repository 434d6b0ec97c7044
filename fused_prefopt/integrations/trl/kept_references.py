"""Files in which TRL keeps a reference's log-probs of a data set, for other processes and runs.

Its rank 0 writes them, the others read them; where they share no disk, they are handed over.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, concatenate_datasets
from datasets.fingerprint import Hasher

from fused_prefopt.distributed import gather_objects, gather_outcomes, rank


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
    if not dataset.cache_files:
        dataset._get_cache_file_path = lambda print_: str(folder / f"cache-{print_}.arrow")
    try:
        alone = _unshared_folder(dataset)
        dataset._fingerprint = Hasher.hash((before, *own, alone) if alone else (before, *own))
        yield
    finally:
        dataset._fingerprint = before
        vars(dataset).pop("_get_cache_file_path", None)


def handed_over(compute: Callable[[], Dataset], dataset: Dataset) -> Dataset:
    """The data set with the columns that TRL computes; from rank 0, where another finds no file.

    Args:
        compute: TRL's method, which every rank calls.
        dataset: what it adds columns to.

    Raises:
        FileNotFoundError: rank 0 does not find its own file.
    """
    found, missing = None, None
    try:
        found = compute()
    except FileNotFoundError as error:
        missing = error
    if not any(gather_objects(found is None)):
        assert found is not None
        return found
    own: tuple[dict[str, list[float]], Features] | None = None
    if found is not None and rank() == 0:
        new = [name for name in found.column_names if name not in dataset.column_names]
        own = {name: found[name] for name in new}, Features({n: found.features[n] for n in new})
    columns = gather_objects(own)[0]
    if columns is None:
        raise FileNotFoundError("the log-probs that rank 0 computed are gone") from missing
    if found is not None:
        return found
    return concatenate_datasets([dataset, Dataset.from_dict(columns[0], columns[1])], axis=1)


def _unshared_folder(dataset: Any) -> str:
    """Text that is new in each run, the same on all ranks, where they share no folder; else "".

    What TRL keeps by it no later run finds: some ranks would have it and leave the others waiting.
    Every rank must make the call.

    Args:
        dataset: with TRL's columns.
    """
    mark = gather_objects(uuid.uuid4().hex)[0]
    path = Path(dataset._get_cache_file_path(f"of-all-ranks-{mark}"))

    def put() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if rank() == 0:
            path.touch()

    gather_outcomes(put)
    seen = gather_outcomes(path.is_file)
    if rank() == 0:
        path.unlink(missing_ok=True)
    return "" if all(seen) else mark
