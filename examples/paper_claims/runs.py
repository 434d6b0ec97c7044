"""Runs of trainings: each on disk as soon as it is done, none made twice."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from paper_claims.results import Results
from paper_claims.settings import Settings
from paper_claims.task import load, prepare
from paper_claims.training import Training, execute


def run_all(
    settings: Settings,
    trainings: Iterable[Training],
    seeds: Sequence[int],
    work: Path,
    workers: int,
) -> Results:
    """Every training with every seed, with a progress bar; what is on disk is not repeated.

    Args:
        settings: sizes.
        trainings: without order; one that several experiments want is run once.
        seeds: of data, initialisation and order.
        work: folder of references and of finished trainings, of these settings only.
        workers: processes of one thread each; 1 stays in this one.
    """
    wanted = [(what, seed) for seed in seeds for what in dict.fromkeys(trainings)]
    paths = {run: _path(*run, work) for run in wanted}
    missing = [run for run in wanted if not paths[run].is_file()]
    folders = {seed: work / f"seed-{seed}" for seed in seeds}
    with ProcessPoolExecutor(
        max_workers=workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
    ) as pool:
        needed = sorted({seed for _, seed in missing})
        preparations = [(prepare, settings, seed, folders[seed]) for seed in needed]
        trained = [(_run, settings, *run, folders[run[1]], paths[run]) for run in missing]
        _all_of(pool, workers, preparations, "references")
        _all_of(pool, workers, trained, "trainings")
    found = {run: json.loads(path.read_text(encoding="utf-8")) for run, path in paths.items()}
    return Results(settings, tuple(seeds), found)


def _all_of(
    pool: ProcessPoolExecutor, workers: int, calls: Sequence[tuple[Any, ...]], what: str
) -> None:
    def finished() -> Iterator[None]:
        if workers == 1:
            for function, *arguments in calls:
                yield function(*arguments)
        else:
            for future in as_completed([pool.submit(*call) for call in calls]):
                yield future.result()

    for _ in tqdm(finished(), total=len(calls), desc=what, unit="run", disable=not calls):
        pass


def _start_worker() -> None:
    torch.set_num_threads(1)
    # One bar is enough: the one over all trainings.
    disable_progress_bar()


def _run(settings: Settings, what: Training, seed: int, folder: Path, path: Path) -> None:
    result = execute(settings, load(folder), what, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    # By renaming: a file that is there is whole.
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(result) + "\n", encoding="utf-8")
    partial.replace(path)


def _path(what: Training, seed: int, work: Path) -> Path:
    digest = hashlib.sha256(repr(what).encode()).hexdigest()[:12]
    return work / "trainings" / f"{what.loss}-seed{seed}-{digest}.json"
