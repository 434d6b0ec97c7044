"""Scores, reference log-probs and labels in rows of TRL's data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from datasets import Dataset

from fused_prefopt.data.columns import finite_number, judgement, row_at

LABEL = "label"


def require_values(name: str, data: Any, columns: Iterable[str]) -> None:
    """Raise ValueError, with the row's number, if a row has what no loss can take.

    A stream is left to the collators.

    Args:
        name: of the data set, as TRL calls it: "train", "eval" or a key of several.
        data: a `datasets.Dataset`.
        columns: those to look at, where they are there: scores and log-probs, which are finite
            numbers or None, and `LABEL`, which is a bool, 0 or 1.
    """
    if not isinstance(data, Dataset):
        return
    argument = f"{name}_dataset" if name in ("train", "eval") else f"eval_dataset[{name!r}]"
    for column in columns:
        if column not in data.column_names:
            continue
        # A slice of the column, not its rows one by one.
        for row, value in enumerate(data[column][:]):
            where = f"{row_at(row)} of {argument}"
            if column == LABEL:
                judgement(column, value, where)
            elif value is not None:
                finite_number(column, value, where)
