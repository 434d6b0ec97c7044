"""Numbered groups in any order, without asking a device how many there are."""

from __future__ import annotations

import torch
from torch import Tensor


def places(numbers: Tensor) -> Tensor:
    """(n,) int64 the numbers as 0, 1, … in their order: equal where they are.

    Args:
        numbers: (n,) integers.
    """
    # torch.unique would wait for the number of groups on CUDA; sorting does not.
    ordered, order = numbers.sort()
    found = torch.zeros_like(order)
    found[order[1:]] = (ordered[1:] != ordered[:-1]).cumsum(0)
    return found


def sums(values: Tensor, place: Tensor) -> Tensor:
    """(n,) sums of the values of each place, in the same order of terms in every run.

    Args:
        values: (n,).
        place: (n,) int64 below n, such as `places` returns.
    """
    # scatter_add would add on CUDA in whatever order its threads come.
    return torch.zeros_like(values).index_put((place,), values, accumulate=True)
