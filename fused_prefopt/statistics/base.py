"""State of a loss, one module or two: it keeps its precision, and all ranks agree on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_prefopt.distributed import world_size


class Statistic(nn.Module):
    """A module that turns detached per-pair values into what a loss needs to know of them.

    In training each call first takes the batch of all ranks into the state, so every rank must
    make the call, also one with zero pairs. In eval the state is frozen and nothing is
    communicated: ranks may evaluate unequal numbers of batches, or only one of them.

    Attributes:
        nonfinite: 0-d int64 buffer, values skipped in training so far because they were NaN or
            infinite, over all ranks.
        process_group: the ranks that share one state; None means all of them.
        sees_all_ranks: what it is shown is the batch of all ranks already: nothing is
            communicated.
        batches_per_step: batches of training that make one step of the optimizer. The trainers say
            it before each batch, as an epoch's last step may be of fewer; a loop of your own that
            accumulates gradients sets it.
    """

    nonfinite: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("nonfinite", torch.zeros((), dtype=torch.int64))
        self.process_group: dist.ProcessGroup | None = None
        self.sees_all_ranks = False
        self.batches_per_step = 1

    def inform(self, part: Statistic) -> None:
        """Let a part know of ranks and steps what this one does."""
        part.process_group, part.sees_all_ranks = self.process_group, self.sees_all_ranks
        part.batches_per_step = self.batches_per_step

    @property
    def gathers(self) -> bool:
        """Whether a call exchanges the batch with other ranks."""
        return self.training and not self.sees_all_ranks and world_size(self.process_group) > 1

    @staticmethod
    def _store(state: Tensor, value: Tensor) -> None:
        """Overwrite a buffer with a value of its shape."""
        # Through a view: torch.compile loses what is written to a 0-d float64 tensor on CPU itself,
        # which it takes for a Python number (torch 2.13, all backends but "eager").
        state[...] = value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # `parent.half()` or `.to(bfloat16)` would round the running sums: follow the device only.
        def keep_dtype(state: Tensor) -> Tensor:
            moved = fn(state)
            return moved if moved.dtype == state.dtype else state.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class JointStatistic(Statistic):
    """Statistics of a margin and of a scale, on the same pairs.

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
                self.inform(part)
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
