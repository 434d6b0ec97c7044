"""The statistics of the terms of a sum of losses, as one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fused_prefopt.statistics.base import Statistic


class TermStatistics(Statistic):
    """A sum's statistics, one for each term that keeps one, under the name of its term.

    A failure in one leaves all as they were. `nonfinite` is the largest of their counts.

    Args:
        parts: what each term keeps, or None, by the term's name: a saved state finds its term
            again, wherever in a sum that stands.
    """

    def __init__(self, parts: Mapping[str, Statistic | None]) -> None:
        super().__init__()
        self._names = tuple(parts)
        for name, part in parts.items():
            if part is not None:
                self.add_module(name, part)

    @torch.no_grad()
    def forward(self, observed: Sequence[Any]) -> tuple[Any, ...]:
        """Pass a batch on.

        Args:
            observed: what each term's loss observes of this rank's batch.

        Returns:
            What each term's statistic returns; None for one that is not there.
        """
        with self.updating() as parts:
            return tuple(
                None if part is None else part(values)
                for part, values in zip(parts, observed, strict=True)
            )

    @contextmanager
    def updating(self) -> Iterator[list[Statistic | None]]:
        """Each term's statistic, ready to be called, while a batch goes through all of them."""
        parts: list[Any] = [self._modules.get(name) for name in self._names]
        there = [part for part in parts if part is not None]
        for part in there:
            self.inform(part)
        # A single one leaves itself as it was.
        before = [copy.deepcopy(part.state_dict()) for part in there] if len(there) > 1 else []
        try:
            yield parts
        except BaseException:
            for part, state in zip(there, before, strict=False):
                part.load_state_dict(state)
            raise
        counts = [part.nonfinite for part in there]
        self.nonfinite.copy_(torch.stack(counts).max())
