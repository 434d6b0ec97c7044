"""Batches of different sizes: an optimizer step is the mean over all its pairs, whoever holds them.

`transformers.Trainer` divides each batch's mean by the number of batches, and data parallelism
takes the mean over ranks: a pair of a small batch would count more than one of a large one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import BatchSampler
from transformers.trainer_utils import has_length

from fused_prefopt.data import ListCollator, PairCollator, PointCollator
from fused_prefopt.data.columns import (
    COMPLETION_MASK,
    GROUPS,
    INPUT_IDS,
    NUM_SEQUENCES,
    SEGMENTS,
    SPENT,
)
from fused_prefopt.data.labels import number_of_groups
from fused_prefopt.distributed import gather_objects, host_group, rank, world_size
from fused_prefopt.losses.counts import counts_groups, is_mixed
from fused_prefopt.losses.protocol import Loss
from fused_prefopt.models.batch import given_fields

if TYPE_CHECKING:
    from fused_prefopt.integrations.attach import Attachment

# Number of a batch that a rank does not have.
_NO_BATCH = -1


class WeighsBatches:
    """Mixin for a `transformers.Trainer` with an `attachment`: no pair counts more than another.

    In front of the mixins that look at a step's losses. Each batch's loss is weighed by its number
    of pairs (lists, completions, groups) among those of the optimizer step's batches on all ranks.
    These are counted on the host, and exchanged once a step where ranks may hold different ones.
    A rank whose stream of rows has ended before the others' goes on with a batch that counts
    nothing, until all have ended. Of a loss that spans its batch each batch of all ranks counts
    alike, of a sum of means over groups and over completions each batch; where a
    `compute_loss_func` makes the loss, nothing is weighed.

    Raises:
        ValueError: ranks have different numbers of batches where the trainer counts its steps by
            them, or the loss has `uneven_ranks`, which would weigh twice.
    """

    attachment: Attachment
    args: Any
    accelerator: Any
    callback_handler: Any
    data_collator: Any
    # What the loss of the batch at hand is multiplied with.
    batch_share: float = 1.0
    # Whether batches are weighed here; not where a framework has its own way.
    weighs_batches: bool = True
    _shares: Iterator[float] = iter(())
    _dealt_by: Any = None
    _exchange: _Exchange | None = None
    # What gives an epoch's batches, after the last of them on any rank.
    _ended: Any = None
    # A group of ranks, and the same for tensors on the CPU.
    _hosts: tuple[dist.ProcessGroup | None, dist.ProcessGroup | None] | None = None

    def get_batch_samples(
        self, epoch_iterator: Any, *args: Any, **kwargs: Any
    ) -> tuple[list[Any], Any]:
        """The trainer's own, an optimizer step's batches, which are weighed as they come."""
        own = super().get_batch_samples  # type: ignore[misc]
        samples, items = own(epoch_iterator, *args, **kwargs)
        # Of a stream transformers asks on until the training's last step, in each epoch.
        if not self.weighs_batches or epoch_iterator is self._ended:
            return samples, items
        loss = self.attachment.loss_fn.loss
        self._begin(self.callback_handler.train_dataloader)
        mixed = is_mixed(loss)
        counts = [1 if mixed else _count(loss, each) for each in samples]
        world, total, steps = 1, sum(counts), len(samples)
        if self._exchange is not None:
            world = self._exchange.world
            most = self.args.gradient_accumulation_steps
            total, steps, spent = self._exchange.of_step(samples, counts, most)
            samples, counts = samples + spent, counts + [0] * len(spent)
        if not steps:
            self._ended = epoch_iterator
        if loss.coupled or not total:
            self._shares = iter(())
        else:
            self._shares = iter([count * steps * world / total for count in counts])
        return samples, items

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's own, of the next of the step's batches."""
        self.batch_share = next(self._shares, 1.0)
        try:
            found: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
            return found
        finally:
            self.batch_share = 1.0

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own; every batch of a rank meets one of every other."""
        group = self.attachment.loss_fn.process_group
        if world_size(group) > 1:
            if has_length(dataloader):
                _require_one_length("eval_dataset", gather_objects(len(dataloader), group))
            else:
                dataloader = _Together(dataloader, self._host_group(group))
        return super().evaluation_loop(dataloader, *args, **kwargs)  # type: ignore[misc]

    def weighed(self, loss: Tensor) -> Tensor:
        """A batch's loss times its share of the optimizer step.

        Args:
            loss: 0-d, a mean over the batch.
        """
        return loss if self.batch_share == 1.0 else self.batch_share * loss

    def rows_are_counted(self) -> bool:
        """Whether each row of a data set is one of what the loss is a mean over."""
        loss, collator = self.attachment.loss_fn.loss, self.data_collator
        if isinstance(collator, ListCollator):
            return counts_groups(loss, {GROUPS})
        if isinstance(collator, PointCollator):
            return not counts_groups(loss, {GROUPS})
        return isinstance(collator, PairCollator)

    def _begin(self, loader: Any) -> None:
        """See, once for each training's loader, whether the ranks' batches may differ."""
        if loader is not None and loader is self._dealt_by:
            return
        self._dealt_by, self._exchange = loader, None
        loss_fn = self.attachment.loss_fn
        if loss_fn.uneven_ranks:
            raise ValueError(
                "uneven_ranks: got True in a trainer, which weighs the ranks' batches itself; needs"
                " False"
            )
        group = loss_fn.process_group
        if world_size(group) == 1:
            return
        even = _deals_evenly(loader) and self.rows_are_counted()
        length = len(loader) if has_length(loader) else None
        every = gather_objects((even, length), group)
        _require_one_length("train_dataset", [each for _, each in every])
        if not all(each for each, _ in every):
            self._exchange = _Exchange(self._host_group(group))

    def _host_group(self, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
        """`host_group`, made once."""
        if self._hosts is None or self._hosts[0] is not group:
            self._hosts = group, host_group(group)
        return self._hosts[1]


class _Exchange:
    """Numbers of pairs of an optimizer step's batches, exchanged between the ranks.

    Args:
        group: of the ranks, for tensors on the CPU.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.world = world_size(group)
        self._last: Any = None

    def of_step(
        self, samples: list[Any], counts: list[int], most: int
    ) -> tuple[int, int, list[Any]]:
        """What a step is made of: its pairs on all ranks, its most batches on any, and fillers.

        Args:
            samples: this rank's batches.
            counts: pairs of each of them.
            most: batches that a step can have.

        Returns:
            With as many fillers, which count nothing, as this rank lacks batches: its data have
            ended.
        """
        missing = [_NO_BATCH] * (most - len(counts))
        self._last = samples[-1] if samples else self._last
        own = torch.tensor([*counts, *missing, self._last is not None])
        every = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(every, own, group=self._group)
        found, ready = torch.stack(every).split([most, 1], dim=1)
        there = (found != _NO_BATCH).sum(1)
        steps = int(there.max())
        if ((there < steps) & (ready[:, 0] == 0)).any():
            # A rank that never had one: its stream is empty, or ended before a resumed step.
            self._lend(int(there.argmax()))
        spent = [{**self._last, SPENT: True} for _ in range(steps - len(samples))]
        return int(found.clamp(min=0).sum()), steps, spent

    def _lend(self, lender: int) -> None:
        """Give a batch of one rank to those that have none; every rank must make the call."""
        mine = send_to_device(self._last, "cpu") if rank(self._group) == lender else None
        lent = gather_objects(mine, self._group)[lender]
        self._last = lent if self._last is None else self._last


