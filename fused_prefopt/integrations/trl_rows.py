"""Scores, reference log-probs and labels in rows of TRL's data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset

LABEL = "label"


def require_values(name: str, data: Any, columns: Iterable[str]) -> None:
    """Raise ValueError, with the row's number, if a row has what no loss can take.

    A stream is left to `require_values_of_batch`.

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
        if column in data.column_names:
            # A slice of the column, not its rows one by one.
            for row, value in enumerate(data[column][:]):
                _require(argument, column, value, f"row {row}")


def require_values_of_batch(examples: Sequence[Mapping[str, Any]], columns: Iterable[str]) -> None:
    """The same of a collator's examples.

    Args:
        examples: of one batch.
        columns: as in `require_values`.
    """
    for column in columns:
        for row, example in enumerate(examples):
            if column in example:
                _require("data set", column, example[column], f"row {row} of a batch")


def _require(argument: str, column: str, value: Any, where: str) -> None:
    fits: Callable[[Any], bool] = _is_label if column == LABEL else _is_number
    if not fits(value):
        wanted = "True, False, 1 or 0" if column == LABEL else "a finite number or None"
        raise ValueError(
            f"{argument}: got {column}={value!r} in {where}, needs {wanted}; correct the row or"
            " leave it out"
        )


def _is_label(value: Any) -> bool:
    return value in (0, 1)


def _is_number(value: Any) -> bool:
    try:
        return value is None or math.isfinite(value)
    except TypeError:
        return False
