"""Shared prompts: both sides of a pair in one row with its prompt once, and the attention there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_prefopt.data.columns import (
    COMPLETION_MASK,
    INPUT_IDS,
    POSITION_IDS,
    PREDICTORS,
    SEGMENTS,
    TARGET_SEQUENCES,
    TARGETS,
)

# Segments of a row that holds a pair with its prompt once.
IN_PROMPT, IN_CHOSEN, IN_REJECTED, IN_PADDING = range(4)


def shared_layout(
    pairs: Sequence[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]],
    pad_token_id: int,
    multiple: int,
) -> dict[str, Tensor]:
    """Lay out B pairs, each in one row with its prompt once, padded on the right.

    Both completions see the prompt and themselves, not each other, and both continue the prompt's
    positions; so the hidden states are those of the plain layout, and the prompt's cost is paid
    once. Where a cut left the two sides of a pair different prompts, none is shared: each stands
    in front of its completion, in the same row.

    Args:
        pairs: prompt and completion of the chosen and of the rejected side, int64 token ids.
        pad_token_id: fills the padded positions.
        multiple: the length is rounded up to one of it.

    Returns:
        (B, L) int64: `input_ids`, `position_ids`, `completion_mask`, and `segments`, which tells
        prompt 0, chosen 1, rejected 2 and padding 3 apart. (N,) int64, for each token that is
        predicted: `predictors`, the row of the flattened hidden states that predicts it,
        `targets`, the token, and `target_sequences`, in [0, 2B), chosen before rejected.
    """
    rows = [_shared(*pair) for pair in pairs]
    longest = max(len(prompt) + sum(len(ids) for ids, _ in sides) for prompt, sides in rows)
    width = -(-longest // multiple) * multiple
    shape = (len(rows), width)
    input_ids, position_ids = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.int64)
    segments, completion_mask = torch.full(shape, IN_PADDING), torch.zeros_like(position_ids)
    predictors, targets, sequences = [], [], []
    for row, (prompt, sides) in enumerate(rows):
        shared = len(prompt)
        input_ids[row, :shared], segments[row, :shared] = prompt, IN_PROMPT
        position_ids[row, :shared] = torch.arange(shared)
        start = shared
        for side, (ids, own) in enumerate(sides):
            end = start + len(ids)
            input_ids[row, start:end] = ids
            segments[row, start:end] = (IN_CHOSEN, IN_REJECTED)[side]
            position_ids[row, start:end] = torch.arange(shared, shared + len(ids))
            completion_mask[row, start + own : end] = 1
            places = torch.arange(start + own - 1, end - 1)
            if not own:
                # The last token of the prompt predicts the first one of either completion.
                places[0] = shared - 1
            predicted = places >= 0
            predictors.append(row * width + places[predicted])
            targets.append(ids[own:][predicted])
            sequences.append(torch.full_like(targets[-1], side * len(rows) + row))
            start = end
    return {
        INPUT_IDS: input_ids,
        POSITION_IDS: position_ids,
        COMPLETION_MASK: completion_mask,
        SEGMENTS: segments,
        PREDICTORS: torch.cat(predictors),
        TARGETS: torch.cat(targets),
        TARGET_SEQUENCES: torch.cat(sequences),
    }


def _shared(
    chosen: tuple[Tensor, Tensor], rejected: tuple[Tensor, Tensor]
) -> tuple[Tensor, list[tuple[Tensor, int]]]:
    """A pair's shared prompt, and of each side the ids behind it, with how many are its prompt."""
    (prompt, first), (other, second) = chosen, rejected
    if torch.equal(prompt, other):
        return prompt, [(first, 0), (second, 0)]
    return prompt[:0], [(torch.cat(side), len(side[0])) for side in (chosen, rejected)]


def shared_attention(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Mask of rows that share a prompt, to be added to the attention scores.

    Args:
        segments: (B, L) of `shared_layout`.
        dtype: of the result.

    Returns:
        (B, 1, L, L): 0 where a query (third) sees a key (fourth dimension), else the lowest
        finite number.
    """
    query, key = segments.unsqueeze(2), segments.unsqueeze(1)
    # Padding sees itself alone: a row that sees nothing would be NaN.
    seen = ((key == IN_PROMPT) & (query != IN_PADDING)) | (key == query)
    seen = seen.tril().unsqueeze(1)
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=segments.device)
    return torch.where(seen, hidden.new_zeros(()), hidden)
