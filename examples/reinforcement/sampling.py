"""Completions that a model samples for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from fused_prefopt.integrations.evaluating import evaluating

_PROMPTS = 128


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    pad_token_id: int,
    *,
    new_tokens: int,
    name: str = "",
) -> list[dict[str, Any]]:
    """One completion for each prompt, at temperature 1 from the whole distribution.

    Args:
        model: causal language model that knows its end-of-text token.
        prompts: token ids.
        pad_token_id: of the tokenizer.
        new_tokens: of a completion at most.
        name: of a progress bar; none is shown without.

    Returns:
        Features with `prompt_ids` and `completion_ids`; those that ended have the end's token.
    """
    starts = range(0, len(prompts), _PROMPTS)
    features = []
    with evaluating(model):
        for start in tqdm(starts, desc=name) if name else starts:
            chunk = [list(prompt) for prompt in prompts[start : start + _PROMPTS]]
            features += _sample(model, chunk, pad_token_id, new_tokens)
    return features


def _sample(
    model: PreTrainedModel, prompts: list[list[int]], pad_token_id: int, new_tokens: int
) -> list[dict[str, Any]]:
    width = max(map(len, prompts))
    # On the left, so that all continue at the same place.
    ids = torch.tensor([[pad_token_id] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    drawn = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=new_tokens,
        pad_token_id=pad_token_id,
    )
    end = model.config.eos_token_id
    rows = [_until(row, end) for row in drawn[:, width:].tolist()]
    return [
        {"prompt_ids": prompt, "completion_ids": row}
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def _until(row: list[int], end: int) -> list[int]:
    return row[: row.index(end) + 1] if end in row else row
