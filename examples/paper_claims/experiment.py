"""What an experiment is: trainings, findings, a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from paper_claims.results import Results
from paper_claims.training import Training


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        claim: what is claimed.
        paper: where, with its figures.
        here: what came out, written from the numbers.
        rule: when the claim counts as met.
        agrees: "yes", "no" or "undecided", by the rule.
    """

    claim: str
    paper: str
    here: str
    rule: str
    agrees: str


@dataclass(frozen=True)
class Experiment:
    """A claim or several, on the same trainings.

    Attributes:
        name: of the picture's file.
        title: a heading.
        text: what was done.
        trainings: what to run, with every seed.
        metrics: of `execute`, to show for each training.
        findings: the rows, from the results.
        draw: writes the picture to a path.
    """

    name: str
    title: str
    text: str
    trainings: tuple[Training, ...]
    metrics: tuple[str, ...]
    findings: Callable[[Results], list[Finding]]
    draw: Callable[[Results, Path], None]
