"""Columns of features as tensors: which a batch is to have, and their values, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_prefopt.data.columns import (
    SCORES,
    finite_number,
    has_values,
    judgement,
    require_columns,
    whole_number,
)

Feature = Mapping[str, Any]
# Not every row of a data set need have been scored.
_PARTLY = ("reward", *SCORES)
_READ = {torch.float32: finite_number, torch.int64: whole_number, torch.bool: judgement}


def is_given(features: Sequence[Feature], *names: str) -> bool:
    """Whether a batch is to have columns: any feature has one; of scores, every one has all."""
    there = [name for name in names if any(name in feature for feature in features)]
    if len(there) == len(names) and set(names) <= set(_PARTLY):
        return all(has_values(feature, names) for feature in features)
    return any(feature.get(name) is not None for feature in features for name in there)


def stacked(features: Sequence[Feature], name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A column of the features.

    Args:
        features: S rows.
        name: of the column.
        dtype: float32 for numbers, int64 for groups, bool for labels.

    Returns:
        (S,) of that dtype.

    Raises:
        ValueError: a feature has no value, or one that is none of its kind or not finite; the
            message has the feature's index.
    """
    values = []
    for index, feature in enumerate(features):
        where = f"feature {index}"
        require_columns(feature, (name,), where)
        if feature[name] is None:
            raise ValueError(f"{name}: got None in {where}, needs a value in each or none")
        values.append(_READ[dtype](name, feature[name], where))
    column = torch.tensor(values, dtype=dtype)
    if dtype.is_floating_point and not column.isfinite().all():
        index = int(column.isfinite().logical_not().nonzero()[0])
        raise ValueError(
            f"{name}: got {values[index]!r} in feature {index}, wanted a number within {dtype};"
            " scale the column"
        )
    return column
