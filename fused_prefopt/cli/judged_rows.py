"""A data set's rows as every kind of loss judges them, and what in them would hurt a training."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fused_prefopt.checks import require_count
from fused_prefopt.cli.config import EMBEDDED, Settings
from fused_prefopt.cli.console import blaming, require_packages
from fused_prefopt.cli.data_files import rows_of
from fused_prefopt.cli.task import (
    LABELLED,
    LISTS,
    PAIRS,
    RATED,
    Records,
    judged_records,
    kind_of,
    training_records,
)
from fused_prefopt.data.columns import (
    CHOSEN,
    COMPLETION,
    COMPLETIONS,
    DESIRABLE,
    GROUP,
    LABELS,
    LIST_RATINGS,
    PAIR,
    PROMPT,
    RATINGS,
    REWARD,
    REWARDS,
    SCORES,
    WEIGHT,
    column_of,
    has_values,
)
from fused_prefopt.data.records import adapted_records
from fused_prefopt.losses.protocol import Loss

KINDS = (LISTS, PAIRS, RATED, LABELLED)
_READ = (
    *(PROMPT, *PAIR, COMPLETION, COMPLETIONS, *SCORES, *RATINGS, *LIST_RATINGS, *LABELS),
    *(GROUP, WEIGHT),
)


@dataclass(frozen=True)
class DataSet:
    """A data set as a configuration names it.

    Attributes:
        name: hub name, folder, file, or `EMBEDDED`.
        split: of it.
        limit: rows to look at; None is all.
        adapter: that reads them; None is told by the name or the columns.
    """

    name: str
    split: str = "train"
    limit: int | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class JudgedRows:
    """Rows of a data set, as they are and as losses judge them.

    Attributes:
        said: what they were read as, and how many they are.
        records: what an adapter makes of them.
        judged: kind → records, or why there are none.
        made_of: kind → which of the rows its records are.
        origins: column of the records → where its values come from.
        cautions: what would hurt a training.
    """

    said: str
    records: Records
    judged: dict[str, Records | str]
    made_of: dict[str, str]
    origins: dict[str, str]
    cautions: list[str]

    def kind_of(self, loss: Loss) -> str:
        """Which of `judged` a loss judges."""
        return kind_of(loss, self.records)


def read_judged_rows(data: DataSet) -> JudgedRows:
    """The rows, as every kind of loss would get them in a training.

    Raises:
        UserError: they cannot be read.
    """
    if data.limit is not None:
        with blaming("--limit"):
            require_count("--limit", data.limit, low=1)
    if data.name != EMBEDDED:
        require_packages("--for", "datasets")
    rows: Records = []
    with blaming("--for"), _heard() as cautions:
        if data.name == EMBEDDED:
            settings = Settings(model="none of its own", limit=data.limit)
            records = training_records(settings, 0, points=False)
            said = f"{EMBEDDED}: text of the package, as pairs or as rated completions"
        else:
            rows = [dict(row) for row in rows_of(data.name, data.split, data.limit)]
            records, said = adapted_records(data.name, rows, data.adapter)
        if not records:
            raise ValueError(f"got no usable row in {data.name}, split {data.split}")
        cautions += _partly_filled(rows)
        judged: dict[str, Records | str] = {}
        for kind in KINDS:
            own = records
            if data.name == EMBEDDED and kind == RATED:
                own = training_records(settings, 0, points=True)
            try:
                # What as_points says of scores, `origins` says too.
                judged[kind] = judged_records(own, kind, say=lambda _: None)
            except ValueError as error:
                judged[kind] = str(error).removeprefix("rows: ")
        cautions += _one_sided(judged)
    count = f"{len(rows or records)} rows"
    prompts = len({row[GROUP] for row in records if GROUP in row})
    said += f"\n{count}, completions of {prompts} prompts" if prompts else f"\n{count}"
    origins = _origins(rows or records, records)
    made_of = _made_of(records, origins)
    if data.name == EMBEDDED:
        made_of[RATED] = "texts and spoilt ones, rated by how much they are"
    return JudgedRows(said, records, judged, made_of, origins, list(dict.fromkeys(cautions)))


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What adapters and conversions warn of, instead of on the standard error stream."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, ear = logging.getLogger("fused_prefopt.data"), Ear(logging.WARNING)
    logger.addHandler(ear)
    try:
        yield said
    finally:
        logger.removeHandler(ear)


def _partly_filled(rows: Records) -> list[str]:
    """Columns that some rows have and others lack."""
    found = []
    for name in _READ:
        without = sum(row.get(name) is None for row in rows)
        if 0 < without < len(rows):
            found.append(f"{name}: {without} of {len(rows)} rows are without")
    return found


def _one_sided(judged: Mapping[str, Records | str]) -> list[str]:
    """Judgements that tell nothing apart, or say the opposite."""
    found = []
    pairs, labelled = judged[PAIRS], judged[LABELLED]
    if not isinstance(pairs, str):
        scores = [[row[name] for name in SCORES] for row in pairs if has_values(row, SCORES)]
        ties = sum(chosen == rejected for chosen, rejected in scores)
        reversed_ = sum(chosen < rejected for chosen, rejected in scores)
        if ties:
            found.append(f"{ties} of {len(pairs)} pairs have two equal scores")
        if reversed_:
            found.append(f"{reversed_} of {len(pairs)} pairs have a rejected one of higher score")
    if not isinstance(labelled, str) and len({bool(row[DESIRABLE]) for row in labelled}) == 1:
        label = str(bool(labelled[0][DESIRABLE])).lower()
        found.append(f"every completion is labelled {label}: nothing tells good from bad")
    return found


def _origins(rows: Records, records: Records) -> dict[str, str]:
    if CHOSEN in records[0]:
        rating = " and ".join(SCORES if has_values(records[0], SCORES) else ("1", "0"))
        return {REWARD: rating, DESIRABLE: " and ".join(PAIR), GROUP: "the pair"}
    rating = column_of(rows, (*RATINGS, *LIST_RATINGS)) or REWARD
    label = column_of(rows, LABELS) or rating
    group = "the list" if COMPLETIONS in records[0] else GROUP
    scores = dict.fromkeys((REWARD, REWARDS, *SCORES), rating)
    return scores | {DESIRABLE: label, GROUP: group}


def _made_of(records: Records, origins: Mapping[str, str]) -> dict[str, str]:
    if CHOSEN in records[0]:
        both = "both completions of a pair"
        rated, labelled = f"rated {origins[REWARD]}", "the chosen one desirable"
        return {PAIRS: "the rows", RATED: f"{both}, {rated}", LABELLED: f"{both}, {labelled}"}
    best = "the best and the worst completion of a prompt"
    if COMPLETIONS in records[0]:
        pairs = sum(_pairs_of(record[REWARDS]) for record in records)
        return {
            LISTS: f"the rows: {pairs} pairs, every two completions of a list whose scores differ",
            RATED: "the completions of the lists",
            LABELLED: f"{best}, the best one desirable",
        }
    are_labelled = origins[DESIRABLE] in LABELS
    labelled = "the rows" if are_labelled else f"{best}, the best one desirable"
    return {PAIRS: best, RATED: "the rows", LABELLED: labelled}


def _pairs_of(scores: Sequence[float]) -> int:
    """How many two of the scores differ."""
    alike = Counter(scores).values()
    return (len(scores) ** 2 - sum(count**2 for count in alike)) // 2
