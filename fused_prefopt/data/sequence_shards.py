"""Shards of a collated batch: a part of each sequence's tokens for each of several ranks.

Labels are shifted first, as the label that a shard's last token predicts may lie on another rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_prefopt.checks import is_on_host, require, require_choice, require_shape
from fused_prefopt.data.columns import (
    ATTENTION_MASK,
    COMPLETION_MASK,
    INPUT_IDS,
    LABEL_COUNTS,
    LAYOUT,
    MISMATCHED,
    NUM_SEQUENCES,
    OF_GOLD,
    POSITION_IDS,
    SEGMENTS,
    SEQUENCE_IDS,
    SHARD_LABELS,
    SHIFT_LABELS,
    SHIFT_PROMPT_LABELS,
    TOKEN_WEIGHTS,
)
from fused_prefopt.data.labels import LabelCounts, labels_of, prompt_labels_of

# In which order the ranks have the tokens: each a chunk, as in Ulysses; or each two, an early one
# and a late one of as much attention together, as in ring attention (torch's context parallel).
ORDERS = CONTIGUOUS, BALANCED = ("contiguous", "balanced")
# Columns with a token axis: what fills them up.
_FILLS = {
    INPUT_IDS: 0,
    ATTENTION_MASK: 0,
    COMPLETION_MASK: 0,
    TOKEN_WEIGHTS: 0,
    **dict.fromkeys(SHARD_LABELS, -100),
}


def shard_of(
    batch: Mapping[str, Any],
    rank: int,
    ranks: int,
    *,
    order: str = CONTIGUOUS,
    multiple_of: int = 1,
) -> dict[str, Any]:
    """One rank's shard of a batch that every rank has whole.

    Padded to a length that the ranks can share, then cut: the ranks' shards, put together
    (`token_places`), are the padded batch. Batches with `gold_` or `KL_` parts have shards of
    those, too.

    Args:
        batch: of a collator of ours or TRL's: padded on the right, (S, L), or packed, (1, N).
        rank: in [0, ranks), of the group that shares the sequences.
        ranks: how many share them.
        order: "contiguous" or "balanced", see `token_places`.
        multiple_of: of what each shard's length is to be a multiple.

    Returns:
        The columns with a token axis cut, with `shift_labels` and `shift_prompt_labels` (as the
        labels of `data.labels`, shifted, never across sequences; -100 where there is none),
        `token_weights` shifted alike, `position_ids` in the whole sequences, and `label_counts` of
        the shard. What fills up has the token id 0, no label and no attention; packed it counts to
        the last sequence, with positions that start again. Everything else as it is.

    Raises:
        ValueError: the batch is a shard already, or has shared prompts, images or another column of
            tokens, or padding on the left; `rank`, `order` or `multiple_of` is out of range.
    """
    chunks = _chunks(rank, ranks, order)
    if multiple_of < 1:
        raise ValueError(f"multiple_of: got {multiple_of}, wanted at least 1")
    shard, others = dict(batch), dict(batch)
    for prefix in ("", OF_GOLD, MISMATCHED):
        part = {name: others.pop(prefix + name) for name in LAYOUT if prefix + name in others}
        if INPUT_IDS in part:
            shard.pop(prefix + LABEL_COUNTS, None)
            cut = _cut(part, rank, ranks, order, chunks * multiple_of)
            shard |= {prefix + name: value for name, value in cut.items()}
    left = [name for name, each in others.items() if isinstance(each, Tensor) and each.dim() > 1]
    if left:
        raise ValueError(
            f"{left[0]}: got a column of more than a number a sequence, wanted none beside"
            f" {', '.join((*_FILLS, POSITION_IDS, SEQUENCE_IDS))}: nothing says how its tokens or"
            " images are to be cut"
        )
    return shard


def token_places(length: int, rank: int, ranks: int, order: str = CONTIGUOUS) -> Tensor:
    """(length / ranks,) int64 places of a rank's tokens in whole sequences.

    "contiguous": chunk `rank` of `ranks`, as Ulysses has them. "balanced": of 2 · `ranks` chunks
    those numbered `rank` and 2 · `ranks` − 1 − `rank`, so that each rank has as many scores of
    causal attention, as torch's context parallel (head and tail) and Megatron's have them.

    Args:
        length: of the padded sequences, a multiple of the number of chunks.
        rank: in [0, ranks).
        ranks: how many share the sequences.
        order: one of `ORDERS`.

    Raises:
        ValueError: an argument is out of range, or `length` no such multiple.
    """
    chunks = _chunks(rank, ranks, order)
    if length % chunks:
        raise ValueError(
            f"length: got {length} for {ranks} ranks in {order} order, wanted a multiple of"
            f" {chunks}"
        )
    places = torch.arange(length).view(chunks, length // chunks)
    if order == CONTIGUOUS:
        return places[rank]
    return torch.cat((places[rank], places[chunks - 1 - rank]))


def _chunks(rank: int, ranks: int, order: str) -> int:
    """Into how many parts a sequence is cut."""
    require_choice("order", order, ORDERS)
    if not 0 <= rank < ranks:
        raise ValueError(f"rank: got {rank}, wanted one in [0, {ranks})")
    return ranks * (2 if order == BALANCED else 1)


def _cut(
    part: Mapping[str, Any], rank: int, ranks: int, order: str, multiple_of: int
) -> dict[str, Any]:
    """A rank's columns of one layout, filled up to a multiple of so many tokens."""
    _require_whole(part)
    tokens, ids = _shifted(part), part[INPUT_IDS]
    length = ids.shape[1]
    filling = -length % multiple_of
    tokens = {name: _filled(values, filling, _FILLS[name]) for name, values in tokens.items()}
    places = torch.arange(length + filling, device=ids.device)
    if SEQUENCE_IDS in part:
        # Behind, a sequence of its own for the attention, in which no token has a label.
        tokens[SEQUENCE_IDS] = _filled(part[SEQUENCE_IDS], filling, part[NUM_SEQUENCES] - 1)
        places = torch.cat((part[POSITION_IDS][0], places[:filling]))
    elif POSITION_IDS in part:
        given = part[POSITION_IDS]
        places = torch.cat((given, given[:, -1:] + 1 + places[:filling]), 1)
    tokens[POSITION_IDS] = places.expand(len(ids), -1)
    own = token_places(length + filling, rank, ranks, order).to(ids.device)
    shard: dict[str, Any] = {name: values[:, own] for name, values in tokens.items()}
    if LABEL_COUNTS in part and is_on_host(ids):
        completion, prompt = (int((shard[name] != -100).sum()) for name in SHARD_LABELS)
        shape = tuple(shard[COMPLETION_MASK].shape)
        shard[LABEL_COUNTS] = LabelCounts(shape=shape, completion=completion, prompt=prompt)
    return shard


