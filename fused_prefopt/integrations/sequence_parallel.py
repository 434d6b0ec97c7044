"""Trainers whose ranks share sequences: which groups the ranks are in, how batches are dealt out.

accelerate's `ParallelismConfig` with `cp_size` (torch's context parallelism) or `sp_size`
(DeepSpeed's Ulysses): the ranks of a sequence group are given one batch, shift its labels and cut
it; each runs its shard. With `tp_size` (tensor parallelism) they are given one batch, whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from fused_prefopt.data.columns import COMPLETION_MASK, INPUT_IDS, SEQUENCE_IDS, SHIFT_LABELS
from fused_prefopt.data.sequence_shards import shard_of
from fused_prefopt.distributed import gather_objects, rank, world_size
from fused_prefopt.integrations.layouts import has_row_for_each
from fused_prefopt.integrations.sequence_attention import (
    RingAttention,
    SharedAttention,
    UlyssesAttention,
)
from fused_prefopt.models.model_call import prompt_learners

# What transformers' trainer calls, or else shards would be whole batches to it.
_DOORS = {
    "cp_size": ("_prepare_context_parallel_inputs",),
    "sp_size": (
        "_prepare_context_parallel_inputs",
        "_prepare_for_training",
        "get_sp_size",
        "set_initial_training_values",
    ),
}

_PACKAGE = "fused_prefopt."
_LAYOUT = (
    "parallelism_config: got ranks that share sequences with {}, needs padded texts with a row for"
    " each sequence (padding_free=False, shared_prompt=False, no images)"
)


@dataclass(frozen=True, eq=False)
class SharedBatches:
    """Which ranks of a trainer are given one batch, and what each makes of it.

    Attributes:
        copies: ranks that are given each batch, next to each other.
        data: the ranks with other batches, this one among them; None for all ranks.
        sequences: the ranks with the other tokens of this rank's sequences; None where it has them
            whole.
        attention: of the shards; None where there are none.
        sums: how many ranks' gradients an engine adds up, where others take the mean over all.
    """

    copies: int = 1
    data: dist.ProcessGroup | None = None
    sequences: dist.ProcessGroup | None = None
    attention: SharedAttention | None = None
    sums: int = 1

    @classmethod
    def of(cls, trainer: Any) -> SharedBatches:
        """Those of a trainer's configuration. Every rank must make the call.

        Args:
            trainer: a `transformers.Trainer`, constructed as far as its accelerator.

        Raises:
            ValueError: the configuration, or this transformers, cannot be trained with.
        """
        accelerator = trainer.accelerator
        config: Any = getattr(accelerator, "parallelism_config", None)
        cp, sp = (getattr(config, f"{name}_size", None) or 1 for name in ("cp", "sp"))
        tp = trainer.get_tp_size() if hasattr(trainer, "get_tp_size") else 1
        copies, world = cp * sp * tp, world_size()
        if copies == 1 or world == 1:
            return cls()
        option, size = ("cp_size", cp) if cp > 1 else ("sp_size", sp)
        if world % copies or sp * tp > max(sp, tp):
            raise ValueError(
                f"parallelism_config: got {world} ranks with cp_size={cp}, sp_size={sp} and"
                f" tp_size={tp}, wanted a multiple of their product, and sp_size alone"
            )
        # In this order accelerate, and DeepSpeed alike, number the ranks.
        data = _group_with(range(first, world, copies) for first in range(copies))
        if size == 1:
            return cls(copies, data)
        missing = [name for name in _DOORS[option] if not hasattr(Trainer, name)]
        if missing:
            raise ValueError(
                f"{option}: got {size} with a transformers whose Trainer has no {missing[0]}, needs"
                " a newer one, or 1"
            )
        if cp > 1:
            mesh = accelerator.torch_device_mesh["cp"]
            return cls(copies, data, mesh.get_group(), RingAttention(mesh))
        if not trainer.is_deepspeed_enabled:
            raise ValueError(f"sp_size: got {sp} without DeepSpeed, whose Ulysses it is; needs 1")
        group = _group_with(range(first, first + sp) for first in range(0, world, sp))
        attention = UlyssesAttention(config.sp_handler.sp_attn_implementation, group)
        return cls(copies, data, group, attention, _summed(accelerator, sp))

    @property
    def by_deepspeed(self) -> bool:
        """Whether sequences are shared by DeepSpeed's Ulysses."""
        return isinstance(self.attention, UlyssesAttention)

    @property
    def repeats(self) -> int:
        """How many ranks hold each token of a batch: those of `tp_size`."""
        return self.copies if self.sequences is None else self.copies // world_size(self.sequences)

    @property
    def is_first(self) -> bool:
        """Whether this rank is the first of those with its batch."""
        return rank() % self.copies == 0

    def take(self, *models: nn.Module | None) -> None:
        """Let models be given shards; `SharedAttention.take`.

        Args:
            *models: causal language models, each once; None is none.

        Raises:
            ValueError: a model has another attention, or an adapter that learns a prompt.
        """
        if self.attention is None:
            return
        for model in models:
            if model is None:
                continue
            if prompt_learners(model):
                raise ValueError(
                    "parallelism_config: got ranks that share sequences with an adapter that learns"
                    " a prompt, which shards have no place for; needs another adapter (LoRA)"
                )
            self.attention.take(model)

    def shard(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's shard of a batch, which is whole where sequences are.

        Args:
            batch: of a collator, padded on the right, the same on all ranks of the sequence group.

        Raises:
            ValueError: it has another layout, or images.
        """
        if self.attention is None:
            return dict(batch)
        if SEQUENCE_IDS in batch:
            raise ValueError(_LAYOUT.format("packed sequences"))
        place = rank(self.sequences), world_size(self.sequences)
        attention = self.attention
        return shard_of(batch, *place, order=attention.order, multiple_of=attention.multiple_of)

    def running(self) -> AbstractContextManager[None]:
        """Context in which models' forward and backward passes are of shards."""
        found: AbstractContextManager[None]
        found = nullcontext() if self.attention is None else self.attention.running()
        return found

    def tell(self, attachment: Any) -> None:
        """Let an attached loss know of the ranks.

        Args:
            attachment: an `integrations.attach.Attachment`.
        """
        attachment.sequence_group = self.sequences
        if attachment.loss_fn.process_group is None:
            attachment.loss_fn.process_group = self.data

    def before_backward(self, loss: Tensor) -> None:
        """Let the engine's gradient of a loss be that of one process.

        Args:
            loss: 0-d, the same on all ranks with its batch.
        """
        if self.sums > 1 and loss.requires_grad:
            loss.register_hook(lambda gradient: gradient / self.sums)


def _group_with(groups: Any) -> dist.ProcessGroup:
    """This rank's one of process groups that every rank must make."""
    made = [(members, dist.new_group(list(members))) for members in groups]
    return next(group for members, group in made if rank() in members)


def _summed(accelerator: Any, ranks: int) -> int:
    """How many ranks' gradients DeepSpeed adds up: those of a sequence group, but at stage 3 none.

    Raises:
        ValueError: at stage 3 it would do so with some parameters, and with others not.
    """
    zero = accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
    if zero.get("stage", 0) != 3:
        return ranks
    if zero.get("reduce_scatter", True) is False:
        raise ValueError(
            f"zero_optimization: got reduce_scatter=False at stage 3 with sp_size={ranks}, by which"
            " DeepSpeed adds up some gradients and takes the mean of others; needs True"
        )
    return 1


def share_batches(trainer: Any) -> SharedBatches:
    """A trainer's `SharedBatches`, found once and left in its attribute `shared`.

    Args:
        trainer: a `transformers.Trainer` with a `data_collator`; every rank makes the call.

    Raises:
        ValueError: `SharedBatches.of` does, or the trainer's batches have a layout or images that
            cannot be cut, or would be other ones on each rank.
    """
    if "shared" not in vars(trainer):
        trainer.shared = SharedBatches.of(trainer)
    shared: SharedBatches = trainer.shared
    if shared.copies > 1 and trainer.accelerator.dispatch_batches:
        raise ValueError(
            "accelerator_config: got dispatch_batches=True with ranks that share batches"
            " (parallelism_config), to which accelerate would deal out different rows; needs"
            " dispatch_batches=False"
        )
    if shared.attention is not None:
        if getattr(trainer, "_is_vision_dataset", False):
            raise ValueError(_LAYOUT.format("images"))
        if not has_row_for_each(trainer.data_collator):
            raise ValueError(_LAYOUT.format("a collator that packs sequences or shares prompts"))
    return shared


def require_transformers_loss(trainer: Any) -> None:
    """Raise ValueError where a class's own `compute_loss` would never be called.

    Args:
        trainer: a `transformers.Trainer` whose `shared` is known.
    """
    kinds = (kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    own = next(kind for kind in kinds if not kind.__module__.startswith(_PACKAGE))
    if trainer.shared.by_deepspeed and own is not Trainer:
        raise ValueError(
            f"sp_size: got more than 1 with {own.__name__}.compute_loss, which transformers'"
            " cross-entropy of shards would take the place of; needs Trainer's own, or 1"
        )


class SharesBatches:
    """Mixin for a `transformers.Trainer` whose ranks may share batches; see `share_batches`.

    Batches come whole, the same on the ranks that share them, and are cut where a step begins.

    Attributes:
        shared: the trainer's ranks.
    """

    shared: SharedBatches = SharedBatches()
    _are_compared: bool = False
    accelerator: Any
    callback_handler: Any
    gather_function: Any
    state: Any

    def _prepare_context_parallel_inputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Callable[[], AbstractContextManager[None]], dict[str, Any]]:
        """What a training step is run in, and its shard."""
        if SHIFT_LABELS in inputs:
            # Of an evaluation, which is in that context.
            return nullcontext, inputs
        if self.shared.attention is None:
            found: tuple[Any, dict[str, Any]]
            found = super()._prepare_context_parallel_inputs(model, inputs)  # type: ignore[misc]
            return found
        if COMPLETION_MASK not in inputs:
            raise ValueError(
                f"{COMPLETION_MASK}: got a batch without it ({', '.join(inputs)}), which would not"
                " be spread over the ranks as others are; needs preference batches alone"
            )
        return self.shared.running, self._shard(inputs)

    def _shard(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """`SharedBatches.shard`; the first batch that a loader gives is compared between ranks.

        Raises:
            ValueError: it is another one on another rank of the group.
        """
        if not self._are_compared:
            self._are_compared = True
            ids = inputs[INPUT_IDS]
            own = tuple(ids.shape), zlib.crc32(ids.cpu().contiguous().numpy().tobytes())
            every = gather_objects(own, self.shared.sequences)
            if len(set(every)) > 1:
                shapes = ", ".join(str(shape) for shape, _ in every)
                raise ValueError(
                    "parallelism_config: got different batches on ranks that share sequences"
                    f" (input_ids of shapes {shapes}), wanted one: a data loader that accelerate"
                    " has prepared (`accelerator.prepare`), and a collator that draws nothing"
                )
        return self.shared.shard(inputs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """The trainer's own, of a shard: the loss alone."""
        step = super().prediction_step  # type: ignore[misc]
        if self.shared.attention is None or COMPLETION_MASK not in inputs:
            return step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        with self.shared.running():
            return step(model, self._shard(inputs), True, ignore_keys=ignore_keys)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, in whose means each row counts once."""
        self._deal(dataloader)
        self._are_compared = False
        if self.shared.copies > 1:
            self.gather_function = self._gather_once
        return super().evaluation_loop(dataloader, *args, **kwargs)  # type: ignore[misc]

    def _gather_once(self, values: Tensor) -> Tensor:
        """`gather_for_metrics` of values that are the same on all ranks with one batch."""
        every: Tensor = self.accelerator.gather(values)
        ranks = every.unflatten(0, (world_size(), -1))
        every, state = ranks[:: self.shared.copies].flatten(0, 1), self.accelerator.gradient_state
        # What repeats rows, so that the last batches are of one size, is no part of the data.
        repeats = state.end_of_dataloader and state.remainder > 0
        return every[: state.remainder] if repeats else every

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)  # type: ignore[misc]
        # Each rank counts its batch.
        new = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + new // self.shared.copies

    def floating_point_ops(self, inputs: Any) -> int:
        """The trainer's own, of this rank's share of a batch."""
        whole: int = super().floating_point_ops(inputs)  # type: ignore[misc]
        return whole // self.shared.copies

    # Under Ulysses accelerate deals a batch to every rank, of which DeepSpeed's adapter makes a
    # step each of all ranks of the group. It takes columns of tokens alone, so here the ranks of a
    # group are dealt one batch, as they are where torch's context parallelism shares sequences.

    def set_initial_training_values(self, args: Any, dataloader: Any, *more: Any) -> Any:
        """The trainer's own, of batches that the ranks of a group share."""
        self._deal(dataloader)
        self._are_compared = False
        return super().set_initial_training_values(args, dataloader, *more)  # type: ignore[misc]

    def get_sp_size(self) -> int:
        """Steps that are made of a batch: 1."""
        size: int = 1 if self.shared.by_deepspeed else super().get_sp_size()  # type: ignore[misc]
        return size

    def get_total_train_batch_size(self, args: Any) -> int:
        """The trainer's own, of batches that the ranks of a group share."""
        own: int = super().get_total_train_batch_size(args)  # type: ignore[misc]
        ranks = world_size(self.shared.sequences) if self.shared.by_deepspeed else 1
        return own // ranks

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        model, loader = super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]
        if self.shared.by_deepspeed:
            # From inside DeepSpeed's adapter.
            loader = self.callback_handler.train_dataloader = loader.dl
        return model, loader

    def _deal(self, loader: Any) -> None:
        """Let the ranks of a group have one batch of a data loader of accelerate's."""
        if not self.shared.by_deepspeed:
            return
        samplers = (getattr(loader, name, None) for name in ("batch_sampler", "sampler"))
        dealt = next((each for each in samplers if hasattr(each, "process_index")), None)
        if dealt is None:
            raise ValueError(
                f"sp_size: got more than 1 with a {type(loader).__name__} of a"
                f" {type(getattr(loader, 'dataset', None)).__name__}, whose batches accelerate does"
                " not deal out by their number; needs a data set with a length"
            )
        dealt.num_processes = world_size(self.shared.data)
        dealt.process_index = rank(self.shared.data)
        if dealt.num_processes == 1:
            # One process repeats no rows.
            dealt.even_batches = False
