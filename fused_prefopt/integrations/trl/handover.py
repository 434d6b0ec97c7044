"""Log-probs that TRL computes ahead, on ranks that share no disk.

TRL's rank 0 writes them to the folder of the data set's cache, where the others read them: each
process has a folder of its own for a data set in memory, each machine for one on a disk of its own.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset, Features, concatenate_datasets

from fused_prefopt.distributed import gather_objects, gather_outcomes, rank, world_size


def unshared_folder(dataset: Dataset) -> str:
    """Text that is new in each run, the same on all ranks, where they share no folder; else "".

    What TRL keeps by it no later run finds: some ranks would have it and leave the others waiting.
    Every rank must make the call.

    Args:
        dataset: with TRL's columns.
    """
    if world_size() == 1:
        return ""
    mark = gather_objects(uuid.uuid4().hex)[0]
    path = Path(dataset._get_cache_file_path(f"of-all-ranks-{mark}"))

    def put() -> None:
        if rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    gather_outcomes(put)
    seen = gather_outcomes(path.is_file)
    if rank() == 0:
        path.unlink(missing_ok=True)
    return "" if all(seen) else mark


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
