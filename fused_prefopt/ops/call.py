"""One call of the op: its arguments checked, its rows laid out, its engines chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_prefopt.checks import (
    require_device,
    require_floating,
    require_integer,
    require_number,
    require_shape,
)
from fused_prefopt.ops.engines import choose_engines
from fused_prefopt.ops.head_math import HeadMath
from fused_prefopt.ops.head_rows import HeadTensors
from fused_prefopt.ops.layout import Layout, packed_layout, padded_layout, require
from fused_prefopt.ops.vocab_shard import VocabShard, local_part
from fused_prefopt.types import LMHead


@dataclass(frozen=True)
class LogpOptions:
    """The options of `sequence_logps`, which documents them."""

    shift: bool = True
    sequence_ids: Tensor | None = None
    num_sequences: int | None = None
    num_labels: int | None = None
    ignore_index: int = -100
    workspace_mb: float = 256
    path: str = "auto"
    engine: str = "auto"
    drop_mass: float = 0.0
    entropy: bool = False


@dataclass(frozen=True)
class Call:
    """What a call asks for.

    Attributes:
        tensors: of the head, on this rank.
        vocab: rows of them that are no padding.
        shard: where they stand in the vocabulary.
        layout: where each row's target is.
        count: labelled rows, or -1 where a compiler traces and they cannot be counted.
        math: the head's scalars and the dtype to compute in.
        engines: path → engine.
    """

    tensors: HeadTensors
    vocab: int
    shard: VocabShard
    layout: Layout
    count: int
    math: HeadMath
    engines: dict[str, str]


def read_call(hidden: Tensor, head: LMHead | Tensor, labels: Tensor, options: LogpOptions) -> Call:
    """Check the arguments and lay out the rows; raises what `sequence_logps` documents."""
    require_number("drop_mass", options.drop_mass, low=0, high=1, below=True)
    head = head if isinstance(head, LMHead) else LMHead(head)
    vocab = head.vocab
    head, shard = local_part(head)
    if options.entropy and shard.group:
        raise ValueError("head: entropies need a whole head, got one sharded over ranks")
    _check(hidden, head, labels, options.sequence_ids)
    ignore_index = options.ignore_index
    if hidden.dim() == 3:
        layout = padded_layout(labels, shift=options.shift, ignore_index=ignore_index)
    else:
        assert options.sequence_ids is not None
        layout = packed_layout(
            labels,
            options.sequence_ids,
            options.num_sequences,
            shift=options.shift,
            ignore_index=ignore_index,
        )
    labelled = layout.targets != ignore_index
    in_vocab = (layout.targets >= 0) & (layout.targets < vocab)
    _require_labels(layout.targets, in_vocab | ~labelled, vocab)
    shard.require_same(layout.targets)
    count = _count(labelled, options.num_labels)
    math = HeadMath(head.softcap, head.logit_scale, head.temperature, _compute_dtype(hidden))
    engines = choose_engines(options.engine, hidden.device, math.dtype)
    return Call(head_tensors(hidden, head), head.vocab, shard, layout, count, math, engines)


def head_tensors(hidden: Tensor, head: LMHead) -> HeadTensors:
    rows = hidden.reshape(-1, hidden.shape[-1])
    if not head.low_rank:
        return HeadTensors(rows, head.weight, head.bias)
    # Before rows are flattened and chosen: dropout draws as it would without this package.
    low = [term.project(hidden).flatten(0, -2) for term in head.low_rank]
    weights = [term.b for term in head.low_rank]
    if len(low) > 1:
        low, weights = [torch.cat(low, 1)], [torch.cat(weights, 1)]
    return HeadTensors(rows, head.weight, head.bias, low[0], weights[0])


def _require_labels(targets: Tensor, fits: Tensor, vocab: int) -> None:
    """Raise ValueError, with the label where it can be read without waiting for a device."""
    message = f"labels: got a label outside [0, {vocab})"
    if fits.device.type == "cpu" and not torch.compiler.is_compiling() and not fits.all():
        first = int(targets[~fits][0])
        message += f": {first}; is the tokenizer another model's, or `ignore_index` another?"
    require(fits.all(), message)


def _check(hidden: Tensor, head: LMHead, labels: Tensor, sequence_ids: Tensor | None) -> None:
    require_floating("hidden", hidden)
    require_integer("labels", labels)
    hidden_size = head.weight.shape[1]
    if hidden.dim() == 3:
        require_shape("hidden", hidden, ("S", "T", hidden_size))
        if sequence_ids is not None:
            raise ValueError("sequence_ids: only the packed layout, hidden (N, D), takes them")
    else:
        require_shape("hidden", hidden, ("N", hidden_size))
        if sequence_ids is None:
            raise ValueError("sequence_ids: got None, wanted (N,) with packed hidden (N, D)")
    require_shape("labels", labels, hidden.shape[:-1])
    require_device("labels", labels, hidden.device)
    require_device("weight", head.weight, hidden.device)


def _count(labelled: Tensor, num_labels: int | None) -> int:
    """Labelled rows, or -1 where a compiler traces and they cannot be counted."""
    if num_labels is not None:
        message = f"num_labels: got {num_labels}, which is not the number of labelled rows"
        require(labelled.sum() == num_labels, message)
        return num_labels
    return -1 if torch.compiler.is_compiling() else int(labelled.sum())


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on (float64 is left alone, as autocast does), else hidden's."""
    kind = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype
