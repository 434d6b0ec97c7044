"""The pool of reward margins that γ-PO shares its margin budget over."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_prefopt.checks import require_count
from fused_prefopt.distributed import gather_over_ranks
from fused_prefopt.statistics.base import Statistic


@dataclass(frozen=True)
class MarginPool:
    """Reward margins of the current global batch, followed by a sample of past ones.

    Attributes:
        margins: (n,) float64; non-finite entries are kept in place, for the solver to skip.
        start: index of this rank's first pair.
    """

    margins: Tensor
    start: int

    def local(self, values: Tensor, pairs: int) -> Tensor:
        """The (pairs,) entries of `values`, (n,), that belong to this rank's pairs."""
        return values[self.start : self.start + pairs]


class MarginQueue(Statistic):
    """First-in-first-out memory of reward margins, which enter it after they were used.

    Every rank holds the same queue of the global batches' margins and draws the same sample of
    it, without replacement. NaN marks an empty place, so shapes never depend on values and CUDA
    needs no wait. In eval the same past is sampled from a copy of the generator and the current
    margins are those of this rank only.

    Args:
        queue_size: margins remembered; 0 makes the pool the current global batch (Algorithm 1).
        sample_size: the pool is filled up from the past to this size, as far as there is a past;
            a batch of that size or larger draws nothing.
        seed: of the generator that draws; its state is saved with `state_dict`.

    Raises:
        ValueError: a size is not a count.

    Source: γ-PO, Appendix C, Algorithm 2.
    """

    margins: Tensor

    def __init__(self, queue_size: int = 2048, sample_size: int = 256, seed: int = 0) -> None:
        super().__init__()
        require_count("queue_size", queue_size)
        require_count("sample_size", sample_size, low=1)
        require_count("seed", seed)
        self.sample_size = sample_size
        self.generator = torch.Generator().manual_seed(seed)
        empty = torch.full((queue_size,), torch.nan, dtype=torch.float64)
        self.register_buffer("margins", empty)

    @torch.no_grad()
    def forward(self, observed: Tensor) -> MarginPool:
        """Return the pool for a batch, then (training only) let the batch enter the queue.

        Args:
            observed: (P,) reward margins of this rank's pairs; P may be 0.

        Returns:
            The pool, current margins first.

        Raises:
            ValueError: the ranks' queues are not at the same step; on all of them.
        """
        take = self._take
        if torch.compiler.is_compiling():
            # The generator's state is no part of a graph: one break here instead of ten. Disabled
            # by a decorator, importing this would import Triton.
            take = torch.compiler.disable(take)
        return take(observed)

    def _take(self, observed: Tensor) -> MarginPool:
        current, start = observed.detach().to(torch.float64), 0
        if self.training and not self.sees_all_ranks:
            # Known on the host: it tells of a rank that restored another queue, or saw more steps.
            draws = zlib.crc32(self.generator.get_state().numpy().tobytes())
            contents = f"reward margins and draws of the queue in state {draws:08x}"
            current, start = gather_over_ranks(current, self.process_group, contents=contents)
        generator = self.generator.clone_state()
        pool = MarginPool(torch.cat([current, self._draw(current.shape[0], generator)]), start)
        if self.training:
            margins = self._enqueued(current)
            # Commit only now, when nothing can fail any more.
            self.margins.copy_(margins)
            self.nonfinite.add_(current.isfinite().logical_not().sum())
            self.generator.set_state(generator.get_state())
        return pool

    def _draw(self, current: int, generator: torch.Generator) -> Tensor:
        """Up to `sample_size − current` past margins; NaN where the past has fewer."""
        places = self.margins.shape[0]
        draws = min(max(0, self.sample_size - current), places)
        past = self.margins[self.order(generator)]
        return past[past.isnan().to(torch.uint8).argsort(stable=True)[:draws]]

    def order(self, generator: torch.Generator) -> Tensor:
        """(queue_size,) int64 random order in which the filled places are drawn."""
        # From the CPU's generator: the same on every device, and saved without a wait.
        order = torch.randperm(self.margins.shape[0], generator=generator, device="cpu")
        return order.to(self.margins.device, non_blocking=True)

    def _enqueued(self, current: Tensor) -> Tensor:
        """The queue after `current`, (n,), entered: oldest first, behind the empty places."""
        finite = current.isfinite()
        entering = current[finite.logical_not().to(torch.uint8).argsort(stable=True)]
        joined = torch.cat([self.margins, entering])
        # The last places before the end of what enters, without asking how many that are.
        return joined[finite.sum() + torch.arange(self.margins.shape[0], device=joined.device)]

    def get_extra_state(self) -> Tensor:
        """State of the generator, a uint8 tensor."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` returned, from whichever device it was loaded to."""
        self.generator.set_state(state.cpu())
