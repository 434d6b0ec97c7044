"""A pair in one row, its prompt once: prompt, chosen, rejected.

Both completions see the prompt and themselves, not each other, and both continue the prompt's
positions; so the hidden states are those of the plain layout, and the prompt's cost is paid once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PROMPT, CHOSEN, REJECTED, PADDING = 0, 1, 2, 3


def shared_layout(
    triples: Sequence[tuple[Tensor, Tensor, Tensor]], pad_token_id: int, multiple: int
) -> dict[str, Tensor]:
    """Lay out B pairs, padded on the right.

    Args:
        triples: prompt, chosen and rejected ids of each pair, int64.
        pad_token_id: fills the padded positions.
        multiple: the length is rounded up to one of it.

    Returns:
        (B, L) int64: `input_ids`, `position_ids`, `completion_mask`, and `segments`, which tells
        prompt 0, chosen 1, rejected 2 and padding 3 apart. (N,) int64, for each token that is
        predicted: `predictors`, the row of the flattened hidden states that predicts it,
        `targets`, the token, and `target_sequences`, in [0, 2B), chosen before rejected.
    """
    lengths = [sum(map(len, triple)) for triple in triples]
    width = -(-max(lengths) // multiple) * multiple
    shape = (len(triples), width)
    input_ids, position_ids = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.int64)
    segments = torch.full(shape, PADDING)
    predictors, targets, sequences = [], [], []
    for row, (triple, length) in enumerate(zip(triples, lengths, strict=True)):
        prompt, chosen, rejected = map(len, triple)
        parts = torch.tensor([PROMPT, CHOSEN, REJECTED])
        segments[row, :length] = parts.repeat_interleave(torch.tensor([prompt, chosen, rejected]))
        input_ids[row, :length] = torch.cat(triple)
        position_ids[row, :length] = torch.cat(
            (torch.arange(prompt + chosen), torch.arange(prompt, prompt + rejected))
        )
        for side, start in enumerate((prompt, prompt + chosen)):
            completion = triple[1 + side]
            rows = torch.arange(start - 1, start + len(completion) - 1)
            # The last token of the prompt predicts the first one of either completion.
            rows[0] = prompt - 1
            predicted = rows >= 0
            predictors.append(row * width + rows[predicted])
            targets.append(completion[predicted])
            sequences.append(torch.full_like(targets[-1], side * len(triples) + row))
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "completion_mask": ((segments == CHOSEN) | (segments == REJECTED)).long(),
        "segments": segments,
        "predictors": torch.cat(predictors),
        "targets": torch.cat(targets),
        "target_sequences": torch.cat(sequences),
    }


def shared_attention(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """What may see what, to be added to the attention scores.

    Args:
        segments: (B, L) of `shared_layout`.
        dtype: of the result.

    Returns:
        (B, 1, L, L): 0 where a query (third) sees a key (fourth dimension), else the lowest
        finite number.
    """
    query, key = segments.unsqueeze(2), segments.unsqueeze(1)
    # Padding sees itself alone: a row that sees nothing would be NaN.
    seen = ((key == PROMPT) & (query != PADDING)) | (key == query)
    seen = seen.tril().unsqueeze(1)
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=segments.device)
    return torch.where(seen, hidden.new_zeros(()), hidden)
