"""Attention of sequences whose tokens are spread over ranks: torch's ring, DeepSpeed's Ulysses.

Both see to it that a token sees all tokens before it, on whatever rank these are. They know of no
padding, so it stands behind the tokens, where none sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fused_prefopt.data.sequence_shards import BALANCED, CONTIGUOUS
from fused_prefopt.models.causal_lm import backbone_of, text_config

# Where transformers' layers have their attention.
_ATTENTION = "self_attn"
_FULL = "full_attention"


class SharedAttention(Protocol):
    """What makes the attention of models that get shards one over the ranks.

    Attributes:
        order: of `data.sequence_shards.ORDERS`, in which the ranks must have the tokens.
        multiple_of: as in `data.sequence_shards.shard_of`, of what a shard's length is a multiple.
    """

    @property
    def order(self) -> str: ...

    @property
    def multiple_of(self) -> int: ...

    def take(self, model: nn.Module) -> None:
        """Make a model ready to be given shards; raise ValueError if its attention is another."""

    def running(self) -> Any:
        """Context in which the models' forward and backward passes are of shards."""


class RingAttention:
    """torch's context parallelism: keys and values go round, and the ranks have as much to do.

    Args:
        mesh: one-dimensional `DeviceMesh` of the ranks that share sequences.
    """

    # The kernel that fp32 gets on CUDA (memory-efficient attention) gives log-sum-exps of so many
    # tokens at once, filled up; torch merges them, of half a shard too, as if there were no more
    # than tokens. "balanced" makes each half a multiple.
    multiple_of = 32

    def __init__(self, mesh: Any) -> None:
        self._mesh = mesh
        self._is_running = False

    @cached_property
    def order(self) -> str:
        """As torch deals tokens out, asked of itself: an option that it keeps to itself says."""
        ranks = self._mesh.size()
        places = torch.arange(2 * ranks, device=self._mesh.device_type)[None]
        with self._context(places):
            own = places[0].tolist()
        number = self._mesh.get_local_rank()
        known = {
            BALANCED: [number, 2 * ranks - 1 - number],
            CONTIGUOUS: [2 * number, 2 * number + 1],
        }
        for order, wanted in known.items():
            if own == wanted:
                return order
        raise ValueError(
            f"context_parallel: got tokens {own} of {2 * ranks} on rank {number}, wanted one of"
            f" {', '.join(map(str, known.values()))}: this torch deals tokens out in another way"
        )

    def take(self, model: nn.Module) -> None:
        """Let a model's layers drop their masks, and its backbone make none.

        Args:
            model: causal language model, in its wrappers or before it gets them.

        Raises:
            ValueError: its attention is not `sdpa`, not in layers' `self_attn`, or not of all
                tokens before a token.
        """
        from accelerate.big_modeling import _attach_context_parallel_hooks

        _require_implementation(model, "sdpa", "cp_size")
        _require_full_attention(model, "cp_size", slides=False)
        if not any(name.endswith(_ATTENTION) for name, _ in model.named_modules()):
            raise ValueError(
                f"cp_size: got more than 1 with a {type(model).__name__}, which has no"
                f" `{_ATTENTION}` modules whose mask can be dropped; needs a model that has, or 1"
            )
        # accelerate does so with the model that it prepares, and with no reference. Twice is once.
        _attach_context_parallel_hooks(model)
        backbone_of(model).register_forward_pre_hook(self._leave_mask_out, with_kwargs=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """`SharedAttention.running`."""
        # It asks for a tensor to deal out, whose length decides on the order.
        places = torch.arange(2 * self._mesh.size(), device=self._mesh.device_type)[None]
        with self._context(places):
            self._is_running = True
            try:
                yield
            finally:
                self._is_running = False

    def _context(self, places: Tensor) -> Any:
        from torch.distributed.tensor.experimental import context_parallel

        options: dict[str, Any] = {"buffer_seq_dims": [1], "no_restore_buffers": {places}}
        return context_parallel(self._mesh, buffers=[places], **options)

    def _leave_mask_out(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook: a mask that is there already.

        Without one transformers takes positions that jump for packed sequences, and makes of those
        a mask of (T, T) for the layers to drop. An empty one that no layer dropped would not fit.
        """
        ids = kwargs.get("input_ids")
        if not self._is_running or ids is None or kwargs.get("attention_mask") is not None:
            return None
        mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=ids.device)
        return args, {**kwargs, "attention_mask": mask}


class UlyssesAttention:
    """DeepSpeed's Ulysses: all-to-alls give each rank some of the heads of whole sequences.

    Its own wrapper, which it puts in the place of transformers' attention function when training
    starts, takes batches of one number of rows alone, and in eval mode treats shards as whole
    sequences. So the same module is called here, in both modes, made for the rows that come.

    Args:
        implementation: transformers' name of the attention function.
        group: the ranks that share sequences.

    Raises:
        ValueError: the function needs a mask to be causal.
    """

    order, multiple_of = CONTIGUOUS, 1

    def __init__(self, implementation: str | None, group: dist.ProcessGroup) -> None:
        if implementation is None or (implementation != "sdpa" and "flash" not in implementation):
            raise ValueError(
                f"sp_attn_implementation: got {implementation!r} in the sp_handler of"
                " parallelism_config, wanted that of the model: 'sdpa' or a flash attention"
            )
        self._implementation = implementation
        self._group = group
        self._own: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[implementation]
        self._made: dict[tuple[int, ...], Callable[..., Any]] = {}

    def take(self, model: nn.Module) -> None:
        """Check a model's attention.

        Args:
            model: causal language model.

        Raises:
            ValueError: it is another one, or sees less than all tokens before a token, and no
                argument of the function says so.
        """
        _require_implementation(model, self._implementation, "sp_size")
        _require_full_attention(model, "sp_size", slides="flash" in self._implementation)

    @contextmanager
    def running(self) -> Iterator[None]:
        """`SharedAttention.running`."""
        name, before = self._implementation, ALL_ATTENTION_FUNCTIONS[self._implementation]
        ALL_ATTENTION_FUNCTIONS[name] = self._over_ranks
        try:
            yield
        finally:
            ALL_ATTENTION_FUNCTIONS[name] = before

    def _over_ranks(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """An attention function of transformers', (S, heads, T_local, size) of this rank's tokens.

        The mask is one of a shard, which nothing of whole sequences fits: positions say it all.
        """
        rows, heads, _, size = query.shape
        sizes = rows, heads, key.shape[1], size
        if sizes not in self._made:
            self._made[sizes] = self._ulysses(*sizes)
        before = getattr(module, "num_key_value_groups", None)
        try:
            return self._made[sizes](module, query, key, value, None, *args, **kwargs)
        finally:
            if before is not None:
                # Where ranks are more than heads of keys, that of each rank is another.
                module.num_key_value_groups = before

    def _ulysses(self, rows: int, heads: int, kv_heads: int, size: int) -> Callable[..., Any]:
        from deepspeed.runtime.sequence_parallel import ulysses_sp

        made: Callable[..., Any] = ulysses_sp.UlyssesSPAttentionHF(
            attn=self._own,
            batch_size=rows,
            attn_head_count=heads,
            attn_head_size=size,
            kv_head_count=kv_heads,
            num_hidden_layers=1,
            process_group=self._group,
            seq_length_is_variable=True,
        )
        return made


def _require_implementation(model: nn.Module, wanted: str, option: str) -> None:
    found = getattr(text_config(model), "_attn_implementation", None)
    if found != wanted:
        raise ValueError(
            f"{option}: got more than 1 with a {type(model).__name__} whose attn_implementation is"
            f" {found!r}, wanted {wanted!r}"
        )


def _require_full_attention(model: nn.Module, option: str, *, slides: bool) -> None:
    """Raise ValueError unless a token of every layer sees all before it, or `slides` and it may."""
    config = text_config(model)
    layers = set(getattr(config, "layer_types", None) or ())
    if not layers and getattr(config, "sliding_window", None):
        layers = {"sliding_attention"}
    others = layers - {_FULL, *(["sliding_attention"] if slides else [])}
    if others:
        raise ValueError(
            f"{option}: got more than 1 with a {type(model).__name__} that has layers of"
            f" {', '.join(sorted(others))}, which would see other tokens than in one process; needs"
            " a model of full attention, or 1"
        )
