"""A batch sampler that keeps the completions of one prompt together."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence


class GroupBatchSampler:
    """Batches of whole groups, for losses that average over the completions of a prompt.

    Each epoch visits every index once. A group never spans two batches unless it is larger than a
    batch. Pass it to a DataLoader as `batch_sampler`.

    Args:
        groups: one integer per dataset row, equal for the completions of one prompt.
        batch_size: most rows in a batch.
        shuffle: visit the groups in another order each epoch.
        seed: of the order; the same seed and epoch give the same batches in every process.

    Raises:
        ValueError: `batch_size` is below 1.
    """

    drop_last = False

    def __init__(
        self, groups: Sequence[int], batch_size: int, shuffle: bool = True, seed: int = 0
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, wanted at least 1")
        rows: dict[int, list[int]] = {}
        for row, group in enumerate(groups):
            rows.setdefault(int(group), []).append(row)
        self._rows = list(rows.values())
        self._most = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    @property
    def batch_size(self) -> int | None:
        """Rows in every batch but the last, or None when they may differ.

        accelerate reads it, and skips batches of any other size when it deals them to processes.
        """
        sizes = {len(rows) for rows in self._rows}
        return self._most if len(sizes) == 1 and self._most % sizes.pop() == 0 else None

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches())

    def _batches(self) -> list[list[int]]:
        order = list(self._rows)
        if self.shuffle:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        batches: list[list[int]] = []
        for rows in order:
            if not batches or len(batches[-1]) + len(rows) > self._most:
                batches += [rows[i : i + self._most] for i in range(0, len(rows), self._most)]
            else:
                batches[-1] = batches[-1] + rows
        return batches
