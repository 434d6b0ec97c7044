"""Results of trainings: what the findings, the pictures and the page are made of."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from paper_claims.settings import Settings
from paper_claims.training import Training, training

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


def _rounded(result: Mapping[str, Any]) -> dict[str, Any]:
    def short(values: Iterable[float]) -> list[float]:
        return [float(f"{value:.{_DIGITS}g}") for value in values]

    return {
        name: short(value) if isinstance(value, list) else short([value])[0]
        for name, value in result.items()
    }
