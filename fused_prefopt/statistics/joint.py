"""Two statistics of one batch, kept and saved together."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from fused_prefopt.statistics.base import Statistic


class JointStatistic(Statistic):
    """What a margin and a scale remember of the same pairs.

    A failure in either leaves both as they were. `nonfinite` is the larger of their counts.

    Args:
        margin: sees the first row of what is observed; None where the margin remembers nothing.
        scale: sees the second.
    """

    def __init__(self, margin: Statistic | None, scale: Statistic) -> None:
        super().__init__()
        self.margin = margin
        self.scale = scale

    @torch.no_grad()
    def forward(self, observed: Tensor) -> tuple[Any, Any]:
        """Pass a batch on.

        Args:
            observed: (2, P) this rank's values; P may be 0.

        Returns:
            What the two statistics return; None for the one that is not there.
        """
        for part in (self.margin, self.scale):
            if part is not None:
                part.process_group, part.sees_all_ranks = self.process_group, self.sees_all_ranks
        if self.margin is None:
            scale = self.scale(observed[1])
            self.nonfinite.copy_(self.scale.nonfinite)
            return None, scale
        before = copy.deepcopy(self.margin.state_dict())
        margin = self.margin(observed[0])
        try:
            scale = self.scale(observed[1])
        except BaseException:
            self.margin.load_state_dict(before)
            raise
        self.nonfinite.copy_(torch.maximum(self.margin.nonfinite, self.scale.nonfinite))
        return margin, scale