def _require_whole(part: Mapping[str, Any]) -> None:
    """Raise ValueError unless a layout is one that can be cut."""
    if SHIFT_LABELS in part:
        raise ValueError("shift_labels: got a batch that is a shard already, wanted a whole one")
    if SEGMENTS in part:
        raise ValueError(
            "shared_prompt: got pairs in one row each, whose sides are kept apart by a mask of the"
            " whole row; needs padded or packed sequences"
        )
    mask, shape = part.get(ATTENTION_MASK), part[INPUT_IDS].shape
    for name in (COMPLETION_MASK, ATTENTION_MASK, TOKEN_WEIGHTS, SEQUENCE_IDS):
        if name in part:
            require_shape(name, part[name], shape)
    if POSITION_IDS in part:
        require_shape(POSITION_IDS, part[POSITION_IDS], ("S", shape[1]))
    if SEQUENCE_IDS in part:
        if POSITION_IDS not in part or shape[0] != 1:
            raise ValueError(
                f"sequence_ids: got {shape[0]} rows with {', '.join(part)}, wanted one row of"
                " packed sequences with their position_ids"
            )
    elif mask is not None:
        require(
            (mask[:, 1:] <= mask[:, :-1]).all(),
            lambda: (
                "attention_mask: got padding in front of tokens, wanted it behind: shards have no"
                " mask, and causal attention alone keeps tokens from what is behind them"
            ),
        )


def _shifted(part: Mapping[str, Any]) -> dict[str, Tensor]:
    """The columns of a layout with a token axis, the labels and their weights shifted."""
    ids = part.get(SEQUENCE_IDS)
    follows = None if ids is None else ids[:, 1:] == ids[:, :-1]

    def shifted(values: Tensor, fill: int) -> Tensor:
        found = torch.full_like(values, fill)
        found[:, :-1] = values[:, 1:] if follows is None else values[:, 1:].where(follows, fill)
        return found

    tokens = {
        name: part[name] for name in (INPUT_IDS, ATTENTION_MASK, COMPLETION_MASK) if name in part
    }
    tokens[SHIFT_LABELS] = shifted(labels_of(part), -100)
    tokens[SHIFT_PROMPT_LABELS] = shifted(prompt_labels_of(part), -100)
    if TOKEN_WEIGHTS in part:
        tokens[TOKEN_WEIGHTS] = shifted(part[TOKEN_WEIGHTS], 0)
    return tokens


def _filled(values: Tensor, filling: int, fill: int) -> Tensor:
    """(S, L + filling) values with so many more behind them."""
    return torch.nn.functional.pad(values, (0, filling), value=fill)
