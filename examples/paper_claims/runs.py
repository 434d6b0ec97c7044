"""Runs of trainings: each on disk as soon as it is done, none made twice, and what they gave."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from paper_claims.trainings import Settings, Training, execute, load, prepare, training

_DIGITS = 6  # that are written: more than any finding shows


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"python": platform.python_version(), **packages}


@dataclass(frozen=True)
class Results:
    """What trainings gave, over the same seeds.

    Attributes:
        settings: that they shared.
        seeds: in order.
        found: (training, seed) → what `execute` returned.
        versions: package → version.
    """

    settings: Settings
    seeds: tuple[int, ...]
    found: Mapping[tuple[Training, int], Mapping[str, Any]]
    versions: Mapping[str, str] = field(default_factory=versions)

    @property
    def trainings(self) -> list[Training]:
        """Each once, in the order in which they were found."""
        return list(dict.fromkeys(what for what, _ in self.found))

    @property
    def cpu_seconds(self) -> float:
        """Of all trainings with their judging."""
        return sum(result["cpu_seconds"] for result in self.found.values())

    def values(self, what: Training, metric: str) -> list[Any]:
        """One value for each seed."""
        return [self.found[what, seed][metric] for seed in self.seeds]

    def differences(self, one: Training, other: Training, metric: str) -> list[float]:
        """`one` minus `other` for each seed: the same reference, data and order."""
        pairs = zip(self.values(one, metric), self.values(other, metric), strict=True)
        return [mine - theirs for mine, theirs in pairs]

    def save(self, path: Path) -> None:
        """Write JSON: one line for each training and seed."""
        lines = [
            json.dumps({**what.record, "seed": seed, "result": _rounded(self.found[what, seed])})
            for what in self.trainings
            for seed in self.seeds
        ]
        head = {
            "settings": asdict(self.settings),
            "seeds": self.seeds,
            "versions": dict(self.versions),
        }
        shown = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n  ".join(lines)
        path.write_text(f'{shown},\n "trainings": [\n  {rows}\n ]\n}}\n', encoding="utf-8")


def load_results(path: Path) -> Results:
    """What `Results.save` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    settings = content["settings"]
    found = {}
    for row in content["trainings"]:
        seed, result = row.pop("seed"), row.pop("result")
        found[training(**row), seed] = result
    return Results(
        Settings(**{**settings, "kinds": tuple(settings["kinds"])}),
        tuple(content["seeds"]),
        found,
        content["versions"],
    )


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


def _rounded(result: Mapping[str, Any]) -> dict[str, Any]:
    def short(values: Iterable[float]) -> list[float]:
        return [float(f"{value:.{_DIGITS}g}") for value in values]

    return {
        name: short(value) if isinstance(value, list) else short([value])[0]
        for name, value in result.items()
    }