class _Together:
    """A loader without a length that ends on all ranks at once.

    Args:
        loader: a data loader; every other attribute is its own.
        group: of the ranks, for tensors on the CPU.

    Raises:
        ValueError: one ends before another; on all ranks.
    """

    def __init__(self, loader: Any, group: dist.ProcessGroup | None) -> None:
        self._loader, self._group = loader, group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        while True:
            batch = next(batches, None)
            going = gather_objects(batch is not None, self._group)
            if len(set(going)) > 1:
                raise ValueError(
                    f"eval_dataset: got no more batches on rank {going.index(False)} while there"
                    f" are some on rank {going.index(True)}, needs as many on each rank: a stream"
                    " that each rank reads whole and takes its share of, or a data set with a"
                    " length"
                )
            if batch is None:
                return
            yield batch


def _require_one_length(name: str, lengths: list[int | None]) -> None:
    """Raise ValueError, on all ranks, where their loaders have different numbers of batches."""
    if len(set(lengths)) > 1:
        got = ", ".join(f"{length} on rank {rank}" for rank, length in enumerate(lengths))
        raise ValueError(
            f"{name}: got different numbers of batches ({got}), needs as many on each rank, by"
            " which the trainer counts its steps: set accelerator_config to"
            " {'even_batches': True}, or dataloader_drop_last=True"
        )


def _deals_evenly(loader: Any) -> bool:
    """Whether accelerate deals every rank as many rows in every batch, by repeating or dropping."""
    sampler = getattr(loader, "batch_sampler", None)
    return (
        isinstance(sampler, BatchSamplerShard)
        and type(sampler.batch_sampler) is BatchSampler
        and bool(sampler.even_batches or sampler.drop_last)
    )


def _count(loss: Loss, batch: Mapping[str, Any]) -> int:
    """What a loss is a mean over in a collated batch; of a batch that it does not see 1."""
    if COMPLETION_MASK not in batch:
        return 1
    given = {name for name, value in given_fields(batch).items() if value is not None}
    if counts_groups(loss, given):
        return number_of_groups(batch)
    if SEGMENTS in batch:
        return int(batch[INPUT_IDS].shape[0])
    sequences = batch.get(NUM_SEQUENCES, batch[INPUT_IDS].shape[0])
    return int(sequences // 2 if loss.pairwise else sequences)
