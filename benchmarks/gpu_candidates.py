"""Ours as it is measured on a GPU, and predicted without one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from benchmarks.peers import CANDIDATES, HEAD, HIDDEN, NOTHING, Candidate, ours, ours_with_room

# Path → what a step on it trains.
TRAINS = {"evaluate": NOTHING, "stash": HIDDEN, "local": HEAD, "recompute": HEAD}
ENGINES = ("cublas", "triton")


def forced(path: str, engine: str) -> Candidate:
    """A path on an engine, in the default workspace; `local` gets what it needs."""
    run = partial(ours_with_room, path, engine)
    return Candidate(f"ours: {path}, {engine}", run, TRAINS[path], ours=True)


AUTO = replace(CANDIDATES["ours: auto"], name="ours: auto, auto")
# What a caller gets who asks for nothing, by what the step trains; and TRL's there.
DEFAULTS = {NOTHING: forced("evaluate", "auto"), HIDDEN: forced("stash", "auto"), HEAD: AUTO}
OF_TRL = {
    NOTHING: CANDIDATES["TRL: no gradient"],
    HIDDEN: CANDIDATES["TRL: frozen head"],
    HEAD: CANDIDATES["TRL"],
}
# Some rows' probabilities are kept, not all.
SOME = replace(
    AUTO, name="ours: auto, 1024 MiB", forward=partial(ours, "auto", workspace_mb=1024.0)
)
