"""A tiny Llama and preference features over its vocabulary."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 61


def tiny_llama(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        **options,
    )
    return LlamaForCausalLM(config)


def pair_features(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(1, VOCAB) for _ in range(draw.randint(low, high))]

    return [
        {
            "prompt_ids": ids(2, 6),
            "chosen_ids": ids(1, 9),
            "rejected_ids": ids(1, 9),
            "score_chosen": 1.0,
            "score_rejected": draw.random(),
        }
        for _ in range(count)
    ]


def point_features(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "prompt_ids": pair["prompt_ids"],
            "completion_ids": pair["chosen_ids"],
            "reward": pair["score_rejected"],
            "group": index // 2,
        }
        for index, pair in enumerate(pair_features(count, seed))
    ]


def list_features(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Lists of 3, 2, 4, 3, … completions, no two of them of one reward."""
    draw = random.Random(f"lists {seed}")

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(1, VOCAB) for _ in range(draw.randint(low, high))]

    sizes = [(3, 2, 4)[index % 3] for index in range(count)]
    return [
        {
            "prompt_ids": ids(2, 6),
            "completions_ids": [ids(2, 9) for _ in range(size)],
            "rewards": [draw.random() for _ in range(size)],
        }
        for size in sizes
    ]


def eager_sums(model: Any, features: list[dict[str, Any]], column: str, part: str) -> torch.Tensor:
    """(n,) float64 log-prob sums of each feature alone, through the model's own logits.

    `part` is "completion" or "prompt" (all of it but the first token).
    """
    sums = []
    for feature in features:
        prompt, completion = feature["prompt_ids"], feature[column]
        ids = torch.tensor([prompt + completion])
        logps = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        picked = logps.gather(1, ids[0, 1:, None])[:, 0]
        border = len(prompt) - 1
        sums.append(picked[border:].sum() if part == "completion" else picked[:border].sum())
    return torch.stack(sums)
